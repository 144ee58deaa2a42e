"""The grouped contract through jax-triton, for NVIDIA GPUs that are not Hopper: which tiles, and what it cannot take.

    product    triton_kernels.rows_kernel: forward, and with transposed matrices dx
    outer      triton_kernels.outer_kernel: dw, one sum over all runs

jax-triton and triton are the extra `triton`; triton_kernels.py, which needs both, is imported by the first call.
"""

import functools
import importlib.util
from typing import NamedTuple

import jax
import jax.numpy as jnp

from zigzag_jax.kernels.grouped.contract import Implementation, narrow_limits
from zigzag_jax.kernels.grouped.row_tiles import row_tiles, run_bounds, run_length


class Tile(NamedTuple):
    """What a block of threads computes, and how."""

    rows: int
    """Of the result."""
    columns: int
    """Of the result."""
    step: int
    """Of the contraction, at a time."""
    warps: int
    """Warps a block."""
    stages: int
    """Steps in shared memory: (rows + columns) * step * 2 bytes each."""


WIDE = Tile(128, 256, 64, 8, 4)
"""192 KiB: Hopper and data-center Blackwell have 227."""
NARROW = Tile(128, 128, 32, 4, 4)
"""64 KiB: Ada and consumer Blackwell have 99, Ampere 99 or 163."""
_WIDE = ("9.0", "10.0", "10.3")  # compute capabilities


def _capability() -> str:
    """Of the default device; a CPU has none."""
    return str(getattr(jax.devices()[0], "compute_capability", ""))


def tile() -> Tile:
    """The tile for the default device."""
    return WIDE if _capability() in _WIDE else NARROW


@functools.cache
def _missing() -> str | None:
    if all(importlib.util.find_spec(name) for name in ("jax_triton", "triton")):
        return None
    return "jax-triton and triton (the extra 'triton': pip install jax-triton==0.3.1)"


def _too_old() -> str | None:
    """On a GPU without their tensor cores the kernels would compile, spill, and be far slower than plain XLA."""
    major, *_ = _capability().split(".")
    if jax.devices()[0].platform != "gpu" or (major.isdigit() and int(major) >= 8):
        return None
    return "an NVIDIA GPU of compute capability 8.0 or newer"


def limits(x, w) -> str | None:
    """See contract.Limits."""
    return narrow_limits(x, w) or _missing() or _too_old()


# under jit, so that calls outside of any, as in a notebook, compile a kernel once
@functools.partial(jax.jit, static_argnames=("transposed", "out_dtype"), inline=True)
def product(rows, matrices, group_sizes, *, transposed: bool, out_dtype):
    """See contract.Product."""
    from zigzag_jax.kernels.grouped import triton_kernels

    size = tile()
    tiles = row_tiles(group_sizes, len(rows), run_length(group_sizes, len(rows)), tile=size.rows, align=1)
    return triton_kernels.product(rows, matrices, tiles, transposed, out_dtype, size)


@functools.partial(jax.jit, static_argnames="out_dtype", inline=True)
def outer(left, right, group_sizes, *, out_dtype):
    """See contract.OuterProduct."""
    from zigzag_jax.kernels.grouped import triton_kernels

    edges = jnp.stack(run_bounds(group_sizes, len(left)))
    return triton_kernels.outer(left, right, edges, out_dtype, tile())


IMPLEMENTATION = Implementation(product, outer, limits)
