"""The flash contract by cuDNN, where one of its kernels can do it: a baseline and a cross-check, not a way to train.

cuDNN knows two masks, none and causal with an optional window. The contract's ranges are data, so this adapter reads
them on the host, cuts out the rows and keys that take part, and asks whether the rest is one of the two:

    every row sees every key                       the whole, no mask
    row i sees keys 0 .. i                         causal: the diagonal step of a ring
    row i sees keys i - W + 1 .. i                 causal with a window of W
    every row sees keys a .. b - 1                 K and V cut: the "front half of K" step
    rows r .. s - 1 see one of these, others none  Q cut too: the "back half of Q" step

Anything else raises NotImplementedError, and so do ranges that are traced, as they are in a ring under jit. Ranges that
a jitted function closes over are constants and are fine.

cuDNN's results are bfloat16 (float16 for such inputs): out, dq, dk and dv are float32 here as the contract says, but
they have been rounded once. The carry is merged and dq added by XLA after the kernel, passes over memory that the other
implementations do without; time cuDNN by `forward` and `backward`.

The backward of the contract is given delta, where cuDNN wants `out` and sums delta = rowsum(dout * out) itself. Any
`out` with that sum will do, since nothing else reads it: `with_delta` makes one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from zigzag_jax.kernels.flash.contract import Carry, Implementation, Settings
from zigzag_jax.ranges import KeyRange

OTHERS = "the other implementations can"


class Block(NamedTuple):
    """Work that is one cuDNN call: these rows see these keys, under a causal mask or none; no other row sees any."""

    rows: slice
    keys: slice
    causal: bool
    """Row i of the cut sees keys up to i of the cut."""
    window: int | None
    """With causal: a row sees itself and the window - 1 keys before."""


def recognise(keys: KeyRange, key_rows: int) -> Block:
    """The block that these concrete ranges over `key_rows` keys are; NotImplementedError where they are none.

    >>> stop = np.array([[0, 0, 5, 5]], np.int32)
    >>> recognise(KeyRange(0 * stop + 2, stop), key_rows=8)
    Block(rows=slice(2, 4, None), keys=slice(2, 5, None), causal=False, window=None)
    >>> recognise(KeyRange(np.array([[0, 0, 1, 2]]), np.array([[1, 2, 3, 4]])), key_rows=4)
    Block(rows=slice(0, 4, None), keys=slice(0, 4, None), causal=True, window=2)
    """
    if any(isinstance(x, Tracer) for x in keys):
        raise NotImplementedError(f"'cudnn' needs key ranges that are constants, got traced ones; {OTHERS}")
    start, stop = (np.clip(np.asarray(x), 0, key_rows) for x in keys)
    seen = stop > start
    start, stop = np.where(seen, start, 0), np.where(seen, stop, 0)  # where an empty range lies says nothing
    if (differs := ((start != start[:1]) | (stop != stop[:1])).any(axis=1)).any():
        raise NotImplementedError(
            f"'cudnn' needs one range for all batch rows, got row {np.argmax(differs)} unlike row 0; {OTHERS}"
        )
    live = np.flatnonzero(seen[0])
    if not live.size:
        return Block(slice(0, 0), slice(0, 0), causal=False, window=None)
    first, end = int(live[0]), int(live[-1]) + 1
    if live.size < end - first:
        gap = first + int(np.argmin(seen[0, first:end]))
        raise NotImplementedError(
            f"'cudnn' needs rows that see keys to be neighbours, got row {gap} that sees none among them; {OTHERS}"
        )
    start, stop, count = start[0, first:end], stop[0, first:end], end - first
    low, high, window = int(start[0]), int(stop[-1]), int(np.max(stop - start))
    rows, cut = slice(first, end), slice(low, high)
    whole = (start == low) & (stop == high)
    if whole.all():
        return Block(rows, cut, causal=False, window=None)
    at = low + 1 + np.arange(count)
    causal = (stop == at) & (start == np.maximum(low, at - window))
    if causal.all():
        return Block(rows, cut, causal=True, window=window if window < count else None)
    # the first row, the one that rules out the second of the two, and the last
    shown = sorted({0, max(int(np.argmin(whole)), int(np.argmin(causal))), count - 1})
    found = ", ".join(f"row {first + i} that sees [{start[i]}, {stop[i]})" for i in shown)
    raise NotImplementedError(
        f"'cudnn' needs ranges that are one rectangle, or causal with or without a window, got {found}; {OTHERS}"
    )


def _jax_cudnn():
    """The module of JAX's cuDNN primitives, imported when used: it is private, and a baseline must not break an import.

    jax 0.11.2: jax.nn.dot_product_attention wants D == E and has no way to give cuDNN the lse of a whole ring; these
    primitives do both. A public function that does lets this import go.
    """
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


def _static(q, scale: float, causal: bool, window: int | None):
    """The arguments that forward and backward share: (operands that are not used, parameters)."""
    jax_cudnn = _jax_cudnn()
    mask = jax_cudnn.MaskType.CAUSAL if causal else jax_cudnn.MaskType.NO_MASK
    parameters = {
        "scale": scale, "seed": 42, "dropout_rate": 0.0, "variadic_args": (False, False), "mask_type": mask,
        "layout": jax_cudnn.AttentionLayout.BTNH.value, "sliding_window_length": window,
    }  # fmt: skip
    if jax.__version_info__ >= (0, 12):
        parameters["score_mod"] = None
    # bias, q and kv lengths, q and kv offsets, two page tables
    return [jnp.zeros(0, q.dtype)] * 7, parameters


def forward(q, k, v, *, scale: float, causal: bool, window: int | None = None) -> tuple[jax.Array, jax.Array]:
    """CuDNN itself: out [B, Sq, H, E] in q's dtype, lse float32 [B, H, Sq] (natural log)."""
    unused, static = _static(q, scale, causal, window)
    out, lse = _jax_cudnn()._dot_product_attention_fwd_p_wrapper.bind(q, k, v, *unused, is_training=True, **static)
    return out, lse


