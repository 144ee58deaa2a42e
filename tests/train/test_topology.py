"""GPUs that are only described: what is said of them, and what is said where nobody can compile for them."""

import pytest

from zigzag_jax.train.errors import UserError
from zigzag_jax.train.memory import topology
from zigzag_jax.train.memory.topology import GPUS, check_compiler


def test_without_a_compiler_the_command_that_brings_it_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(topology, "entry_points", lambda group: [])
    with pytest.raises(UserError, match=r"^gpu: must have a compiler: pip install .*jax-cuda13-plugin==.*, got None"):
        check_compiler()


def test_any_cuda_plugin_will_do(monkeypatch: pytest.MonkeyPatch):
    class Plugin:
        name = "xla_cuda12"

    monkeypatch.setattr(topology, "entry_points", lambda group: [Plugin] if group == "jax_plugins" else [])
    check_compiler()


def test_the_compiler_is_told_what_makes_the_pool_four_fifths():
    for gpu in GPUS.values():
        (line,) = [line for line in gpu.target(0.92).splitlines() if "device_memory_size" in line]
        told = int(line.split("device_memory_size:")[1].split()[0])
        assert told * 0.8 == pytest.approx(gpu.memory * 0.92, abs=2)


def test_the_cards_differ_in_their_memory_alone():
    h100, h200 = (gpu.target(0.75).splitlines() for gpu in GPUS.values())
    differ = [a.split()[0] for a, b in zip(h100, h200, strict=True) if a != b]
    assert differ == ["block_dim_limit_y:", "clock_rate_ghz:", "device_description_str:"]  # the lines' first words
    assert GPUS["h200"].memory / GPUS["h100"].memory == pytest.approx(139.8 / 79.1, rel=1e-3)
