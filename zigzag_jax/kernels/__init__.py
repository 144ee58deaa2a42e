"""The kernels, and which implementation of each runs.

    flash_fwd, flash_bwd     attention of one block of queries over one block of keys (flash/contract.py)
    grouped_matmul           the matmul of a layer of experts (grouped/contract.py)

`implementation` names an entry of the tables below; None takes `default_implementation()`. An unknown name is a
ValueError; an implementation that cannot do what is asked raises NotImplementedError: there is no silent way to a
slower one.
"""

import functools
import logging

import jax
import jax.numpy as jnp

from zigzag_jax.kernels.flash import contract as flash_contract
from zigzag_jax.kernels.flash import reference as flash_reference
from zigzag_jax.kernels.grouped import contract as grouped_contract
from zigzag_jax.kernels.grouped import reference as grouped_reference
from zigzag_jax.ranges import KeyRange

FLASH: dict[str, flash_contract.Implementation] = {"reference": flash_reference.IMPLEMENTATION}
GROUPED: dict[str, grouped_contract.Implementation] = {"reference": grouped_reference.IMPLEMENTATION}

log = logging.getLogger(__name__)


@functools.cache
def default_implementation() -> str:
    """The implementation for the default backend, asked at the first call and never at import."""
    if (backend := jax.default_backend()) != "cpu":
        log.warning("zigzag_jax: no kernel for %s yet, using 'reference' (plain XLA, slow)", backend)
    return "reference"


def check_implementation(name: str | None, table: dict) -> None:
    """ValueError where the name is in no table."""
    if name is not None and name not in table:
        raise ValueError(f"implementation must be None or one of {', '.join(table)}, got {name!r}")


def _pick(table: dict, name: str | None):
    check_implementation(name, table)
    return table[name or default_implementation()]


def flash_fwd(
    q, k, v, keys: KeyRange, *, scale: float, carry=None, softcap=None, out_dtype=jnp.float32, implementation=None
) -> tuple[jax.Array, jax.Array]:
    """Attention of q over the keys each row may see; the numbers' meaning is in flash/contract.py.

    Args:
      q: [B, Sq, H, D] bfloat16, float16 or float32; k [B, Sk, K, D] and v [B, Sk, K, E] of the same dtype, H % K == 0.
      k: see q.
      v: see q.
      keys: KeyRange, int32 [B or 1, Sq]: row i sees keys start[i] <= j < stop[i].
      scale: static number that multiplies q.k.
      carry: (out float32 [B, Sq, H, E], lse float32 [B, H, Sq]) of an earlier call over other keys, or None.
      softcap: static number > 0 or None.
      out_dtype: dtype of out.
      implementation: a key of FLASH or None.

    Returns:
      out [B, Sq, H, E] in out_dtype and lse float32 [B, H, Sq] (natural log); 0 and -inf for a row that saw nothing.

    Raises:
      ValueError: the arguments break the contract. NotImplementedError: this implementation cannot do it.
    """
    flash_contract.check_qkv(q, k, v)
    flash_contract.check_keys(keys, q.shape[0], q.shape[1])
    settings = flash_contract.check_settings(scale, softcap)
    carry = None if carry is None else flash_contract.check_carry(carry, q, v)
    return _pick(FLASH, implementation).fwd(q, k, v, keys, settings, carry, jnp.dtype(out_dtype))


def flash_bwd(
    q, k, v, lse, delta, dout, keys: KeyRange, *, scale: float, dq=None, softcap=None, deterministic=False,
    implementation=None,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
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
      deterministic: sums in a fixed order, so that two runs agree bit for bit.
      implementation: see q.

    Returns:
      dq [B, Sq, H, D], dk [B, Sk, K, D], dv [B, Sk, K, E], all float32.

    Raises:
      ValueError: the arguments break the contract. NotImplementedError: this implementation cannot do it.
    """
    flash_contract.check_qkv(q, k, v)
    flash_contract.check_keys(keys, q.shape[0], q.shape[1])
    flash_contract.check_backward(q, v, lse, delta, dout, dq)
    settings = flash_contract.check_settings(scale, softcap)
    return _pick(FLASH, implementation).bwd(q, k, v, lse, delta, dout, keys, settings, dq, bool(deterministic))


def grouped_matmul(x, w, group_sizes, *, out_dtype=None, implementation=None) -> jax.Array:
    """Each group of rows times its own matrix, differentiable in x and w; see grouped/contract.py.

    Args:
      x: [M, k] bfloat16, float16 or float32, the rows of group 0 first, then those of group 1, ...
      w: [G, k, n] in x's dtype.
      group_sizes: int32 [G], non-negative, sum <= M.
      out_dtype: dtype of the result, default x's.
      implementation: a key of GROUPED or None.

    Returns:
      [M, n], summed in float32; rows past the sum of group_sizes are zero.

    Raises:
      ValueError: the arguments break the contract. NotImplementedError: this implementation cannot do it.
    """
    grouped_contract.check(x, w, group_sizes)
    return grouped_contract.differentiable(
        _pick(GROUPED, implementation), jnp.dtype(out_dtype or x.dtype), x, w, group_sizes
    )


__all__ = ["FLASH", "GROUPED", "KeyRange", "flash_bwd", "flash_fwd", "grouped_matmul"]
