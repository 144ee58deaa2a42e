"""What is read off a compiled step, here one for CPU devices, and the parts of it that shapes tell."""

import jax
import pytest

from zigzag_jax.models.presets import PRESETS
from zigzag_jax.train.config import Config, MeshConfig
from zigzag_jax.train.memory.footprint import known_parts, measure
from zigzag_jax.train.mesh import make_mesh
from zigzag_jax.train.program import make_program

SIZES = PRESETS["tiny-qwen3-moe"]


@pytest.mark.slow
def test_a_compiled_step():
    config = Config(batch=2, seq_len=250, mesh=MeshConfig(cp=4))
    program = make_program(config, SIZES, make_mesh(config))
    found = measure(config, program)
    parameters = sum(x.size for x in jax.tree.leaves(program.parameters))
    assert found.parameters == pytest.approx(parameters * 4 / 4, rel=0.01)  # over cp, but for a few norms
    assert found.optimiser == pytest.approx(2 * found.parameters, rel=0.001)
    assert found.batch == 2 * 256 // 4 * (3 * 4 + 1)  # padded to 8 chunks; three int32 and a bool
    assert found.temporary > sum(found.kept.values()) > 0
    assert found.host == 0
    assert found.peak == found.state + found.batch + found.temporary


def test_parts_that_shapes_tell():
    # nothing is made of the billions of parameters
    config = Config(batch=4, accumulate=2, seq_len=65536, dtype="bfloat16", mesh=MeshConfig(fsdp=2, cp=4))
    sizes = PRESETS["qwen3-30b-a3b"]
    parts = known_parts(config, sizes, make_program(config, sizes, make_mesh(config)))
    assert parts["gradients"] == pytest.approx(2 * 30.532e9 * 4 / 8, rel=1e-3)  # one of a micro-batch and their sum
    assert parts["logits of 4096 tokens and their gradient"] == 4096 * 151936 * (4 + 2)
    assert parts["the head and its gradient, whole"] == 2048 * 151936 * (4 + 2)
    # k and v of the 16384 tokens that a device has in a micro-batch, in bfloat16, and their gradient in float32
    assert parts["the ring's payload and gradient, two of each"] == 2 * 16384 * 2 * 4 * 128 * (2 + 4)


def test_one_device_has_no_ring():
    config = Config(batch=1, seq_len=1024, mesh=MeshConfig(cp=1))
    parts = known_parts(config, SIZES, make_program(config, SIZES, make_mesh(config)))
    assert not any("ring" in name for name in parts)
    assert "logits of 1024 tokens and their gradient" in parts
