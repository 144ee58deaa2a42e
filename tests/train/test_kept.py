"""What layers keep, read off a step's jaxpr, against what their policies say."""

from typing import Any

import jax
import pytest

from zigzag_jax.models.presets import PRESETS
from zigzag_jax.train.config import Config, MeshConfig
from zigzag_jax.train.data.batches import abstract_batch
from zigzag_jax.train.memory.kept import Kept, kept_by_layers
from zigzag_jax.train.mesh import make_mesh
from zigzag_jax.train.program import make_program

ROWS, LENGTH = 4, 256
SIZES = PRESETS["tiny-qwen3-moe"]
DEVICES = 4


def kept(remat: Any, accumulate: int = 1, ep: int = 1) -> dict[Kept, int]:
    """Of a step of the tiny model in bfloat16 on dp 2 * cp 2; traced, not compiled."""
    mesh_config = MeshConfig(dp=2, cp=2, ep=ep)
    config = Config(batch=ROWS, accumulate=accumulate, seq_len=LENGTH, remat=remat, dtype="bfloat16", mesh=mesh_config)
    mesh = make_mesh(config)
    program = make_program(config, SIZES, mesh)
    there = len(jax.live_arrays())
    traced = program.step.trace(program.state, abstract_batch(ROWS, LENGTH, mesh))
    assert len(jax.live_arrays()) <= there  # fewer where the garbage of earlier tests goes
    return dict(kept_by_layers(traced.jaxpr, mesh.size))


def a_device(values: int, itemsize: int, rows: int = ROWS) -> int:
    """Bytes of `values` numbers a token, of all layers and a device's tokens."""
    return SIZES.num_hidden_layers * rows * LENGTH * values * itemsize // DEVICES


@pytest.mark.parametrize(("remat", "accumulate"), [("attention", 1), ("offload", 2)])
def test_the_input_the_attention_and_its_lse(remat: str, accumulate: int):
    found, rows = kept(remat, accumulate), ROWS // accumulate
    heads, size = SIZES.num_attention_heads, SIZES.rotary_size  # all of a head
    want = [a_device(SIZES.hidden_size, 2, rows), a_device(heads * size, 2, rows), a_device(heads, 4, rows)]
    assert sorted(found.values()) == sorted(want)
    assert all(kind.on_host == (remat == "offload") for kind in found)


@pytest.mark.parametrize("ep", [1, 2])
def test_the_results_of_matmuls_besides(ep: int):
    """Queries, keys, values and attention's projection; gate and up of every choice of experts here, but not down."""
    found = kept("matmuls", ep=ep)
    width = lambda heads: heads * SIZES.rotary_size
    values = [SIZES.hidden_size] * 2
    values += [2 * SIZES.num_experts_per_tok * SIZES.moe_intermediate_size] * (ep == 1)
    values += [width(SIZES.num_attention_heads)] * 2 + [SIZES.hop_values["k, v"]]  # q and the attention's result
    assert sum(found.values()) == sum(a_device(n, 2) for n in values) + a_device(SIZES.num_attention_heads, 4)


def test_the_input_alone():
    ((kind, size),) = kept("full").items()
    assert size == a_device(SIZES.hidden_size, 2)
    assert kind == Kept(f"bfloat16[{ROWS}, {LENGTH}, {SIZES.hidden_size}]", on_host=False)


@pytest.mark.slow
def test_everything_is_more():
    assert sum(kept("none").values()) > 3 * a_device(SIZES.hidden_size, 2)
