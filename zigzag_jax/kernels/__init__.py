"""The kernels, and which implementation of each runs.

    flash_fwd, flash_bwd     attention of one block of queries over one block of keys (flash/contract.py)
    grouped_matmul           the matmul of a layer of experts (grouped/contract.py)
    grouped_swiglu           their whole MLP: gate and up, SwiGLU, down (grouped/swiglu.py)

`implementation` names an entry of the tables below; None takes the best one for the default device and says in the log
which; "hopper" takes what None takes on a Hopper GPU, for a compile on a host without one. An unknown name is a
ValueError; an implementation that cannot do what is asked raises NotImplementedError: there is no silent way to a
slower one.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from zigzag_jax.kernels.flash import contract as flash_contract
from zigzag_jax.kernels.flash import cudnn, mosaic, triton
from zigzag_jax.kernels.flash import reference as flash_reference
from zigzag_jax.kernels.flash.contract import SplitKeys
from zigzag_jax.kernels.grouped import contract as grouped_contract
from zigzag_jax.kernels.grouped import mosaic as grouped_mosaic
from zigzag_jax.kernels.grouped import reference as grouped_reference
from zigzag_jax.kernels.grouped import swiglu
from zigzag_jax.kernels.grouped import triton as grouped_triton
from zigzag_jax.ranges import KeyRange

FLASH: dict[str, flash_contract.Implementation] = {
    "mosaic": mosaic.IMPLEMENTATION,
    "triton": triton.IMPLEMENTATION,
    "cudnn": cudnn.IMPLEMENTATION,
    "reference": flash_reference.IMPLEMENTATION,
}
GROUPED: dict[str, grouped_contract.Implementation] = {
    "mosaic": grouped_mosaic.IMPLEMENTATION,
    "triton": grouped_triton.IMPLEMENTATION,
    "reference": grouped_reference.IMPLEMENTATION,
}
FUSED: dict[str, swiglu.Parts] = {"mosaic": grouped_mosaic.SWIGLU}

HOPPER = "hopper"
"""As `implementation`: what None takes on a Hopper GPU."""

log = logging.getLogger(__name__)
_FLASH_ON_HOPPER, _GROUPED_ON_HOPPER = ("mosaic", "triton"), ("mosaic", "reference")  # best first


@functools.cache
def _preference() -> tuple[str, ...]:
    """Flash implementations for the default device, best first; asked at the first call and never at import."""
    if (backend := jax.default_backend()) == "gpu":
        hopper = getattr(jax.devices()[0], "compute_capability", "") == "9.0"
        return _FLASH_ON_HOPPER if hopper else ("triton",)
    if backend != "cpu":
        log.warning("zigzag_jax: no kernel for %s, using 'reference' (plain XLA, slow)", backend)
    return ("reference",)


@functools.cache
def _grouped_preference() -> tuple[str, ...]:
    """Grouped implementations for the default device, best first; plain XLA on a GPU is slow, and said to be."""
    if "mosaic" in _preference():
        return _GROUPED_ON_HOPPER
    return ("triton", "reference") if "triton" in _preference() else ("reference",)


def _candidates(name: str | None, on_hopper: tuple[str, ...], preference: Callable) -> tuple[str, ...]:
    """The implementations that `name` allows, best first."""
    if name == HOPPER:
        return on_hopper
    return (name,) if name else preference()


@functools.cache
def _say(what: str, name: str, kind: str, skipped: str) -> None:
    """Which implementation None took, once; a warning where the device has a faster one that cannot."""
    level = logging.WARNING if skipped else logging.INFO
    log.log(level, "zigzag_jax: %s by '%s' for %s%s", what, name, kind, f" ({skipped})" if skipped else "")


def check_implementation(name: str | None, table: dict) -> None:
    """ValueError where the name is neither in the table nor "hopper"."""
    if name not in (None, HOPPER, *table):
        raise ValueError(f"implementation must be None or one of {', '.join([*table, HOPPER])}, got {name!r}")


def flash_implementation(q, k, v, settings: flash_contract.Settings, name: str | None = None) -> str:
    """The name of the flash implementation that runs arrays of these shapes and dtypes.

    None takes the best one for the default device and says once in the log which. NotImplementedError where the one
    that was named, or all that this device has, cannot take them; it names those that can.
    """
    check_implementation(name, FLASH)
    candidates = _candidates(name, _FLASH_ON_HOPPER, _preference)
    reasons = {n: FLASH[n].limits(q, k, v, settings) for n in candidates}
    heads = f"{jnp.dtype(q.dtype).name} q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    for candidate, reason in reasons.items():
        if reason is None:
            if name not in FLASH:
                skipped = [f"'{n}' needs {r}" for n, r in reasons.items() if r]
                kind = f"{jnp.dtype(q.dtype).name}, head_dim {q.shape[3]}/{v.shape[3]}"
                _say("flash attention", candidate, kind, "; ".join(skipped))
            return candidate
    # cudnn is left out: it takes constant ranges only, and those of a ring are none
    others = [n for n in FLASH if n not in reasons and n != "cudnn"]
    able = [repr(n) for n in others if FLASH[n].limits(q, k, v, settings) is None]
    why = "; ".join(f"{n!r} needs {reason}" for n, reason in reasons.items())
    raise NotImplementedError(f"{why}; got {heads}; implementation={' or '.join(able)} can")


def grouped_implementation(x, w, name: str | None = None) -> str:
    """The name of the grouped_matmul implementation that runs arrays of these shapes and dtypes.

    None takes the best one for the default device and says once in the log which, as a warning where that is plain XLA
    on a GPU. NotImplementedError where the one that was named cannot take them.
    """
    check_implementation(name, GROUPED)
    kind = f"{jnp.dtype(x.dtype).name}, k {w.shape[1]}, n {w.shape[2]}"
    reasons = {n: GROUPED[n].limits(x, w) for n in _candidates(name, _GROUPED_ON_HOPPER, _grouped_preference)}
    for candidate, reason in reasons.items():
        if reason is None:
            if name not in GROUPED:
                skipped = [f"'{n}' needs {r}" for n, r in reasons.items() if r]
                if candidate == "reference" and (backend := jax.default_backend()) != "cpu":
                    skipped.append(f"no other kernel for this {backend}: plain XLA, slow")
                _say("grouped_matmul", candidate, kind, "; ".join(skipped))
            return candidate
    able = [repr(n) for n in GROUPED if n not in reasons and GROUPED[n].limits(x, w) is None]
    why = "; ".join(f"{n!r} needs {reason}" for n, reason in reasons.items())
    shapes = f"{jnp.dtype(x.dtype).name} x {list(x.shape)}, w {list(w.shape)}"
    raise NotImplementedError(f"{why}; got {shapes}; implementation={' or '.join(able)} can")


def flash_fwd(
    q, k, v, keys: KeyRange, *, scale: float, carry=None, softcap=None, out_dtype=jnp.float32, implementation=None
) -> tuple[jax.Array, jax.Array]:
    """Attention of q over the keys each row may see; the numbers' meaning is in flash/contract.py.

    Args:
      q: [B, Sq, H, D] bfloat16, float16 or float32; k [B, Sk, K, D] and v [B, Sk, K, E] of the same dtype, H % K == 0.
      k: see q; or SplitKeys(own [B, Sk, K, N], shared [B, Sk, P]), N + P = D: each head's columns, then those of all.
      v: see q.
      keys: KeyRange, int32 [B or 1, Sq]: row i sees keys start[i] <= j < stop[i]; neither may decrease along Sq.
      scale: static number that multiplies q.k.
      carry: (out float32 [B, Sq, H, E], lse float32 [B, H, Sq]) of an earlier call over other keys, or None.
      softcap: static number > 0 or None.
      out_dtype: dtype of out.
      implementation: a key of FLASH, "hopper" or None.

    Returns:
      out [B, Sq, H, E] in out_dtype and lse float32 [B, H, Sq] (natural log); 0 and -inf for a row that saw nothing.

    Raises:
      ValueError: the arguments break the contract. NotImplementedError: this implementation cannot do it.
    """
    flash_contract.check_qkv(q, k, v)
    flash_contract.check_keys(keys, q.shape[0], q.shape[1])
    flash_contract.check_out_dtype(out_dtype)
    settings = flash_contract.check_settings(scale, softcap)
    carry = None if carry is None else flash_contract.check_carry(carry, q, v)
    name = flash_implementation(q, k, v, settings, implementation)
    if isinstance(k, SplitKeys) and not FLASH[name].takes_split(q, k, v):
        k = k.whole()
    return FLASH[name].fwd(q, k, v, keys, settings, carry, jnp.dtype(out_dtype))


def flash_bwd(
    q, k, v, lse, delta, dout, keys: KeyRange, *, scale: float, dq=None, softcap=None, deterministic=False,
    implementation=None,
) -> tuple[jax.Array, Any, jax.Array]:  # fmt: skip
    """These keys' share of the gradient of a softmax whose global lse is known; see flash/contract.py.

    Args:
      q: as in flash_fwd, like k, v, keys, scale, softcap, implementation.
      k: see q.
      v: see q.
      lse: float32 [B, H, Sq], natural log of the whole softmax's denominator.
      delta: float32 [B, H, Sq] = rowsum(dout * out) - dlse.
      dout: [B, Sq, H, E] in q's dtype.
      keys: see q.
      scale: see q.
      dq: float32 [B, Sq, H, D] to add to, or None.
      softcap: see q.
      deterministic: sums in a fixed order, so that two runs on the same kind of card agree bit for bit.
      implementation: see q.

    Returns:
      dq [B, Sq, H, D], dk [B, Sk, K, D], dv [B, Sk, K, E], all float32. dk of a SplitKeys is that of its whole keys:
      its `split` makes the parts' gradients of it.

    Raises:
      ValueError: the arguments break the contract. NotImplementedError: this implementation cannot do it.
    """
    flash_contract.check_qkv(q, k, v)
    flash_contract.check_keys(keys, q.shape[0], q.shape[1])
    flash_contract.check_backward(q, v, lse, delta, dout, dq)
    settings = flash_contract.check_settings(scale, softcap)
    name = flash_implementation(q, k, v, settings, implementation)
    k = k.whole() if isinstance(k, SplitKeys) else k
    return FLASH[name].bwd(q, k, v, lse, delta, dout, keys, settings, dq, bool(deterministic))


def grouped_matmul(x, w, group_sizes, *, out_dtype=None, implementation=None) -> jax.Array:
    """Each group of rows times its own matrix, differentiable in x and w; see grouped/contract.py.

    Args:
      x: [M, k] bfloat16, float16 or float32, the rows of group 0 first, then those of group 1, ...
      w: [G, k, n] in x's dtype.
      group_sizes: int32 [G], non-negative, sum <= M; or [R, G], a row for each of R runs of M / R rows.
      out_dtype: dtype of the result, default x's.
      implementation: a key of GROUPED, "hopper" or None.

    Returns:
      [M, n], summed in float32; rows past the sum of their run's group_sizes are zero.

    Raises:
      ValueError: the arguments break the contract. NotImplementedError: this implementation cannot do it.
    """
    grouped_contract.check(x, w, group_sizes)
    name = grouped_implementation(x, w, implementation)
    return grouped_contract.differentiable(GROUPED[name], jnp.dtype(out_dtype or x.dtype), x, w, group_sizes)


def grouped_swiglu(x, gate_up, down, scale, group_sizes, *, fused=False, implementation=None) -> jax.Array:
    """down(scale * silu(x gate) * (x up)), group by group, differentiable in the first four; see grouped/swiglu.py.

    Args:
      x: [M, d] bfloat16, float16 or float32, the rows of group 0 first, then those of group 1, ...
      gate_up: [G, d, 2 f] in x's dtype: gate's columns, then up's.
      down: [G, f, d] in x's dtype.
      scale: float32 [M], the router's weight of each row.
      group_sizes: int32 [G] or [R, G], as in grouped_matmul.
      fused: by kernels that do SwiGLU on a matmul's way out, instead of grouped matmuls and passes over their results.
      implementation: a key of GROUPED (with `fused` of FUSED) or None.

    Returns:
      [M, d] in x's dtype; rows past the sum of their run's group_sizes are zero.

    Raises:
      ValueError: the arguments break the contract. NotImplementedError: this implementation cannot do it.
    """
    swiglu.check(x, gate_up, down, scale, group_sizes)
    name = grouped_implementation(x, down, implementation)  # what takes [f, d] takes [d, 2 f]
    if fused and name not in FUSED:
        raise NotImplementedError(f"fused needs an implementation among {', '.join(FUSED)}, got {name!r}")
    matmul = GROUPED[name]
    parts = FUSED[name] if fused else swiglu.unfused(matmul)
    return swiglu.differentiable(matmul, parts, x, gate_up, down, scale, group_sizes)


__all__ = [
    "FLASH", "FUSED", "GROUPED", "KeyRange", "SplitKeys", "flash_bwd", "flash_fwd", "flash_implementation",
    "grouped_implementation", "grouped_matmul", "grouped_swiglu",
]  # fmt: skip
