"""Sums over bits: the same on every mesh, another for every changed bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from zigzag_jax.train.sums import _sum, differing, sums

RNG = np.random.default_rng(0)


def plain(x: np.ndarray) -> int:
    """The formula, in Python's integers."""
    bits = x.reshape(-1).view({1: np.uint8, 2: np.uint16}.get(x.dtype.itemsize, np.uint32))
    return sum(int(b) * (2 * i + 1) for i, b in enumerate(bits)) % 2**32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8", "bool"])
@pytest.mark.parametrize("shape", [(), (7,), (3, 5, 2)], ids=str)
def test_the_formula(dtype: str, shape: tuple[int, ...]):
    x = np.asarray(jnp.asarray(RNG.normal(size=shape) * 50).astype(dtype))
    assert sums({"x": jnp.asarray(x)}) == {"['x']": plain(x)}


def test_elements_of_eight_bytes():
    x = RNG.normal(size=(3, 4))
    with jax.enable_x64(True):
        assert list(sums([jnp.asarray(x)]).values()) == [plain(x)]


@pytest.mark.parametrize("spec", [PartitionSpec("a"), PartitionSpec(None, ("b", "a")), PartitionSpec()], ids=str)
def test_no_mesh_changes_it(spec: PartitionSpec):
    x = RNG.normal(size=(8, 16)).astype(np.float32)
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    assert sums(jax.device_put(x, NamedSharding(mesh, spec))) == sums(jnp.asarray(x)) == {"": plain(x)}


def test_every_changed_bit_and_every_exchange_changes_it():
    x = RNG.normal(size=64).astype(np.float32)
    changed = [x]
    for bit in range(64 * 32):
        y = x.view(np.uint32).copy()
        y[bit // 32] ^= np.uint32(1 << bit % 32)
        changed.append(y.view(np.float32))
    changed += [np.roll(x, 1), x[::-1], np.where(np.arange(64) < 2, x[[1, 0] * 32], x)]
    want, *others = jax.vmap(_sum)(jnp.asarray(changed))
    assert want == plain(x)
    assert want not in np.asarray(others)


def test_what_differs_is_named():
    assert differing({"a": 1, "b": 2}, {"a": 1, "b": 2}) == ""
    assert differing({"a": 1, "b": 2}, {"a": 1, "b": 3}) == "b"
    assert differing({"a": 1, "b": 2}, {"c": 1}) == "a and 2 more"
