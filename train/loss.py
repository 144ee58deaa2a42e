"""Cross-entropy in chunks, every device on its own tokens.

Logits [B, S, V] in float32 are the largest array of a training step: 20 GB at 32k tokens and 152k words. They are never
made. Inside a shard_map each device walks over its own tokens a chunk at a time, and where a gradient is asked for the
walk makes it too, while a chunk's logits are there: the loss of a step is one sum, so what comes back is one number, a
factor of what was kept. Making the logits again for the backward would be a fourth product of [n, d] by [d, V]. A scan
over chunks of the global sequence axis would have XLA gather the whole sequence's hidden states instead.

    forward alone          logits = h W          loss = lse(logits) - logits[label]
    with the gradient      + G = softmax(logits) - onehot(label)        dh = G W^T        dW += h^T G

The loss of a step is the sum over all tokens divided **once** by their number: with means per device, padding and
packing would weigh tokens differently on different meshes.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from zigzag_jax.train.mesh import ROWS

IGNORED = -1  # label of a token whose successor is not predicted
CHUNK = 4096
"""Tokens whose logits exist at a time on a device: 2.5 GB at 152k words. Each chunk reads and writes all of dW."""

_HIDDEN, _TOKENS = PartitionSpec(ROWS, "cp", None), PartitionSpec(ROWS, "cp")


def cross_entropy(hidden, head, labels, *, mesh, dtype, chunk: int = CHUNK) -> jax.Array:
    """-log softmax(hidden @ head)[label] of every token, in nats, 0 where nothing is predicted: float32 [B, S].

    hidden [B, S, d]; head float32 [d, V]; labels int32 [B, S], -1 where nothing is predicted; all in one order (zigzag)
    with B over the mesh's (dp, fsdp) and S over cp, like the result. The product is taken in `dtype` with float32 sums.
    For evaluation: a gradient of it would keep all logits (cross_entropy_sum does not).
    """

    def local(hidden, head, labels):
        head = head.astype(dtype)

        def one(_, x):
            logits = _logits(x[0], head)
            return None, _losses(logits, x[1], _lse(logits))

        chunks = _chunks(hidden, labels, dtype, chunk)
        return lax.scan(one, None, chunks)[1].reshape(-1)[: labels.size].reshape(labels.shape)

    in_specs = (_HIDDEN, PartitionSpec(), _TOKENS)
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=_TOKENS, check_vma=False)(hidden, head, labels)


def cross_entropy_sum(hidden, head, labels, *, mesh, dtype, chunk: int = CHUNK) -> jax.Array:
    """The sum of `cross_entropy` over all tokens of the global batch: float32 scalar.

    Its gradient (reverse mode) is made with it and kept until the backward: float32, that of head [d, V] whole on every
    device, summed in float32 over chunks and devices.
    """

    def local(hidden, head, labels):
        return _sum(jnp.dtype(dtype), chunk, hidden, head, labels)[None, None]

    # a sum from each device, added by the outer sum: its transpose hands each device the factor of its own
    in_specs = (_HIDDEN, PartitionSpec(), _TOKENS)
    run = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=_TOKENS, check_vma=False)
    return jnp.sum(run(hidden, head, labels))


def _chunks(hidden, labels, dtype, chunk: int):
    """Hidden [N, n, d] in dtype and labels [N, n] of one device's tokens, the last chunk padded."""
    count = labels.size
    size = -(-count // -(-count // chunk))  # chunks of one size: the last is not filled up to a whole `chunk`
    pad = -count % size
    hidden = jnp.pad(hidden.reshape(count, -1).astype(dtype), ((0, pad), (0, 0)))
    labels = jnp.pad(labels.reshape(count), (0, pad), constant_values=IGNORED)
    return hidden.reshape(-1, size, hidden.shape[-1]), labels.reshape(-1, size)


def _logits(h, head):
    """Float32 [n, V]."""
    return jnp.matmul(h, head, preferred_element_type=jnp.float32)


def _losses(logits, labels, lse):
    """The losses [n]."""
    own = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[:, None], axis=1)[:, 0]
    return jnp.where(labels >= 0, lse - own, 0.0)


def _lse(logits):
    return jax.nn.logsumexp(logits, axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum(dtype, chunk: int, hidden, head, labels):
    """The sum over one device's tokens."""
    head = head.astype(dtype)

    def add(total, x):
        logits = _logits(x[0], head)
        return total + jnp.sum(_losses(logits, x[1], _lse(logits))), None

    return lax.scan(add, jnp.float32(0), _chunks(hidden, labels, dtype, chunk))[0]


def _sum_fwd(dtype, chunk: int, hidden, head, labels):
    narrow = head.astype(dtype)

    def one(state, x):
        total, dhead = state
        h, labels = x
        logits = _logits(h, narrow)
        lse = _lse(logits)
        # a comparison, not a scatter: it is part of the one pass that reads logits and writes grad
        own, real = jnp.arange(logits.shape[1])[None] == labels[:, None], (labels >= 0)[:, None]
        grad = jnp.where(real, jnp.exp(logits - lse[:, None]) - own, 0.0).astype(dtype)
        h = jnp.where(real, h, 0)  # nan where nothing is predicted must not reach dhead as 0 * nan
        dh = jnp.matmul(grad, narrow.T, preferred_element_type=jnp.float32)
        dhead = dhead + jnp.matmul(h.T, grad, preferred_element_type=jnp.float32)
        return (total + jnp.sum(_losses(logits, labels, lse)), dhead), dh

    start = jnp.float32(0), jnp.zeros(head.shape, jnp.float32)
    (total, dhead), dh = lax.scan(one, start, _chunks(hidden, labels, dtype, chunk))
    dh = dh.reshape(-1, hidden.shape[-1])[: labels.size].reshape(hidden.shape)
    # float32 until it is multiplied by the factor: rounded once
    return total, (dh, dhead, jnp.zeros((), hidden.dtype), jnp.zeros((), head.dtype))


def _sum_bwd(dtype, chunk: int, residuals, factor):
    del dtype, chunk
    dh, dhead, like_hidden, like_head = residuals
    return (factor * dh).astype(like_hidden.dtype), (factor * dhead).astype(like_head.dtype), None


_sum.defvjp(_sum_fwd, _sum_bwd)


def predicted(labels) -> jax.Array:
    """How many tokens of the global batch are predicted: float32 scalar."""
    return jnp.sum(labels >= 0, dtype=jnp.int32).astype(jnp.float32)  # exact beyond 2**24
