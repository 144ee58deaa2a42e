"""Gradient accumulation: a batch in N micro-batches, one after another, as one optimiser step.

    rows of a device      a b c d | e f g h      (two devices, N = 2)
    micro-batch 0         a b     | e f
    micro-batch 1             c d |     g h

Every device goes through its own rows, so nothing moves; which rows of the data those are is up to Batches, which deals
them out so that micro-batches do not depend on the mesh. Only one micro-batch's activations exist at a time; the price
is one more copy of the gradient, float32, cut over the devices like the parameters.

The loss of a batch is a sum over its tokens divided once by their number. That number is in the labels, so it is known
before the first micro-batch: each yields its share, and shares and gradients are added. Nothing is averaged, and a
micro-batch of few tokens weighs as little as it should. Of the auxiliary losses `sequence` adds up as exactly, `hf`
after a forward pass that counts the whole batch's experts, and `batch` is one of micro-batches (models/balance.py).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from zigzag_jax.models.balance import WholeBatch
from zigzag_jax.models.sharding import parameter_shardings
from zigzag_jax.train.loss import predicted
from zigzag_jax.train.mesh import ROWS
from zigzag_jax.train.task import Losses, Task, Whole

Batch = dict[str, jax.Array]


def losses_and_gradients(task: Task, params: nnx.State, batch: Batch, count: int) -> tuple[Losses, nnx.State]:
    """Losses of a batch and the gradient of the objective, in `count` micro-batches."""
    value_and_grad = jax.value_and_grad(task.objective, has_aux=True)
    if count == 1:
        (_, losses), grads = value_and_grad(params, batch)
        return losses, grads
    parts, where = micro_batches(task, batch, count), parameter_shardings(params, task.sharding)
    load = _total(lambda part: task.load(params, part), parts) if task.counts_first else None
    real = jnp.sum(batch["real"], dtype=jnp.int32).astype(jnp.float32)
    whole = Whole(predicted(batch["labels"]), WholeBatch(real, load))

    def one(part: Batch) -> tuple[Losses, nnx.State]:
        (_, losses), grads = value_and_grad(params, part, whole)
        return losses, lax.with_sharding_constraint(grads, where)  # else the loop may carry it whole

    with jax.named_scope("micro_batches"):
        return _total(one, parts)


def micro_batches(task: Task, batch: Batch, count: int) -> Batch:
    """[B, S] -> [count, B / count, S]: each device's rows, cut in order."""
    mesh = task.sharding.mesh
    where = NamedSharding(mesh, PartitionSpec(None, ROWS, "cp"))
    devices = mesh.shape["dp"] * mesh.shape["fsdp"]

    def cut(x: jax.Array) -> jax.Array:
        rows, length = x.shape
        x = x.reshape(devices, count, rows // (devices * count), length)
        return lax.with_sharding_constraint(jnp.swapaxes(x, 0, 1).reshape(count, rows // count, length), where)

    return {name: cut(x) for name, x in batch.items()}


def _total(function: Any, parts: Batch) -> Any:
    """The sum of function(part) over the parts."""
    shapes = jax.eval_shape(function, {name: x[0] for name, x in parts.items()})
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, function(part)), None), zeros, parts)[0]
