"""The contract of the experts' MLP: three matrices a group, SwiGLU between them, and a weight a row.

    x [M, d], gate_up [G, d, 2 f], down [G, f, d], scale float32 [M], group_sizes int32 [G] or [R, G]  ->  y [M, d]

    hidden = x gate_up                            [M, 2 f], gate's f columns, then up's; rounded to x's dtype
    inner  = scale * silu(gate) * up              [M, f], float32 from hidden on, rounded once
    y      = inner down                           all of it group by group; contract.py says what rows belong to whom

(SwiGLU: Shazeer 2020, "GLU Variants Improve Transformer".) With g, u the halves of hidden, s = sigmoid(g), and z the
gradient of inner, z = dy down', the backward is

    dscale = sum over the f columns of z g s u        dup = scale z g s        dgate = scale z u s (1 + g (1 - s))

and grouped matmuls. What stands between the matmuls is *parts*, two functions. `unfused` makes them of any
implementation's matmuls and passes of XLA. mosaic_swiglu.py has kernels in which both happen on a matmul's way out:

    values that come and go, in M f     x gate_up -> inner      and hidden is kept      z -> dhidden, dscale
    unfused                             2 + 3                   2 + 3                   1 + 5
    fused                               1                       3                       4

A forward that nobody differentiates keeps nothing. Under `jax.checkpoint` both forwards keep hidden, the first in vain
unless the policy saves HIDDEN_NAME: custom_vjp's `optimize_remat` would spare it, but cannot hold a kernel with a
counter (jax 0.11.2).
"""

import functools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from zigzag_jax.kernels.grouped import contract
from zigzag_jax.kernels.grouped.contract import Implementation

HIDDEN_NAME = "experts_hidden"
"""Of what the backward needs of the matmul with gate and up (fused: inner too), for `jax.checkpoint`: a policy that
saves it runs that matmul once."""


class Inward(Protocol):
    """x through gate and up: inner [M, f], and with `keep` hidden [M, 2 f], else None."""

    def __call__(self, x, gate_up, scale, group_sizes, *, keep: bool) -> tuple[jax.Array, jax.Array | None]: ...


class Outward(Protocol):
    """dy [M, d] back through down and SwiGLU: dhidden [M, 2 f] in dy's dtype, dscale float32 [M]."""

    def __call__(self, dy, down, hidden, scale, group_sizes) -> tuple[jax.Array, jax.Array]: ...


class Parts(NamedTuple):
    """What stands between the grouped matmuls of x, inner and their gradients."""

    inward: Inward
    outward: Outward


def check(x, gate_up, down, scale, group_sizes) -> None:
    """ValueError unless the arguments fit the contract."""
    contract.check(x, gate_up, group_sizes)
    groups, size, both = gate_up.shape
    if both % 2:
        raise ValueError(f"gate_up [G, d, 2 f] must have an even number of columns, got {both}")
    if down.shape != (groups, both // 2, size) or down.dtype != gate_up.dtype:
        raise ValueError(
            f"down must be {gate_up.dtype} [G, f, d] = {[groups, both // 2, size]}, got {down.dtype} {list(down.shape)}"
        )
    if scale.shape != x.shape[:1] or scale.dtype != jnp.float32:
        raise ValueError(f"scale must be float32 [M] = [{x.shape[0]}], got {scale.dtype} {list(scale.shape)}")


def swiglu(hidden, scale) -> jax.Array:
    """Inner = scale * silu(gate) * up, [M, 2 f] -> [M, f]: float32 inside, rounded once."""
    gate, up = _halves(hidden)
    return (scale[:, None] * jax.nn.silu(gate) * up).astype(hidden.dtype)


def swiglu_grad(z, hidden, scale) -> tuple[jax.Array, jax.Array]:
    """The transpose of `swiglu` at hidden: gradient z [M, f] -> (dhidden [M, 2 f], dscale float32 [M])."""
    (gate, up), z = _halves(hidden), z.astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(gate)
    silu, scaled = gate * sigmoid, scale[:, None] * z
    dgate = scaled * up * sigmoid * (1 + gate * (1 - sigmoid))
    dhidden = jnp.concatenate([dgate, scaled * silu], axis=1).astype(hidden.dtype)
    return dhidden, jnp.sum(z * silu * up, axis=1)


def kept(results):
    """What a matmul made for the backward, named for policies.

    The barrier keeps XLA from running the kernel twice where a policy saves them: once into the stack of all layers'
    residuals, and once for what is made of them.
    """
    return jax.tree.map(lambda made: checkpoint_name(made, HIDDEN_NAME), lax.optimization_barrier(results))


def _halves(hidden) -> list[jax.Array]:
    return jnp.split(hidden.astype(jnp.float32), 2, axis=1)


@functools.cache  # the same parts of the same matmuls: jit compiles once
def unfused(matmul: Implementation) -> Parts:
    """The parts as grouped matmuls and passes over their results."""

    def inward(x, gate_up, scale, group_sizes, *, keep: bool):
        hidden = matmul.product(x, gate_up, group_sizes, transposed=False, out_dtype=x.dtype)
        hidden = kept(hidden) if keep else hidden  # inner too is made of what was saved
        return swiglu(hidden, scale), hidden if keep else None

    def outward(dy, down, hidden, scale, group_sizes):
        return swiglu_grad(matmul.product(dy, down, group_sizes, transposed=True, out_dtype=dy.dtype), hidden, scale)

    return Parts(inward, outward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def differentiable(matmul: Implementation, parts: Parts, x, gate_up, down, scale, group_sizes) -> jax.Array:
    """The result y of checked arguments, with the gradients of the contract."""
    inner, _ = parts.inward(x, gate_up, scale, group_sizes, keep=False)
    return matmul.product(inner, down, group_sizes, transposed=False, out_dtype=x.dtype)


def _fwd(matmul, parts, x, gate_up, down, scale, group_sizes):
    inner, hidden = parts.inward(x, gate_up, scale, group_sizes, keep=True)
    y = matmul.product(inner, down, group_sizes, transposed=False, out_dtype=x.dtype)
    return y, (x, gate_up, down, scale, group_sizes, inner, hidden)


def _bwd(matmul, parts, residuals, dy):
    x, gate_up, down, scale, group_sizes, inner, hidden = residuals
    dhidden, dscale = parts.outward(dy, down, hidden, scale, group_sizes)
    dx = matmul.product(dhidden, gate_up, group_sizes, transposed=True, out_dtype=x.dtype)
    outer = functools.partial(matmul.outer, out_dtype=x.dtype)
    return dx, outer(x, dhidden, group_sizes), outer(inner, dy, group_sizes), dscale, None


differentiable.defvjp(_fwd, _bwd)
