"""Which experts a token is sent to, and how much each counts.

A router takes the logits [T, E] of T tokens and

    probs      makes probabilities of them, float32
    experts    chooses k of the E, by probs + bias where there is a bias (balance.py), or takes those it is given
    weights    gives each chosen expert its own probability, renormalised or scaled

A bias decides who is chosen and never how much they count (Wang et al. 2024, arXiv:2408.15664). Given experts are those
of another pass: a router that replays what was routed elsewhere, or a benchmark in which all experts have equal work.
"""

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax


class Routes(NamedTuple):
    """What a router decides for T tokens."""

    weights: jax.Array
    """[T, k], float32 or the model's dtype: how much each chosen expert counts."""

    experts: jax.Array
    """[T, k] int32: the chosen experts."""

    probs: jax.Array
    """[T, E] float32: the probabilities of all experts, for the balance of the load."""


class Router(Protocol):
    """Logits [T, E], perhaps a bias [E] and perhaps experts [T, k] -> Routes.

    A frozen dataclass, so that it may be a static part of a module.
    """

    @property
    def top_k(self) -> int:
        """Experts a token."""
        ...

    @property
    def wide(self) -> bool:
        """Whether the logits are computed in whole float32 (no TF32 either), not in the model's dtype."""
        ...

    def __call__(
        self, logits: jax.Array, bias: jax.Array | None = None, experts: jax.Array | None = None
    ) -> Routes: ...


@dataclasses.dataclass(frozen=True)
class SoftmaxTopK:
    """Qwen3's router: softmax over all experts in float32, the k best, renormalised or not, cast back."""

    top_k: int
    """Experts a token."""

    renormalise: bool
    """Divide the k weights by their sum (`norm_topk_prob`)."""

    wide: bool = False
    """See Router."""

    def __call__(self, logits: jax.Array, bias: jax.Array | None = None, experts: jax.Array | None = None) -> Routes:
        probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        experts = _best(_biased(probs, bias), self.top_k) if experts is None else experts
        weights = jnp.take_along_axis(probs, experts, axis=1)
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

    def __call__(self, logits: jax.Array, bias: jax.Array | None = None, experts: jax.Array | None = None) -> Routes:
        probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        experts = self._experts(_biased(probs, bias)) if experts is None else experts
        return Routes(jnp.take_along_axis(probs, experts, axis=1) * self.scaling, experts, probs)

    def _experts(self, scores: jax.Array) -> jax.Array:
        if self.top_groups < self.groups:
            grouped = scores.reshape(scores.shape[0], self.groups, -1)
            best = _best(jnp.max(grouped, axis=-1), self.top_groups)
            kept = jnp.any(best[:, :, None] == jnp.arange(self.groups)[None, None], axis=1)
            scores = jnp.where(kept[:, :, None], grouped, -jnp.inf).reshape(scores.shape)
        return _best(scores, self.top_k)


def balanced_routes(places: jax.Array, layers: int, experts: int, top_k: int) -> jax.Array:
    """Experts [layers, B, S, k] int32 in turn, by the tokens' places in their rows [B, S]: all have the same work.

    Places are 0 .. S - 1 in natural order (to_zigzag of that for a model), not positions, which begin again with each
    document.

    For benchmarks, as the `routes` of a model: what a random model's router would do depends on its seed.

    >>> balanced_routes(jnp.arange(3)[None], layers=1, experts=4, top_k=2)[0, 0].tolist()
    [[0, 1], [2, 3], [0, 1]]
    """
    turn = places[None, :, :, None] * top_k + jnp.arange(top_k)[None, None, None]
    # another beginning in each layer, or a token would meet the same experts everywhere
    start = jnp.arange(layers)[:, None, None, None]
    return ((turn + start) % experts).astype(jnp.int32)


def _biased(probs: jax.Array, bias: jax.Array | None) -> jax.Array:
    return lax.stop_gradient(probs if bias is None else probs + bias[None])


def _best(scores: jax.Array, count: int) -> jax.Array:
    return lax.top_k(scores, count)[1]
