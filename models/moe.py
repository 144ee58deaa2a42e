"""Mixture of experts: each token goes through its k best experts out of E, and the outputs are added by weight.

    router      logits [T, E] -> k experts a token, their weights, and the probabilities of all (for the statistics)
    dispatch    the T * k (token, choice) pairs, sorted by expert: each expert's rows become one contiguous range
    experts     three grouped matmuls over those ranges: down(silu(gate(x)) * up(x))
    combine     back into token order, weighted, added

All of it runs inside one `shard_map`: every device routes and computes its own tokens with all the experts, whose
weights it gathers. Tokens never travel, nothing has a capacity, no token is dropped, and a token's result does not
depend on how the batch or the sequence is cut.

Sorting is a permutation, and a permutation's transpose is its inverse. `_dispatch` and `_combine` say so by hand: the
gradient is a gather too, where automatic differentiation would scatter-add in the dtype of the activations.

Two seams: `MoE` takes its router as a value (SoftmaxTopK here), and the experts' weights enter `shard_map` by the rule
of their "experts" axis.
"""

import dataclasses
import functools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from zigzag_jax.kernels import grouped_matmul
from zigzag_jax.models.layers import linear, normal
from zigzag_jax.models.sharding import Sharding, gather, param, spec_axes


class Routes(NamedTuple):
    """What a router decides for T tokens."""

    weights: jax.Array
    """[T, k], float32 or the model's dtype: how much each chosen expert counts."""

    experts: jax.Array
    """[T, k] int32: the chosen experts."""

    probs: jax.Array
    """[T, E] float32: the probabilities of all experts, for the balance of the load."""


class Router(Protocol):
    """Logits [T, E] -> Routes. A frozen dataclass, so that it may be a static part of a module."""

    @property
    def wide(self) -> bool:
        """Whether the logits are computed in float32, not in the model's dtype."""
        ...

    def __call__(self, logits: jax.Array) -> Routes: ...


@dataclasses.dataclass(frozen=True)
class SoftmaxTopK:
    """Qwen3's router: softmax over all experts in float32, the k best, renormalised or not, cast back."""

    top_k: int
    """Experts a token."""

    renormalise: bool
    """Divide the k weights by their sum (`norm_topk_prob`)."""

    wide: bool = False
    """See Router."""

    def __call__(self, logits: jax.Array) -> Routes:
        probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        weights, experts = lax.top_k(probs, self.top_k)
        if self.renormalise:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return Routes(weights.astype(logits.dtype), experts, probs)


@dataclasses.dataclass(frozen=True)
class GroupLimitedTopK:
    """DeepSeek-V2's router: softmax in float32, the k best experts of the best groups, times a factor.

    A group is as good as its best expert (arXiv:2405.04434, section 2.2.2). One group of all experts is plain top-k.
    """

    top_k: int
    """Experts a token."""

    groups: int
    """Groups of neighbouring experts; a divisor of their number."""

    top_groups: int
    """Groups that a token may use."""

    scaling: float
    """Factor of the weights."""

    wide: bool = True
    """See Router."""

    def __call__(self, logits: jax.Array) -> Routes:
        probs = scores = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        if self.top_groups < self.groups:
            grouped = probs.reshape(probs.shape[0], self.groups, -1)
            _, best = lax.top_k(jnp.max(grouped, axis=-1), self.top_groups)
            kept = jnp.any(best[:, :, None] == jnp.arange(self.groups)[None, None], axis=1)
            scores = jnp.where(kept[:, :, None], grouped, 0.0).reshape(probs.shape)
        weights, experts = lax.top_k(scores, self.top_k)
        return Routes(weights * self.scaling, experts, probs)


class LayerStats(NamedTuple):
    """Router statistics of one layer: sums over the real tokens of the whole batch, on every device the same."""

    counts: jax.Array
    """[E] float32: how often each expert was chosen, over all k choices."""

    probs: jax.Array
    """[E] float32: the sum of each expert's probability. The part of the auxiliary loss that has a gradient."""


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
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.implementation = implementation
        self.router = router
        self.sharding = sharding
        self.route = param(normal(rngs, (size, experts), std), "embed", "experts")
        self.gate = param(normal(rngs, (experts, size, inner), std), "experts", "embed", "mlp")
        self.up = param(normal(rngs, (experts, size, inner), std), "experts", "embed", "mlp")
        self.down = param(normal(rngs, (experts, inner, size), std), "experts", "mlp", "embed")

    def __call__(self, x: jax.Array, real: jax.Array) -> tuple[jax.Array, LayerStats]:
        """Tokens x [B, S, d]; real [B, S] bool, False on padding (which is computed, and not counted)."""
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
        tokens = P(*rows, None)
        run = jax.shard_map(
            functools.partial(
                _local_moe,
                router=self.router,
                matmul=functools.partial(grouped_matmul, implementation=self.implementation),
                specs=specs,
                axes=spec_axes(rows),
            ),
            mesh=sharding.mesh,
            in_specs=(tokens, rows, specs),
            out_specs=(tokens, P(None)),
            check_vma=False,  # a kernel that works in place cannot carry the types this checks
        )
        return run(x, real, weights)


def _local_moe(x, real, weights, *, router, matmul, specs, axes) -> tuple[jax.Array, LayerStats]:
    """One device's tokens x [b, s, d] through all experts."""
    shape, x = x.shape, x.reshape(-1, x.shape[-1])
    # the router keeps its float32 weight until the product: its gradient is a sum over every token there is
    route = gather(weights[0], specs[0], jnp.float32)
    with jax.named_scope("router"):
        routes = router(linear(x.astype(jnp.float32) if router.wide else x, route))
        chosen = routes.experts[:, :, None] == jnp.arange(route.shape[1])[None, None]
        counted = real.reshape(-1)
        stats = LayerStats(
            jnp.sum(chosen & counted[:, None, None], axis=(0, 1), dtype=jnp.int32).astype(jnp.float32),
            jnp.sum(jnp.where(counted[:, None], routes.probs, 0.0), axis=0),
        )
        stats = lax.psum(stats, axes)
    gate, up, down = (gather(w, spec, x.dtype) for w, spec in zip(weights[1:], specs[1:], strict=True))
    sizes = jnp.sum(chosen, axis=(0, 1), dtype=jnp.int32)
    with jax.named_scope("experts"):
        order = jnp.argsort(routes.experts.reshape(-1), stable=True)
        inverse = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)
        rows = _dispatch(x, order, inverse)
        inner = jax.nn.silu(matmul(rows, gate, sizes)) * matmul(rows, up, sizes)
        pairs = _combine(matmul(inner, down, sizes), order, inverse)
        y = _weighted_sum(pairs, routes.weights)
    return y.reshape(shape), stats


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
def _combine(y: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """Rows sorted by expert -> rows in the order of the pairs, both [T * k, d]."""
    del order
    return y[inverse]


_combine.defvjp(
    lambda y, order, inverse: (_combine(y, order, inverse), order), lambda order, dy: (dy[order], None, None)
)


def _weighted_sum(pairs: jax.Array, weights: jax.Array) -> jax.Array:
    """Pairs [T * k, d] and weights [T, k] -> tokens [T, d]; added in float32."""
    wide = pairs.reshape(*weights.shape, -1).astype(jnp.float32)
    return jnp.sum(wide * weights.astype(jnp.float32)[:, :, None], axis=1).astype(pairs.dtype)
