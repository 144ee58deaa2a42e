"""What Hopper kernels are made of, on a GPU: masks made of bits, of which the interpreter knows only the result."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from cards import HOPPER

from zigzag_jax.kernels import hopper

ROWS = 64

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="no Hopper GPU")]


def _select(x_ref, first_ref, end_ref, out_ref, *, other: float) -> None:
    x = plgpu.load(x_ref, layout=hopper.ACC, optimized=False)
    first, end = (plgpu.load(ref, layout=hopper.ROW, optimized=False) for ref in (first_ref, end_ref))
    hopper.store(out_ref, hopper.where_between(x, first, end, other))


@functools.partial(jax.jit, static_argnames="other")
def select(x, first, end, other: float):
    """`where_between` on arrays in global memory, by one warpgroup."""
    return hopper.launch(
        functools.partial(_select, other=other), x, first, end, out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types={}, grid=(1,), grid_names=("sm",), warpgroups=1, name="where_between",
    )  # fmt: skip


@pytest.mark.parametrize("width", [8, 64, 96, 128, 136, 256])
def test_a_mask_keeps_the_columns_between_its_bounds(width):
    rng = np.random.default_rng(width)
    x = rng.normal(size=(ROWS, width)).astype(np.float32)
    far = np.array([-(2**30), -1000, -1, 0, 1, width - 1, width, width + 1, 2**31 - 1], np.int32)
    for draw in range(20):
        near = rng.integers(-3, width + 4, (2, ROWS), dtype=np.int32)
        first, end = near if draw % 2 else np.where(rng.random((2, ROWS)) < 0.3, rng.choice(far, (2, ROWS)), near)
        at = np.arange(width)
        want = np.where((at >= first[:, None]) & (at < end[:, None]), x, -np.inf)
        np.testing.assert_array_equal(select(jnp.asarray(x), jnp.asarray(first), jnp.asarray(end), -np.inf), want)
