"""Cross-entropy in chunks, every device on its own tokens.

Logits [B, S, V] in float32 are the largest array of a training step: 20 GB at 32k tokens and 152k words. They are never
made. Inside a shard_map each device walks over its own tokens a chunk at a time, and where a gradient is asked for the
walk makes it too, while a chunk's logits are there: the loss of a step is one sum, so what comes back is one number, a
factor of what was kept. Making the logits again for the backward would be a fourth product of [n, d] by [d, V]. A scan
over chunks of the global sequence axis would have XLA gather the whole sequence's hidden states instead.

    forward alone          logits = h W          loss = lse(logits) - logits[label]
    with the gradient      + G = softmax(logits) - onehot(label)        dh = G W^T        dW += h^T G
    with the z-loss        + z lse^2                                    G += 2 z lse softmax(logits)

The z-loss keeps the softmax's denominator near 1 (PaLM, arXiv:2204.02311, section 5): else nothing holds logits from
drifting all together, which costs digits in bfloat16.

The loss of a step is the sum over all tokens divided **once** by their number: with means per device, padding and
packing would weigh tokens differently on different meshes.
"""

import functools
from typing import Any, NamedTuple

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


class TokenSums(NamedTuple):
    """Sums over all predicted tokens of the global batch, float32 scalars. Only the objective has a gradient."""

    objective: jax.Array
    """Of cross-entropy + z_loss * lse^2."""
    loss: jax.Array
    """Of the cross-entropy."""
    z: jax.Array
    """Of lse^2, the squared logarithm of the softmax's denominator."""


def cross_entropy_sum(hidden, head, labels, *, mesh, dtype, z_loss: float = 0.0, chunk: int = CHUNK) -> TokenSums:
    """The sum of `cross_entropy` over all tokens of the global batch, with `z_loss` times the z-loss if that is > 0.

    Its gradient (reverse mode) is made with it and kept until the backward: float32, that of head [d, V] whole on every
    device, summed in float32 over chunks and devices.
    """

    def local(hidden, head, labels):
        sums: Any = _sum(jnp.dtype(dtype), z_loss, chunk, hidden, head, labels)
        return sums[None, None]

    # sums from each device, added by the outer sum: its transpose hands each device the factor of its own
    in_specs, out_specs = (_HIDDEN, PartitionSpec(), _TOKENS), PartitionSpec(ROWS, "cp", None)
    run = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    objective, loss, z = jnp.sum(run(hidden, head, labels), axis=(0, 1))
    return TokenSums(objective, lax.stop_gradient(loss), lax.stop_gradient(z))


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
    return lax.platform_dependent(logits, cuda=_lse_in_one_pass, default=functools.partial(jax.nn.logsumexp, axis=1))


def _lse_in_one_pass(logits):
    """Logarithm of the softmax's denominator of each row, from pairs (maximum, sum of exp) that merge in any order.

    A maximum first and then a sum read the logits twice, on a GPU 0.6 times longer.
    """

    def merge(a, b):
        apart = jnp.where(a[0] == b[0], 0.0, a[0] - b[0])  # equal infinities too
        fade = jnp.exp(-jnp.abs(apart))
        return jnp.maximum(a[0], b[0]), jnp.where(apart > 0, a[1] + b[1] * fade, b[1] + a[1] * fade)

    nothing = jnp.finfo(jnp.float32).min, jnp.float32(0)  # finite: -inf less itself is nan
    top, total = lax.reduce((logits, jnp.ones_like(logits)), nothing, merge, (1,))
    return top + jnp.log(total)


def _sums(z_loss: float, losses, labels, lse):
    """What one chunk adds to TokenSums, float32 [3]."""
    loss, z = jnp.sum(losses), jnp.sum(jnp.where(labels >= 0, lse * lse, 0.0))
    return jnp.stack([loss + z_loss * z, loss, z])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sum(dtype, z_loss: float, chunk: int, hidden, head, labels):
    """TokenSums over one device's tokens, as [3]; only the first is differentiated."""
    head = head.astype(dtype)

    def add(total, x):
        logits = _logits(x[0], head)
        lse = _lse(logits)
        return total + _sums(z_loss, _losses(logits, x[1], lse), x[1], lse), None

    return lax.scan(add, jnp.zeros(3, jnp.float32), _chunks(hidden, labels, dtype, chunk))[0]


def _sum_fwd(dtype, z_loss: float, chunk: int, hidden, head, labels):
    narrow = head.astype(dtype)

    def one(state, x):
        total, dhead = state
        h, labels = x
        logits = _logits(h, narrow)
        lse = _lse(logits)
        # a comparison, not a scatter: it is part of the one pass that reads logits and writes grad
        own, real = jnp.arange(logits.shape[1])[None] == labels[:, None], (labels >= 0)[:, None]
        # the z-loss adds 2 z lse softmax, a factor of each row's softmax
        softmax = jnp.exp(logits - lse[:, None])
        softmax = softmax * (1 + 2 * z_loss * lse)[:, None] if z_loss else softmax
        grad = jnp.where(real, softmax - own, 0.0).astype(dtype)
        h = jnp.where(real, h, 0)  # nan where nothing is predicted must not reach dhead as 0 * nan
        dh = jnp.matmul(grad, narrow.T, preferred_element_type=jnp.float32)
        dhead = dhead + jnp.matmul(h.T, grad, preferred_element_type=jnp.float32)
        return (total + _sums(z_loss, _losses(logits, labels, lse), labels, lse), dhead), dh

    start = jnp.zeros(3, jnp.float32), jnp.zeros(head.shape, jnp.float32)
    (total, dhead), dh = lax.scan(one, start, _chunks(hidden, labels, dtype, chunk))
    dh = dh.reshape(-1, hidden.shape[-1])[: labels.size].reshape(hidden.shape)
    # float32 until it is multiplied by the factor: rounded once
    return total, (dh, dhead, jnp.zeros((), hidden.dtype), jnp.zeros((), head.dtype))


def _sum_bwd(dtype, z_loss: float, chunk: int, residuals, factors):
    del dtype, z_loss, chunk
    dh, dhead, like_hidden, like_head = residuals
    factor = factors[0]
    return (factor * dh).astype(like_hidden.dtype), (factor * dhead).astype(like_head.dtype), None


_sum.defvjp(_sum_fwd, _sum_bwd)


def predicted(labels) -> jax.Array:
    """How many tokens of the global batch are predicted: float32 scalar."""
    return jnp.sum(labels >= 0, dtype=jnp.int32).astype(jnp.float32)  # exact beyond 2**24
