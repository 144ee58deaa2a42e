"""The grouped matmul through jax-triton: which tile a card gets, and what is said where the extra is not installed.

Its results are tested on a GPU (test_grouped_gpu.py), its compiler's on none (test_grouped_triton_compiled.py).
"""

import importlib.util
import re

import jax.numpy as jnp
import pytest

from zigzag_jax import kernels
from zigzag_jax.kernels import grouped_implementation
from zigzag_jax.kernels.grouped import triton


def arrays(rows=16, k=128, n=64, dtype=jnp.bfloat16):
    return jnp.zeros((rows, k), dtype), jnp.zeros((2, k, n), dtype)


@pytest.mark.parametrize(
    ("inputs", "rule"),
    [
        (arrays(dtype=jnp.float32), "bfloat16 or float16"),
        (arrays(k=96), "k and n that are multiples of 64"),
        (arrays(n=32), "k and n that are multiples of 64"),
        (arrays(rows=0), "arrays that are not empty"),
    ],
)
def test_limits(inputs, rule, monkeypatch):
    monkeypatch.setattr(triton, "_missing", lambda: None)
    x, w = inputs
    with pytest.raises(NotImplementedError, match=re.escape(f"'triton' needs {rule}")):
        grouped_implementation(x, w, "triton")
    x, w = arrays()
    assert grouped_implementation(x, w, "triton") == "triton"


def test_without_the_extra_it_is_said_how_to_get_it(monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    triton._missing.cache_clear()
    with pytest.raises(NotImplementedError, match=re.escape("pip install jax-triton==0.3.1")):
        grouped_implementation(*arrays(), "triton")
    # an A100 without it: plain XLA, with a warning that says what is missing
    monkeypatch.setattr(kernels, "_grouped_preference", lambda: ("triton", "reference"))
    monkeypatch.setattr(kernels.jax, "default_backend", lambda: "gpu")
    kernels._say.cache_clear()
    with caplog.at_level("WARNING", "zigzag_jax"):
        assert grouped_implementation(*arrays()) == "reference"
    assert "'triton' needs jax-triton and triton" in caplog.text
    assert "plain XLA, slow" in caplog.text
    triton._missing.cache_clear()


@pytest.mark.parametrize(("capability", "refused"), [("7.5", True), ("gfx942", True), ("8.0", False), ("12.0", False)])
def test_a_card_without_the_tensor_cores_is_refused(capability, refused, monkeypatch):
    class Card:
        platform, compute_capability = "gpu", capability

    monkeypatch.setattr(triton.jax, "devices", lambda: [Card()])
    monkeypatch.setattr(triton, "_missing", lambda: None)
    assert triton.limits(*arrays()) == ("an NVIDIA GPU of compute capability 8.0 or newer" if refused else None)


@pytest.mark.parametrize("capability", ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"])
def test_a_tile_that_fits_the_card(capability, monkeypatch):
    class Card:
        compute_capability = capability

    monkeypatch.setattr(triton.jax, "devices", lambda: [Card()])
    tile, large = triton.tile(), capability in ("9.0", "10.0")
    assert (tile.rows + tile.columns) * tile.step * 2 * tile.stages <= (227 if large else 99) * 1024
    assert tile == (triton.WIDE if large else triton.NARROW)
