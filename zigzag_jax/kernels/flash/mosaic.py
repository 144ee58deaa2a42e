"""The flash contract on Hopper GPUs: which kernels run with which tuning, and lengths that are no whole tiles.

Kernels see whole tiles only. Other lengths are padded here, which copies; local lengths that are multiples of 128 cost
nothing.
"""

import functools

import jax
import jax.numpy as jnp

from zigzag_jax.kernels.flash import mosaic_bwd, mosaic_fwd, mosaic_items, mosaic_zeros
from zigzag_jax.kernels.flash.contract import Carry, Implementation, Settings, SplitKeys
from zigzag_jax.kernels.flash.mosaic_tuning import HOPPER
from zigzag_jax.kernels.flash.mosaic_walk import QUERY_TILE
from zigzag_jax.ranges import KeyRange, clip_keys, pad_rows


def limits(q, k, v, settings: Settings) -> str | None:
    """See contract.Limits."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return "bfloat16 or float16"
    if (q.shape[3], v.shape[3]) not in HOPPER:
        return f"(head_dim of q and k, head_dim of v) among {', '.join(map(str, HOPPER))}"
    if settings.scale <= 0:  # the maximum of the scores is taken before they are scaled
        return "a scale > 0"
    if 0 in (*q.shape, *k.shape):
        return "arrays that are not empty"
    return None


def takes_split(q, k: SplitKeys, v) -> bool:
    """See contract.TakesSplit."""
    return k.shared.shape[2] == HOPPER[q.shape[3], v.shape[3]].shared


# under jit, so that calls outside of any, as in a notebook, compile a kernel once
@functools.partial(jax.jit, static_argnames=("settings", "out_dtype", "tuning"), inline=True)
def flash_fwd(q, k, v, keys: KeyRange, settings: Settings, carry: Carry | None, out_dtype, *, tuning=None):
    """The contract's forward; see contract.Forward. `tuning` in the place of the table's."""
    tuning, tile = tuning or HOPPER[q.shape[3], v.shape[3]].forward, mosaic_items.QUERY_TILE
    rows, key_rows = q.shape[1], k.shape[1]
    keys = pad_rows(clip_keys(keys, key_rows), tile)
    if carry is not None:
        carry = Carry(_pad(carry.out, 1, tile), _pad(carry.lse, 2, tile))
    k, v = jax.tree.map(lambda x: _pad(x, 1, tuning.key_tile), (k, v))
    out, lse = mosaic_fwd.flash_fwd(_pad(q, 1, tile), k, v, keys, settings, carry, out_dtype, tuning)
    return out[:, :rows], lse[:, :, :rows]


@functools.partial(jax.jit, static_argnames=("settings", "deterministic"), inline=True)
def flash_bwd(q, k, v, lse, delta, dout, keys: KeyRange, settings: Settings, dq, deterministic: bool):
    """The contract's backward; see contract.Backward."""
    tuning, tile = HOPPER[q.shape[3], v.shape[3]].backward, QUERY_TILE
    rows, key_rows = q.shape[1], k.shape[1]
    keys = pad_rows(clip_keys(keys, key_rows), tile)
    q, dout = (_pad(x, 1, tile) for x in (q, dout))
    dq = mosaic_zeros.zeros(q.shape) if dq is None else _pad(dq, 1, tile)
    lse, delta = (_pad(x, 2, tile) for x in (lse, delta))
    k, v = (_pad(x, 1, tuning.key_tile) for x in (k, v))
    dq, dk, dv = mosaic_bwd.flash_bwd(q, k, v, lse, delta, dout, keys, settings, dq, deterministic, tuning)
    return dq[:, :rows], dk[:, :key_rows], dv[:, :key_rows]


def _pad(x, axis: int, tile: int):
    """Zeros up to a whole number of tiles; x itself where it is one."""
    extra = -x.shape[axis] % tile
    return jnp.pad(x, [(0, extra if a == axis else 0) for a in range(x.ndim)]) if extra else x


IMPLEMENTATION = Implementation(flash_fwd, flash_bwd, limits, takes_split)
