"""The contract every flash kernel keeps: shapes, dtypes, units, and the errors for what breaks it.

    q [B, Sq, H, D], k [B, Sk, K, D], v [B, Sk, K, E]     bfloat16, float16 or float32, all three alike; H % K == 0
    keys = KeyRange(start, stop)                          int32 [B or 1, Sq]: row i sees keys start[i] <= j < stop[i]
                                                          that exist; **neither may decrease along Sq**
    out [B, Sq, H, E], lse [B, H, Sq]                     sums in float32

k may come in two parts, SplitKeys(own [B, Sk, K, N], shared [B, Sk, P]) with N + P = D: every head's key is its own
part, then the shared one (the rotary key of multi-head latent attention). The backward gives the gradient of the whole
keys, and SplitKeys.split that of the parts, the shared one's summed over heads.

D may differ from E. Query head h reads key head h // (H // K) (GQA; K == 1 is MQA). LSE is the **natural** logarithm of
the softmax denominator, float32, -inf for a row that saw nothing; that row's out is 0. Scores are softcap * tanh(scale
* q.k / softcap) where softcap is given.

`carry = (out, lse)`, both float32, continues the online softmax of an earlier call over other keys: the result is that
of one call over both. An attention sink is a first carry of (0, sink logit).

The backward takes the lse of the *whole* softmax (all ring steps) and delta = rowsum(dout * out) - dlse, [B, H, Sq], so
that every call yields its own keys' share of the gradient. It adds into `dq`, the derivative with respect to q with the
scale applied exactly once.

Ranges are data and not checked: kernels read the first and the last row of a tile and trust those between. Rows may see
nothing (stop <= start), and bounds may lie outside of [0, Sk].

An implementation raises NotImplementedError for what it cannot do; ValueError means that the caller broke the contract.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.core import Tracer

from zigzag_jax.kernels.dtypes import DTYPE_NAMES, DTYPES
from zigzag_jax.ranges import KeyRange

LOG2E = math.log2(math.e)  # the kernels' exponents are base 2 inside


class Carry(NamedTuple):
    """A softmax under way: out float32 [B, Sq, H, E], divided by its denominator, and lse float32 [B, H, Sq]."""

    out: jax.Array
    lse: jax.Array


class SplitKeys(NamedTuple):
    """Keys of which a part is the same for all heads, in the place of a k that has it in every head.

    The two have one dtype, or are the two parts of a gradient.
    """

    own: jax.Array
    """[B, Sk, K, N]: the first columns of each head."""
    shared: jax.Array
    """[B, Sk, P]: the last columns of every head."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[B, Sk, K, N + P], that of `whole`."""
        return (*self.own.shape[:3], self.own.shape[3] + self.shared.shape[2])

    @property
    def ndim(self) -> int:
        """Axes of `whole`."""
        return self.own.ndim

    @property
    def dtype(self):
        """Of both parts."""
        return self.own.dtype

    def whole(self) -> jax.Array:
        """K [B, Sk, K, N + P]: a copy, with the shared part in every head."""
        shape = (*self.own.shape[:3], self.shared.shape[2])
        return jnp.concatenate([self.own, jnp.broadcast_to(self.shared[:, :, None], shape)], axis=3)

    def split(self, dk) -> "SplitKeys":
        """The gradient of the two parts from that of `whole`, the shared part's summed over heads in dk's dtype."""
        columns = self.own.shape[3]
        return SplitKeys(dk[..., :columns], jnp.sum(dk[..., columns:], axis=2))


class Settings(NamedTuple):
    """What is static in a call and the same in its forward and backward."""

    scale: float
    softcap: float | None


class Forward(Protocol):
    """One implementation's forward: arguments already checked; returns (out in out_dtype, lse).

    k is a SplitKeys only where the implementation says that it takes it.
    """

    def __call__(
        self, q, k, v, keys: KeyRange, settings: Settings, carry: Carry | None, out_dtype
    ) -> tuple[jax.Array, jax.Array]: ...


class Backward(Protocol):
    """One implementation's backward: arguments already checked, k whole; returns float32 (dq, dk, dv)."""

    def __call__(
        self, q, k, v, lse, delta, dout, keys: KeyRange, settings: Settings, dq, deterministic: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]: ...


class TakesSplit(Protocol):
    """Whether an implementation's forward reads a SplitKeys' parts where they are (shapes and dtypes only).

    No backward does: on Hopper two tiles of K are 9% slower and one tile loaded in pieces 4%, more than a copy of k.
    """

    def __call__(self, q, k: SplitKeys, v) -> bool: ...


class Limits(Protocol):
    """Why an implementation cannot take arguments of this kind (shapes and dtypes only), or None where it can."""

    def __call__(self, q, k, v, settings: Settings) -> str | None: ...


def no_limits(q, k, v, settings: Settings) -> str | None:
    """The limits of an implementation that takes whatever the contract allows."""
    return None


def never_split(q, k: SplitKeys, v) -> bool:
    """Of an implementation whose forward is given whole keys too."""
    return False


class Implementation(NamedTuple):
    """A value of the table in kernels/__init__.py.

    Forward and backward take the same arguments, so one rule says for both what is out of reach.
    """

    fwd: Forward
    bwd: Backward
    limits: Limits = no_limits
    takes_split: TakesSplit = never_split


