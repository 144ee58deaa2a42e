"""The contract of the grouped matmul: every group of rows of x meets its own matrix.

    x [M, k], w [G, k, n], group_sizes int32 [G]  ->  y [M, n]
    y[i] = x[i] @ w[g] for the rows i of group g        groups lie one after another from row 0
    y[i] = 0           for the rows past the sum of the sizes

x and w have one dtype (bfloat16, float16 or float32); sums are float32, y has `out_dtype` (default x's). The gradients:

    dx[i] = dy[i] @ w[g]^T in x's dtype, zero past the sum          dw[g] = x[rows of g]^T @ dy[rows of g] in w's dtype

Rows past the sum may hold anything, nan too, and reach no result. A nan in one group's rows or matrix reaches that
group only.

**Runs.** Rows that arrive from R devices, M / R from each and each lot sorted by expert, are used where they lie, with
group_sizes int32 [R, G]:

    rows   0 ............... M/R ............... 2M/R ......
           | g0 | g1 g1 | -  | g0 g0 | g1 | -  - |           -  past the sum of its run: as above

Run r begins at row r M / R; group g of every run meets matrix g, and dw[g] is one sum over all of them, in float32.
"""

import functools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from zigzag_jax.kernels.dtypes import DTYPE_NAMES, DTYPES

PIECE = 64  # values of 2 bytes in a piece of 128 bytes, a row of a tile in shared memory


class Product(Protocol):
    """Rows [M, a] times matrices [G, a, b] (or [G, b, a] with `transposed`), group by group: [M, b] in out_dtype.

    group_sizes is [G], or [R, G] for runs.
    """

    def __call__(self, rows, matrices, group_sizes, *, transposed: bool, out_dtype) -> jax.Array: ...


class OuterProduct(Protocol):
    """left [M, a] and right [M, b], summed over each group's rows in all runs: [G, a, b] in out_dtype."""

    def __call__(self, left, right, group_sizes, *, out_dtype) -> jax.Array: ...


class Limits(Protocol):
    """Why an implementation cannot take arguments of this kind (shapes and dtypes only), or None where it can."""

    def __call__(self, x, w) -> str | None: ...


def no_limits(x, w) -> str | None:
    """The limits of an implementation that takes whatever the contract allows."""
    return None


def narrow_limits(x, w) -> str | None:
    """The limits of kernels for tensor cores, which load rows by pieces."""
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return "bfloat16 or float16"
    if 0 in (*x.shape, *w.shape):
        return "arrays that are not empty"
    if w.shape[1] % PIECE or w.shape[2] % PIECE:
        return f"k and n that are multiples of {PIECE}"
    return None


class Implementation(NamedTuple):
    """A value of the table in kernels/__init__.py: the forward and dx are `product`, dw is `outer`.

    One rule says for all three what is out of reach.
    """

    product: Product
    outer: OuterProduct
    limits: Limits = no_limits


def check(x, w, group_sizes) -> None:
    """ValueError unless the arguments fit the contract."""
    if x.ndim != 2 or w.ndim != 3 or group_sizes.ndim not in (1, 2):
        raise ValueError(
            "x, w and group_sizes must be [M, k], [G, k, n] and [G] or [R, G], got shapes "
            f"{list(x.shape)}, {list(w.shape)} and {list(group_sizes.shape)}"
        )
    if x.shape[1] != w.shape[1]:
        raise ValueError(f"x [M, k] and w [G, k, n] must agree in k, got {x.shape[1]} and {w.shape[1]}")
    if w.shape[0] != group_sizes.shape[-1]:
        raise ValueError(f"w and group_sizes must agree in G, got {w.shape[0]} and {group_sizes.shape[-1]}")
    if group_sizes.ndim == 2 and (not group_sizes.shape[0] or x.shape[0] % group_sizes.shape[0]):
        raise ValueError(f"the runs of group_sizes [R, G] must divide M = {x.shape[0]}, got R = {group_sizes.shape[0]}")
    if group_sizes.dtype != jnp.int32:
        raise ValueError(f"group_sizes must be int32, got {group_sizes.dtype}")
    if x.dtype not in DTYPES or x.dtype != w.dtype:
        raise ValueError(f"x and w must both be {DTYPE_NAMES}, got {x.dtype} and {w.dtype}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def differentiable(implementation: Implementation, out_dtype, x, w, group_sizes) -> jax.Array:
    """The product of checked arguments, with the gradients of the contract."""
    return implementation.product(x, w, group_sizes, transposed=False, out_dtype=out_dtype)


def _fwd(implementation, out_dtype, x, w, group_sizes):
    return differentiable(implementation, out_dtype, x, w, group_sizes), (x, w, group_sizes)


def _bwd(implementation, out_dtype, residuals, dy):
    del out_dtype
    x, w, group_sizes = residuals
    dy = dy.astype(x.dtype)
    dx = implementation.product(dy, w, group_sizes, transposed=True, out_dtype=x.dtype)
    return dx, implementation.outer(x, dy, group_sizes, out_dtype=w.dtype), None


differentiable.defvjp(_fwd, _bwd)
