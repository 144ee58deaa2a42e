"""The trainer's step compiled for H100s that are not there: what the plan reads off it.

A small dense model with heads that the fast kernels take, so that a compile is short; two on a ring.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hollow import hollow_kernels
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from zigzag_jax.kernels import HOPPER
from zigzag_jax.models.sharding import gather
from zigzag_jax.train.config import Config, MeshConfig
from zigzag_jax.train.memory.footprint import Footprint, known_parts, measure
from zigzag_jax.train.memory.topology import described_mesh
from zigzag_jax.train.memory.traffic import HOP
from zigzag_jax.train.mesh import AXES
from zigzag_jax.train.models import model_config
from zigzag_jax.train.program import make_program

pytestmark = [pytest.mark.aot, pytest.mark.slow]

LAYERS, LENGTH = 8, 16384
SIZES = {
    "model_type": "qwen3", "vocab_size": 1024, "hidden_size": 256, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 512, "hidden_act": "silu",
    "rope_theta": 1e4, "max_position_embeddings": LENGTH, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def footprints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Footprint, dict[str, int]]]:
    """By policy: the step on cp 2, and the parts that follow from shapes."""
    folder: Path = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(SIZES))

    def one(remat: Any):
        config = Config(
            model=str(folder), random_init=True, batch=1, seq_len=LENGTH, dtype="bfloat16", remat=remat,
            mesh=MeshConfig(cp=2),
        )  # fmt: skip
        sizes = model_config(config)
        program = make_program(config, sizes, described_mesh("h100", (1, 1, 2), AXES, 0.92), HOPPER)
        return measure(config, program), known_parts(config, sizes, program)

    with hollow_kernels():
        return {remat: one(remat) for remat in ("attention", "offload")}


def test_the_state_is_what_shapes_say(footprints):
    footprint, parts = footprints["attention"]
    heads, d, inner = 4 * 64, 256, 512
    layer = d * heads * 2 + d * heads // 2 * 2 + 3 * d * inner  # q and o, k and v (half the heads), the block
    matrices = LAYERS * layer + 2 * 1024 * d
    assert footprint.parameters == pytest.approx(matrices * 4 / 2, rel=0.02)  # cut over cp; norms are little
    assert footprint.optimiser == pytest.approx(2 * footprint.parameters, rel=0.001)
    assert footprint.temporary > max(parts.values())


def test_offload_takes_off_the_device_what_the_layers_keep(footprints):
    attention, offload = footprints["attention"][0], footprints["offload"][0]
    tokens, lse = LENGTH // 2, 4 * 4
    assert sum(attention.kept.values()) == LAYERS * tokens * ((256 + 4 * 64) * 2 + lse)
    assert attention.host == 0
    assert offload.host == sum(offload.kept.values()) == sum(attention.kept.values())
    assert all(kind.on_host for kind in offload.kept)
    saved = attention.temporary - offload.temporary
    assert saved > 0.6 * offload.host  # the rest is a layer's copy on its way


@pytest.mark.parametrize("remat", ["attention", "offload"])
def test_every_hop_flies(footprints, remat: str):
    hops = [x for x in footprints[remat][0].travels if x.kind == HOP]
    assert all(x.times == x.asynchronous == x.covered for x in hops)
    payload = LENGTH // 2 * 2 * 2 * 64  # values of k and v
    assert sum(x.size * x.times for x in hops) == LAYERS * payload * (2 + 2 + 4)  # forward, backward, gradient home


@pytest.mark.parametrize("spec", [P(None, "cp"), P(None, None, "cp")], ids=["embed-first", "embed-last"])
def test_gathered_layers_make_no_second_copy_of_all_parameters(spec: P):
    """Nor of all gradients: XLA would transpose whole stacks ahead of their loop if the gather asked it to."""
    mesh, layers, size = described_mesh("h100", (2,), ("cp",), 0.92), 16, (8, 512, 512)

    def one(x, w):
        whole = gather(w, spec, jnp.bfloat16)
        return jnp.einsum("td,edm->tm", x, whole), None

    def loss(stack, x):
        local = lambda stack, x: jnp.sum(lax.scan(jax.checkpoint(one), x, stack)[0].astype(jnp.float32))[None]
        in_specs = (P(None, *spec), P("cp"))
        return jnp.sum(jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=P("cp"), check_vma=False)(stack, x))

    array = lambda shape, dtype, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    stack = array((layers, *size), jnp.float32, P(None, *spec))
    compiled = jax.jit(jax.grad(loss)).lower(stack, array((512, 512), jnp.bfloat16, P("cp"))).compile()
    needs = compiled.memory_analysis()
    assert needs is not None
    assert needs.temp_size_in_bytes < needs.argument_size_in_bytes / 2
