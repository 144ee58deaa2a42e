"""Attention of one token over what was kept of others: no mask but "may be seen", so the order of the kept is free.

The kept tokens may lie in several arrays, and each over several devices; their parts are combined as a ring combines
its steps, so that no array of all keys is made.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Memory(NamedTuple):
    """Keys and values of some tokens."""

    k: jax.Array
    """[B, n, K, D]."""

    v: jax.Array
    """[B, n, K, E]."""

    visible: jax.Array
    """[B or 1, n] bool: what each row may see."""


def attend(q: jax.Array, memories: Sequence[Memory], scale: float) -> jax.Array:
    """softmax(scale * q k^T) v of one query a row, q [B, 1, H, D], over all memories: [B, 1, H, E] in q's dtype.

    Head h uses key head h // (H / K), as everywhere (GQA). Scores and sums are float32. Every row must see some token.
    """
    batch, _, heads, dim = q.shape
    parts = []
    for k, v, visible in memories:
        grouped = q.reshape(batch, k.shape[2], -1, dim)
        scores = scale * jnp.einsum("bkgd,bnkd->bkgn", grouped, k, preferred_element_type=jnp.float32)
        scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
        top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), -1e30)  # a memory of which nothing is seen
        p = jnp.exp(scores - top)
        out = jnp.einsum("bkgn,bnke->bkge", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
        parts.append((top, jnp.sum(p, axis=-1, keepdims=True), out))
    highest = functools.reduce(jnp.maximum, (top for top, _, _ in parts))
    total, out = 0.0, 0.0
    for top, sums, own in parts:
        weight = jnp.exp(top - highest)
        total, out = total + weight * sums, out + weight * own
    return (out / total).reshape(batch, 1, heads, -1).astype(q.dtype)
