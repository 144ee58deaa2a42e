"""The schedule of the trainer's own step for H100s that are not there: in a model's layers too, scanned and
recomputed, the hops fly above the kernels (overlap.py has the rules).

Two layers of the real sizes but for the vocabulary and the number of experts, which cost compile time only.
"""

import collections
import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from h100 import h100s
from hollow import hollow_kernels
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from overlap import check, copied

from zigzag_jax.hlo import Program
from zigzag_jax.models.options import KernelOptions
from zigzag_jax.models.presets import PRESETS
from zigzag_jax.models.registry import ModelConfig, model_of
from zigzag_jax.models.sharding import Sharding, abstract_state, expert_rules
from zigzag_jax.train.config import OptimConfig
from zigzag_jax.train.mesh import AXES, ROWS
from zigzag_jax.train.optim import optimizer
from zigzag_jax.train.step import abstract_train_state, make_step
from zigzag_jax.train.task import Task

pytestmark = [pytest.mark.aot, pytest.mark.slow]

LAYERS = 2
LENGTH = 8192  # tokens a rank: longer than any dimension of a weight
LESS = {"vocab_size": 1024, "num_hidden_layers": LAYERS}


def step_schedule(sizes: ModelConfig, cp: int, options: KernelOptions, expert_axes: tuple[str, ...] = ()) -> Program:
    """One step of AdamW on one row, its kernels hollow."""
    mesh = Mesh(h100s(cp).devices.reshape(1, 1, cp), AXES)
    sharding = Sharding(mesh, expert_rules(expert_axes))
    build = lambda rngs: model_of(sizes)(
        sizes, sharding, rngs=rngs, dtype=jnp.bfloat16, remat="attention", options=options
    )
    graphdef, shapes = abstract_state(build)
    tx = optimizer(OptimConfig(), 10)
    task = Task(graphdef, sharding, jnp.dtype(jnp.bfloat16), sizes.aux_loss, sizes.aux_coefficient)
    place = NamedSharding(mesh, P(ROWS, "cp"))
    array = lambda dtype: jax.ShapeDtypeStruct((1, LENGTH * cp), dtype, sharding=place)
    batch = {name: array(jnp.int32) for name in ("tokens", "labels", "positions")} | {"real": array(jnp.bool_)}
    step = jax.jit(make_step(task, tx), donate_argnums=0)
    with hollow_kernels():
        return Program(step.lower(abstract_train_state(shapes, tx, sharding), batch).compile().as_text() or "")


def test_qwen3_moe():
    sizes = dataclasses.replace(PRESETS["qwen3-30b-a3b"], **LESS, num_experts=16)
    program = step_schedule(sizes, 4, KernelOptions(implementation="mosaic"))
    check(program, 4, LENGTH, sizes.hop_values["k, v"], LAYERS)
    assert copied(program, LENGTH, 4 * 128, 32 * 128) == {
        "bf16[8192,512]": 2 * LAYERS,  # v is cut out of one matmul with q and k, forward and recomputed
        "bf16[1,1,8192,4096]": 2 * LAYERS,  # attention's result: into the stack of what is kept, and back
    }


def test_experts_on_several_devices():
    """The exchange with a GPU's kernels, whose counters of drawn items stand in a loop of unknown length."""
    sizes = dataclasses.replace(PRESETS["qwen3-30b-a3b"], **LESS, num_experts=16)
    program = step_schedule(sizes, 4, KernelOptions(implementation="mosaic"), ("cp",))
    check(program, 4, LENGTH, sizes.hop_values["k, v"], LAYERS)
    kernels = collections.Counter(
        re.sub(r".*/(\w+)/mpmd_map.*", r"\1", x.source)
        for instructions in program.computations.values()
        for x in instructions
        if x.opcode == "custom-call" and x.source.endswith("mpmd_map")
    )
    # gate and up, and down, there; the first again in the backward; a matrix's gradient is a launch a run
    bodies = kernels["grouped_dx"] // 2  # XLA writes the backward's loop over layers out twice
    assert bodies > 0
    assert [kernels[name] for name in ("grouped", "grouped_dx", "grouped_dw")] == [
        2 + bodies,
        2 * bodies,
        2 * 4 * bodies,
    ]


def test_deepseek_v2_with_its_latent_on_the_ring():
    sizes = dataclasses.replace(PRESETS["deepseek-v2-lite"], **LESS, n_routed_experts=16, first_k_dense_replace=0)
    program = step_schedule(sizes, 8, KernelOptions(implementation="mosaic", payload="latent"))
    check(program, 8, LENGTH, sizes.hop_values["latent"], LAYERS)
    # no step of a forward lays k out of latent @ kv_b and the rotary key, and none cuts its gradient
    assert copied(program, LENGTH, 512, 16 * 64, 16 * 128, 16 * 192, 16 * 256) == {
        # the latent, every other step of the backward's loop: its share of kv_b's gradient waits for the next to come
        "bf16[1,8192,512]": 2 * LAYERS,
        "bf16[1,8192,16,192]": LAYERS * 8,  # the backward's
        # a layer's input, which has v's size: carried on, and into the stack; and attention's result, as above
        "bf16[1,8192,2048]": LAYERS,
        "bf16[1,1,8192,2048]": LAYERS + 2 * LAYERS,
    }