def _check_shape(name: str, x, shape: tuple[int, ...], letters: str) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must be {letters} = {list(shape)}, got {list(x.shape)}")


def _check_dtype(name: str, x, dtype) -> None:
    if x.dtype != dtype:
        raise ValueError(f"{name} must be {jnp.dtype(dtype).name}, got {x.dtype}")


def check_static_number(name: str, value, rule: Callable[[float], bool], words: str) -> float:
    """`value` as a float. ValueError where it is traced, no number, not finite or against the rule."""
    if isinstance(value, Tracer):
        raise ValueError(f"{name} must be a static Python number, got a traced value {value}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be {words}, got {value!r}") from None
    if not (math.isfinite(number) and rule(number)):
        raise ValueError(f"{name} must be {words}, got {value!r}")
    return number


def check_qkv(q, k, v) -> None:
    """ValueError unless q, k, v fit the contract; k is an array or a SplitKeys."""
    if isinstance(k, SplitKeys):
        _check_split(k)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be [batch, sequence, heads, head_dim], got shape {list(x.shape)}")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} must be {DTYPE_NAMES}, got {x.dtype}")
        if x.dtype != q.dtype:
            raise ValueError(f"q, k and v must have one dtype, got {name} {x.dtype} beside q {q.dtype}")
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"q, k and v must have one batch size, got {name} {x.shape[0]} beside q {q.shape[0]}")
    if k.shape[1:3] != v.shape[1:3]:
        raise ValueError(f"k and v must agree in [sequence, heads], got {list(k.shape[1:3])} and {list(v.shape[1:3])}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must have one head_dim, got {q.shape[3]} and {k.shape[3]}")
    if not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(f"q heads must be a multiple of kv heads, got {q.shape[2]} and {k.shape[2]}")


def _check_split(k: SplitKeys) -> None:
    own, shared = k
    if own.ndim != 4:
        raise ValueError(f"k.own must be [batch, sequence, heads, columns], got shape {list(own.shape)}")
    if shared.ndim != 3 or shared.shape[:2] != own.shape[:2] or not shared.shape[2]:
        raise ValueError(f"k.shared must be [B, Sk, P] with B, Sk = {list(own.shape[:2])}, got {list(shared.shape)}")
    _check_dtype("k.shared", shared, own.dtype)


def check_settings(scale, softcap) -> Settings:
    """Static settings as floats. ValueError where one is traced or out of range."""
    scale = check_static_number("scale", scale, lambda x: True, "a finite number")
    if softcap is not None:
        softcap = check_static_number("softcap", softcap, lambda x: x > 0, "a number > 0 or None")
    return Settings(scale, softcap)


def check_out_dtype(out_dtype) -> None:
    """ValueError unless it is one of the contract's dtypes."""
    if jnp.dtype(out_dtype) not in DTYPES:
        raise ValueError(f"out_dtype must be {DTYPE_NAMES}, got {jnp.dtype(out_dtype).name}")


def check_keys(keys: KeyRange, batch: int, rows: int) -> None:
    """ValueError unless the ranges are int32 [B or 1, Sq]."""
    for name, x in zip(("keys.start", "keys.stop"), keys, strict=True):
        _check_dtype(name, x, jnp.int32)
        if x.ndim != 2 or x.shape[0] not in (1, batch) or x.shape[1] != rows:
            raise ValueError(f"{name} must be [B or 1, Sq] with B = {batch}, Sq = {rows}, got {list(x.shape)}")
    if keys.start.shape != keys.stop.shape:
        raise ValueError(
            f"keys.start and keys.stop must have one shape, got {list(keys.start.shape)} and {list(keys.stop.shape)}"
        )


def check_carry(carry, q, v) -> Carry:
    """The carry as a Carry. ValueError unless it is (out float32 [B, Sq, H, E], lse float32 [B, H, Sq])."""
    (batch, rows, heads, _), out_dim = q.shape, v.shape[3]
    if len(carry) != 2:
        raise ValueError(f"carry must be (out, lse), got {len(carry)} values")
    out, lse = carry
    _check_shape("carry out", out, (batch, rows, heads, out_dim), "[B, Sq, H, E]")
    _check_shape("carry lse", lse, (batch, heads, rows), "[B, H, Sq]")
    _check_dtype("carry out", out, jnp.float32)
    _check_dtype("carry lse", lse, jnp.float32)
    return Carry(out, lse)


def check_backward(q, v, lse, delta, dout, dq) -> None:
    """ValueError unless the backward's own arguments fit q and v."""
    (batch, rows, heads, _), out_dim = q.shape, v.shape[3]
    for name, x in (("lse", lse), ("delta", delta)):
        _check_shape(name, x, (batch, heads, rows), "[B, H, Sq]")
        _check_dtype(name, x, jnp.float32)
    _check_shape("dout", dout, (batch, rows, heads, out_dim), "[B, Sq, H, E]")
    _check_dtype("dout", dout, q.dtype)
    if dq is not None:
        _check_shape("dq", dq, tuple(q.shape), "[B, Sq, H, D]")
        _check_dtype("dq", dq, jnp.float32)
