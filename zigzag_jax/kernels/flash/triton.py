"""The flash contract in Pallas with the Triton lowering: NVIDIA GPUs that are not Hopper, and CPUs by interpretation.

FlashAttention-2 (Dao 2023): a block of threads holds one tile and streams the tiles of the other side. Here *which*
tiles is data. The forward and dq find, from the ranges of the rows they hold, the key tiles that any row sees; dk and
dv have, for each key tile, the query rows that see it. The tiles at the rim of what is seen go through a loop with a
mask, those inside through one without, and what nobody sees is not read:

    start = 0, stop = row + 1           . not visited
        m . . . .                       m visited with a mask
        w m . . .                       w seen whole, no mask
        w w m . .

Heads that are no power of two are cut in two (192 = 128 + 64), rows that do not exist are masked in loads and stores:
q, k and v are never copied. No limit on sizes: Pallas counts in 64 bits where an array is larger than 4 GiB.

Files: triton_tuning (sizes as data), triton_tiles (what the kernels share), triton_fwd, triton_bwd.
"""

from zigzag_jax.kernels.flash import triton_bwd, triton_fwd
from zigzag_jax.kernels.flash.contract import Carry, Implementation, Settings
from zigzag_jax.kernels.flash.triton_tiles import width
from zigzag_jax.kernels.flash.triton_tuning import Tuning, choose
from zigzag_jax.ranges import KeyRange

MAX_HEAD_DIM = 256


def _tuning(q, v) -> Tuning:
    return choose(width(q.shape[3]) + width(v.shape[3]), q.dtype.itemsize)


def flash_fwd(
    q, k, v, keys: KeyRange, settings: Settings, carry: Carry | None, out_dtype, tuning: Tuning | None = None
):
    """See contract.py. The carry is continued in place where out_dtype is float32, its lse always."""
    tile = (tuning or _tuning(q, v)).fwd
    return triton_fwd.forward(q, k, v, keys, carry, settings=settings, out_dtype=out_dtype, tile=tile)


def flash_bwd(
    q, k, v, lse, delta, dout, keys: KeyRange, settings: Settings, dq, deterministic: bool,
    tuning: Tuning | None = None,
):  # fmt: skip
    """See contract.py. Adds to `dq` in place. The order of the sums is fixed: `deterministic` changes nothing."""
    del deterministic
    return triton_bwd.backward(
        q, k, v, lse, delta, dout, keys, dq, settings=settings, tuning=tuning or _tuning(q, v)
    )  # fmt: skip


def limits(q, k, v, settings: Settings) -> str | None:
    """See contract.py."""
    if max(q.shape[3], v.shape[3]) > MAX_HEAD_DIM:
        return f"head_dim <= {MAX_HEAD_DIM}"
    if 0 in (*q.shape, *k.shape, *v.shape):
        return "at least one row, head and column"
    return None


IMPLEMENTATION = Implementation(flash_fwd, flash_bwd, limits)
