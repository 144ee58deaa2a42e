"""The grouped contract on Hopper GPUs: which kernels run with which tuning, and what they cannot take.

    product    mosaic_rows.py: forward, and with transposed matrices dx        outer    mosaic_outer.py: dw
    SWIGLU     mosaic_swiglu.py: SwiGLU on the way out of a matmul, both ways

Where the number of rows is no multiple of 8 they are padded here, which copies; others cost nothing.
"""

import functools

import jax
import jax.numpy as jnp

from zigzag_jax.kernels.grouped import mosaic_outer, mosaic_rows, mosaic_swiglu, mosaic_tuning
from zigzag_jax.kernels.grouped.contract import Implementation, narrow_limits
from zigzag_jax.kernels.grouped.mosaic_pipeline import TILE
from zigzag_jax.kernels.grouped.row_tiles import row_tiles, run_bounds, run_length
from zigzag_jax.kernels.grouped.swiglu import Parts, kept

ROWS = 8  # TMA reads them by eights

_row_tiles = functools.partial(row_tiles, tile=TILE, align=ROWS)


# under jit, so that calls outside of any, as in a notebook, compile a kernel once
@functools.partial(jax.jit, static_argnames=("transposed", "out_dtype"), inline=True)
def product(rows, matrices, group_sizes, *, transposed: bool, out_dtype):
    """See contract.Product."""
    padded = _pad(rows)
    schedule = _row_tiles(group_sizes, padded.shape[0], run_length(group_sizes, rows.shape[0]))
    tuning = mosaic_tuning.rows(rows.shape[1])
    return mosaic_rows.product(padded, matrices, schedule, transposed, out_dtype, tuning)[: rows.shape[0]]


@functools.partial(jax.jit, static_argnames="out_dtype", inline=True)
def outer(left, right, group_sizes, *, out_dtype):
    """See contract.OuterProduct."""
    runs = run_bounds(group_sizes, left.shape[0])
    dtype, tuning = out_dtype if len(runs) == 1 else jnp.float32, mosaic_tuning.OUTER
    left, right = _pad(left), _pad(right)
    # a kernel a run, added up by XLA: the kernel does not add in place
    parts = (mosaic_outer.outer(left, right, run, dtype, tuning) for run in runs)
    return functools.reduce(jnp.add, parts).astype(out_dtype)


@functools.partial(jax.jit, static_argnames=("keep", "tuning"), inline=True)
def inward(x, gate_up, scale, group_sizes, *, keep: bool, tuning=None):
    """See swiglu.Inward; `tuning` in the place of what mosaic_tuning.py says."""
    padded, scale, schedule = _with_schedule(x, scale, group_sizes)
    tuning = tuning or (mosaic_tuning.INWARD_KEPT if keep else mosaic_tuning.INWARD)
    results = [made[: x.shape[0]] for made in mosaic_swiglu.inward(padded, gate_up, scale, schedule, keep, tuning)]
    if not keep:
        return results[0], None
    inner, hidden = kept(results)  # by one kernel: saved together
    return inner, hidden


@functools.partial(jax.jit, static_argnames="tuning", inline=True)
def outward(dy, down, hidden, scale, group_sizes, *, tuning=None):
    """See swiglu.Outward; `tuning` in the place of what mosaic_tuning.py says."""
    padded, scale, schedule = _with_schedule(dy, scale, group_sizes)
    tuning = tuning or mosaic_tuning.OUTWARD
    dhidden, parts = mosaic_swiglu.outward(padded, down, _pad(hidden), scale, schedule, tuning)
    return dhidden[: dy.shape[0]], parts.sum(axis=0)[: dy.shape[0]]


def _with_schedule(rows, scale, group_sizes):
    """Rows by eights, their scale with room for a row tile after the last, and the row tiles."""
    padded = _pad(rows)
    scale = jnp.pad(scale, (0, len(padded) - len(rows) + TILE))
    return padded, scale, _row_tiles(group_sizes, len(padded), run_length(group_sizes, len(rows)))


def _pad(x):
    """Rows up to a multiple of 8; x itself where it is one."""
    extra = -x.shape[0] % ROWS
    return jnp.pad(x, ((0, extra), (0, 0))) if extra else x


IMPLEMENTATION = Implementation(product, outer, narrow_limits)
SWIGLU = Parts(inward, outward)
