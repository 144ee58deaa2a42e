"""Mixture of experts: each token goes through its k best experts out of E, and the outputs are added by weight.

    router      logits [T, E] -> k experts a token, their weights, and the probabilities of all (for the statistics)
    dispatch    the T * k (token, choice) pairs, sorted by expert: each expert's rows become one contiguous range
    experts     down(weight * silu(gate(x)) * up(x)) over those ranges, gate and up as one (grouped_swiglu)
    combine     back into token order, added

The router's weight enters before `down`, where rows are narrow, and not after it, which means the same: so its gradient
needs no result of `down`, and a backward that recomputes the layer does not run that matmul again.

All of it runs inside one `shard_map`: every device routes and computes its own tokens with all the experts, whose
weights it gathers. Or, with expert parallelism, the experts stay where they are and the rows travel to them between
dispatch and combine: exchange.py. Either way nothing has a capacity, no token is dropped, and a token's result does not
depend on how the batch, the sequence or the experts are cut.

Sorting is a permutation, and a permutation's transpose is its inverse. `_dispatch` and `_permuted` say so by hand: the
gradient is a gather too, where automatic differentiation would scatter-add in the dtype of the activations.

Two seams: `MoE` takes its router as a value (router.py), and the experts' weights enter `shard_map` by the rule of
their "experts" axis.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from zigzag_jax.kernels import grouped_swiglu
from zigzag_jax.models.exchange import (
    Exchange,
    Experts,
    block_rows,
    exchanged_experts,
    gather_gate_up,
    sort_pairs,
)
from zigzag_jax.models.layers import linear, normal
from zigzag_jax.models.options import KernelOptions
from zigzag_jax.models.router import Router, Routes
from zigzag_jax.models.sharding import Sharding, gather, param, spec_axes


class LayerStats(NamedTuple):
    """Router statistics of one layer: for each row of the batch, sums over its real tokens on all devices."""

    counts: jax.Array
    """[B, E] float32: how often each expert was chosen, over all k choices."""

    probs: jax.Array
    """[B, E] float32: the sum of each expert's probability. The part of the auxiliary loss that has a gradient."""

    routes: jax.Array
    """[B, S, k] int32: the experts of each token."""


class MoE(nnx.Module):
    """Router and experts of one layer."""

    def __init__(
        self,
        size: int,
        inner: int,
        experts: int,
        router: Router,
        sharding: Sharding,
        *,
        std: float,
        options: KernelOptions = KernelOptions(),  # noqa: B008 (frozen)
        bias: bool = False,
        rngs: nnx.Rngs,
    ):
        self.options = options
        self.router = router
        self.sharding = sharding
        self.route = param(normal(rngs, (size, experts), std), "embed", "experts")
        self.bias = param(jnp.zeros((experts,), jnp.float32), "experts") if bias else None
        self.gate = param(normal(rngs, (experts, size, inner), std), "experts", "embed", "mlp")
        self.up = param(normal(rngs, (experts, size, inner), std), "experts", "embed", "mlp")
        self.down = param(normal(rngs, (experts, inner, size), std), "experts", "mlp", "embed")

    def __call__(self, x: jax.Array, real: jax.Array, routes: jax.Array | None = None) -> tuple[jax.Array, LayerStats]:
        """Tokens x [B, S, d]; real [B, S] bool, False on padding (which is computed, and not counted).

        `routes` [B, S, k] int32 are the experts to use; without it the router chooses.
        """
        sharding = self.sharding
        weights = (self.route[...], self.gate[...], self.up[...], self.down[...])
        up_spec = sharding.spec(("experts", "embed", "mlp"), self.up[...].shape)
        specs = (
            sharding.spec(("embed", "experts"), self.route[...].shape),
            up_spec,
            up_spec,
            sharding.spec(("experts", "mlp", "embed"), self.down[...].shape),
        )
        rows = sharding.spec(("batch", "sequence"), real.shape)
        tokens, by_row = P(*rows, None), P(rows[0], None)
        extras, extra_specs = {}, {}
        if routes is not None:
            extras["experts"], extra_specs["experts"] = routes, tokens
        if self.bias is not None:
            extras["bias"], extra_specs["bias"] = lax.stop_gradient(self.bias[...]), P(None)
        run = jax.shard_map(
            functools.partial(
                _local_moe,
                router=self.router,
                experts=self._experts(specs, real.shape),
                specs=specs,
                axes=spec_axes(P(rows[1])),
            ),
            mesh=sharding.mesh,
            in_specs=(tokens, rows, specs, extra_specs),
            out_specs=(tokens, LayerStats(by_row, by_row, tokens)),
            check_vma=False,  # a kernel that works in place cannot carry the types this checks
        )
        return run(x, real, weights, extras)

    def _experts(self, specs, tokens: tuple[int, ...]):
        """What a device does with its tokens [T, d], Routes, their counts [E] and pieces of the matrices."""
        sharding, implementation = self.sharding, self.options.implementation
        pieces = Experts(*specs[1:])
        if not (axes := sharding.expert_axes):
            mlp = functools.partial(grouped_swiglu, fused=self.options.fused, implementation=implementation)
            return functools.partial(_all_experts, mlp, pieces)
        if self.options.fused:
            raise ValueError(
                f"fused must be False where experts are cut over mesh axes, got True and {' * '.join(axes)}"
            )
        devices = math.prod(sharding.mesh.shape[axis] for axis in axes)
        cut = spec_axes(sharding.spec(("batch", "sequence"), tokens))
        own = math.prod(tokens) // math.prod(sharding.mesh.shape[axis] for axis in cut)
        rows = self.options.exchange_rows or block_rows(own * self.router.top_k, devices)
        plan = Exchange(axes, sharding.mesh.axis_names, devices, rows, implementation)
        return lambda x, routes, sizes, matrices: exchanged_experts(
            plan, pieces, x, routes.experts, routes.weights, sizes, matrices
        )


