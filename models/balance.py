"""The load-balancing loss: experts that are chosen often and believed in much are pushed down.

For T tokens, f_e = how often expert e was chosen / T and P_e = its mean probability. The loss is E * sum_e f_e * P_e:
k for a router that spreads its tokens evenly, up to E for one that does not. Only P has a gradient.

There are several loss functions of this name, and they differ in what the product is taken over. This is **Hugging
Face's** (`load_balancing_loss_func`): the gate logits of *all layers* are put into one long list of tokens first, so
there is one f, one P and one product; it is not the mean of the layers' losses. Its ingredients are sums over tokens,
so it does not change with the mesh; as a product of two sums it does change when a batch is cut into micro-batches
whose losses are averaged (add up their `RouterStats` instead).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class RouterStats(NamedTuple):
    """Router statistics of a whole model: sums over the real tokens of the whole batch. Those of two batches add up."""

    counts: jax.Array
    """[MoE layers, E] float32: how often each expert was chosen."""

    probs: jax.Array
    """[MoE layers, E] float32: the sum of its probability."""

    tokens: jax.Array
    """[] float32: the number of real tokens."""


def load_balancing_loss(counts: jax.Array, probs: jax.Array, tokens: jax.Array) -> jax.Array:
    """Hugging Face's auxiliary loss from `RouterStats`' three fields, before its coefficient.

    One layer, four tokens, each of two experts chosen twice (top-1):
    >>> load_balancing_loss(jnp.array([[2.0, 2.0]]), jnp.array([[1.0, 3.0]]), jnp.array(4.0))
    Array(1., dtype=float32)
    """
    layers, experts = counts.shape
    rows = jnp.maximum(tokens * layers, 1.0)  # a batch of nothing but padding has no loss
    return experts * jnp.sum((jnp.sum(counts, axis=0) / rows) * (jnp.sum(probs, axis=0) / rows))
