"""Cross-entropy in chunks, every device on its own tokens.

Logits [B, S, V] in float32 are the largest array of a training step: 20 GB at 32k tokens and 152k words. They are never
made. Inside a shard_map each device walks over its own tokens a chunk at a time, keeps nothing (`jax.checkpoint`: the
backward makes a chunk's logits again), and returns a number a token. A scan over chunks of the global sequence axis
would have XLA gather the whole sequence's hidden states instead.

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


def cross_entropy(hidden, head, labels, *, mesh, dtype, chunk: int = 1024) -> jax.Array:
    """-log softmax(hidden @ head)[label] of every token, in nats, 0 where nothing is predicted: float32 [B, S].

    hidden [B, S, d]; head float32 [d, V]; labels int32 [B, S], -1 where nothing is predicted; all in one order (zigzag)
    with B over the mesh's (dp, fsdp) and S over cp, like the result. The product is taken in `dtype` with float32 sums;
    the gradient of head is summed in float32. `chunk`: tokens whose logits exist at a time.
    """
    rows, sequence = PartitionSpec(ROWS, "cp", None), PartitionSpec(ROWS, "cp")

    def local(hidden, head, labels):
        flat = hidden.reshape(-1, hidden.shape[-1])
        return _local(flat, head, labels.reshape(-1), dtype, chunk).reshape(labels.shape)

    in_specs = (rows, PartitionSpec(), sequence)
    run = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=sequence, check_vma=False)
    return run(hidden, head, labels)


def cross_entropy_sum(hidden, head, labels, *, mesh, dtype, chunk: int = 1024) -> jax.Array:
    """The sum of `cross_entropy` over all tokens of the global batch: float32 scalar."""
    return jnp.sum(cross_entropy(hidden, head, labels, mesh=mesh, dtype=dtype, chunk=chunk))


def _local(hidden, head, labels, dtype, chunk: int):
    """The losses [n] of one device's tokens, hidden [n, d], labels [n]."""
    count = len(labels)
    pad = -count % min(chunk, count)
    hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(-1, min(chunk, count), hidden.shape[1])
    labels = jnp.pad(labels, (0, pad), constant_values=IGNORED).reshape(hidden.shape[:2])

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
    def of_chunk(head, h, label):
        logits = _project(h.astype(dtype), head)
        own = jnp.take_along_axis(logits, jnp.maximum(label, 0)[:, None], axis=1)[:, 0]
        return jnp.where(label >= 0, jax.nn.logsumexp(logits, axis=1) - own, 0.0)

    return lax.scan(lambda _, x: (None, of_chunk(head, *x)), None, (hidden, labels))[1].reshape(-1)[:count]


@jax.custom_vjp
def _project(h, head):
    """Logits float32 [n, V] of h [n, d] and a float32 head, multiplied in h's dtype.

    A plain cast of the head would round its gradient to that dtype for every chunk.
    """
    return jnp.matmul(h, head.astype(h.dtype), preferred_element_type=jnp.float32)


def _project_bwd(residuals, dlogits):
    h, head = residuals
    dlogits = dlogits.astype(h.dtype)
    dh = jnp.matmul(dlogits, head.astype(h.dtype).T)
    return dh, jnp.matmul(h.T, dlogits, preferred_element_type=jnp.float32)


_project.defvjp(lambda h, head: (_project(h, head), (h, head)), _project_bwd)


def predicted(labels) -> jax.Array:
    """How many tokens of the global batch are predicted: float32 scalar."""
    return jnp.sum(labels >= 0, dtype=jnp.int32).astype(jnp.float32)  # exact beyond 2**24