def _local_moe(x, real, weights, extras, *, router: Router, experts, specs, axes) -> tuple[jax.Array, LayerStats]:
    """One device's tokens x [b, s, d]: routed, counted, and through their experts."""
    shape, x = x.shape, x.reshape(-1, x.shape[-1])
    # the router keeps its float32 weight until the product: its gradient is a sum over every token there is
    route = gather(weights[0], specs[0], jnp.float32)
    with jax.named_scope("router"):
        if "experts" in extras:
            extras = extras | {"experts": extras["experts"].reshape(-1, router.top_k)}
        # float32 that a GPU would round to ten bits (TF32) sends tokens to other experts; the product is small
        logits = linear(x.astype(jnp.float32), route, lax.Precision.HIGHEST) if router.wide else linear(x, route)
        routes = router(logits, **extras)
        chosen = routes.experts[:, :, None] == jnp.arange(route.shape[1])[None, None]
        taken = jnp.sum(chosen, axis=1, dtype=jnp.int32)
        counts = jnp.sum(taken.reshape(*shape[:2], -1) * real[:, :, None], axis=1, dtype=jnp.int32)
        probs = jnp.sum(jnp.where(real[:, :, None], routes.probs.reshape(*shape[:2], -1), 0.0), axis=1)
        counts, probs = lax.psum((counts.astype(jnp.float32), probs), axes)
        stats = LayerStats(counts, probs, routes.experts.reshape(*shape[:2], -1))
    with jax.named_scope("experts"):
        y = experts(x, routes, jnp.sum(taken, axis=0, dtype=jnp.int32), Experts(*weights[1:]))
    return y.reshape(shape), stats


def _all_experts(mlp, specs: Experts, x: jax.Array, routes: Routes, sizes, matrices: Experts) -> jax.Array:
    """Tokens [T, d] through their experts, all of which are gathered here."""
    gate_up, down = gather_gate_up(specs, matrices, x.dtype), gather(matrices.down, specs.down, x.dtype)
    order, inverse = sort_pairs(routes.experts)
    scale = _permuted(routes.weights.astype(jnp.float32).reshape(-1), order, inverse)
    rows = mlp(_dispatch(x, order, inverse), gate_up, down, scale, sizes)
    pairs = _permuted(rows, inverse, order)
    return jnp.sum(pairs.reshape(*routes.weights.shape, -1), axis=1, dtype=jnp.float32).astype(x.dtype)


@jax.custom_vjp
def _dispatch(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """Tokens [T, d] -> one row for each pair, sorted by expert [T * k, d]. Pair p belongs to token p // k."""
    del inverse
    return x[order // (order.size // x.shape[0])]


def _dispatch_fwd(x, order, inverse):
    return _dispatch(x, order, inverse), (inverse, x.shape)


def _dispatch_bwd(residuals, dy):
    inverse, (tokens, size) = residuals
    dx = dy[inverse].reshape(tokens, -1, size)
    return jnp.sum(dx, axis=1, dtype=jnp.float32).astype(dy.dtype), None, None


_dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def _permuted(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """x[order], where `inverse` is the order that undoes it: that of the gradient."""
    del inverse
    return x[order]


_permuted.defvjp(
    lambda x, order, inverse: (_permuted(x, order, inverse), inverse), lambda inverse, dy: (dy[inverse], None, None)
)