def backward(
    q, k, v, out, lse, dout, *, scale: float, causal: bool, window: int | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """CuDNN itself: dq, dk, dv in q's dtype, from forward's results and dout."""
    unused, static = _static(q, scale, causal, window)
    bind = _jax_cudnn()._dot_product_attention_bwd_p_wrapper.bind
    dq, dk, dv = bind(q, k, v, *unused, lse, out, dout, **static)
    return dq, dk, dv


def with_delta(dout, delta) -> tuple[jax.Array, jax.Array]:
    """(dout, out) [B, Sq, H, E] in dout's dtype with rowsum(dout * out) = delta [B, H, Sq]; out is nothing else.

    In real numbers out = dout * delta / rowsum(dout * dout). Rounded to bfloat16 its sum would be off by up to 2^-8 of
    delta, so the first half of the columns carries delta, and the second half what rounding the first has lost: 2^-16
    of delta at most, 2^-22 in L2 for normal random numbers. (An honest `out`, rounded, is off by up to 2^-8 of the sum
    of |dout * out|, which is more than |delta|: this is the better one.) Where one half of a dout is zero there is no
    second try, and the bound is 2^-8. In float16 the numbers end at 2^-14: 2^-14 in L2, with or without second try.

    A row with dout 0 and delta not 0, which is a cotangent of lse alone, has no such out. Its dout becomes 2^-16 of
    delta in every column, less than what cuDNN's rounding of p to bfloat16 does to the gradients; float16 cannot hold
    it for |delta| < 2^-9, and loses that row's gradient.
    """
    half, exponent, digits = dout.shape[3] // 2, jnp.finfo(dout.dtype).nexp, jnp.finfo(dout.dtype).nmant
    most = float(jnp.finfo(dout.dtype).max)
    delta = delta.swapaxes(1, 2)[..., None]
    zero = jnp.all(dout == 0, axis=-1, keepdims=True)
    dout = jnp.where(zero, (2.0**-16 * jnp.abs(delta)).astype(dout.dtype), dout)
    wide = dout.astype(jnp.float32)
    top = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
    top = jnp.where(top > 0, top, 1.0)  # gradients can be as small as 1e-20, whose squares are 0 in float32

    def carry(target, columns):
        unit = wide[..., columns] / top
        square = jnp.sum(unit * unit, axis=-1, keepdims=True)
        part = unit * jnp.where(square > 0, target / jnp.where(square > 0, square * top, 1.0), 0.0)
        # not a cast there and back, which XLA may leave out
        return lax.reduce_precision(jnp.clip(part, -most, most), exponent, digits)

    first = carry(delta, slice(half))
    lost = delta - jnp.sum(wide[..., :half] * first, axis=-1, keepdims=True)
    return dout, jnp.concatenate([first, carry(lost, slice(half, None))], axis=-1).astype(dout.dtype)


def limits(q, k, v, settings: Settings) -> str | None:
    """See contract.Limits: what JAX's door to cuDNN lets through; an old cuDNN or a small GPU may still refuse."""
    if settings.softcap is not None:
        return "no softcap"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return "bfloat16 or float16"
    if any(x.shape[3] % 8 or x.shape[3] > 256 for x in (q, v)):
        return "head dims that are multiples of 8 and at most 256"
    return None


def flash_fwd(q, k, v, keys: KeyRange, settings: Settings, carry: Carry | None, out_dtype):
    """See contract.py."""
    rows, cut, causal, window = block = recognise(keys, k.shape[1])
    (batch, length, heads, _), out_dim = q.shape, v.shape[3]
    if carry is None:
        carry = Carry(jnp.zeros((batch, length, heads, out_dim)), jnp.full((batch, heads, length), -jnp.inf))
    if block.rows.stop == 0:
        return carry.out.astype(out_dtype), carry.lse
    out, lse = forward(q[:, rows], k[:, cut], v[:, cut], scale=settings.scale, causal=causal, window=window)
    old_out, old_lse = carry.out[:, rows], carry.lse[:, :, rows]
    both = jnp.logaddexp(old_lse, lse)  # finite: every row of the block sees a key

    def share(part):
        return jnp.exp(part - both).swapaxes(1, 2)[..., None]

    out = share(old_lse) * old_out + share(lse) * out.astype(jnp.float32)
    return carry.out.at[:, rows].set(out).astype(out_dtype), carry.lse.at[:, :, rows].set(both)


def flash_bwd(q, k, v, lse, delta, dout, keys: KeyRange, settings: Settings, dq, deterministic: bool):
    """See contract.py."""
    if deterministic:
        # XLA asks cuDNN for it where the whole program is compiled with xla_gpu_deterministic_ops; a call cannot
        raise NotImplementedError(f"'cudnn' needs deterministic=False, got True; {OTHERS}")
    rows, cut, causal, window = block = recognise(keys, k.shape[1])
    dq = jnp.zeros(q.shape, jnp.float32) if dq is None else dq
    dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    if block.rows.stop == 0:
        return dq, dk, dv
    dout, out = with_delta(dout[:, rows], delta[:, :, rows])
    grads = backward(
        q[:, rows], k[:, cut], v[:, cut], out, lse[:, :, rows], dout,
        scale=settings.scale, causal=causal, window=window,
    )  # fmt: skip
    own = [x.astype(jnp.float32) for x in grads]
    return dq.at[:, rows].add(own[0]), dk.at[:, cut].set(own[1]), dv.at[:, cut].set(own[2])


IMPLEMENTATION = Implementation(flash_fwd, flash_bwd, limits)
