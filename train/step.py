"""One optimiser step, and the state it takes from step to step.

The state is sharded over the mesh as the parameters are, the moments beside the parameters they belong to; the jitted
step gives its buffers on (donation), so that a step needs one copy of the state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from zigzag_jax.models.balance import move_biases
from zigzag_jax.models.sharding import Sharding, parameter_shardings
from zigzag_jax.train.accumulate import losses_and_gradients
from zigzag_jax.train.task import Losses, Task


class TrainState(NamedTuple):
    """All that changes while a model is trained."""

    params: nnx.State
    opt_state: Any


class StepMetrics(NamedTuple):
    """Float32 scalars of one step."""

    losses: Losses
    grad_norm: jax.Array
    """Global norm of the gradient, before clipping."""


def state_shardings(shapes: nnx.State, tx: optax.GradientTransformation, sharding: Sharding) -> TrainState:
    """The NamedSharding of every array of the state; `shapes` are the parameters as shapes."""
    params = parameter_shardings(shapes, sharding)
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    own = dict(jax.tree_util.tree_leaves_with_path(params))

    def place(path: tuple[Any, ...], _: Any) -> NamedSharding:
        # a moment's path ends with that of its parameter (optax.tree.map_params cannot see through a partition's masks)
        return next((own[path[n:]] for n in range(len(path)) if path[n:] in own), everywhere)

    opt_state = jax.tree_util.tree_map_with_path(place, jax.eval_shape(tx.init, shapes))
    return TrainState(params, opt_state)


def abstract_train_state(shapes: nnx.State, tx: optax.GradientTransformation, sharding: Sharding) -> TrainState:
    """The state as shapes with shardings: what a checkpoint is restored into."""
    whole = TrainState(shapes, jax.eval_shape(tx.init, shapes))
    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    return jax.tree.map(place, whole, state_shardings(shapes, tx, sharding))


def make_step(
    task: Task, tx: optax.GradientTransformation, bias_rate: float = 0.0, accumulate: int = 1
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """step(state, batch) -> (state, metrics), not yet jitted; `bias_rate` moves the routers' biases (balance.py),
    `accumulate` is the number of micro-batches (accumulate.py).
    """

    def step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, StepMetrics]:
        losses, grads = losses_and_gradients(task, state.params, batch, accumulate)
        with jax.named_scope("optimizer"):
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = cast(nnx.State, optax.apply_updates(cast(Any, state.params), updates))
            if bias_rate > 0:
                params = move_biases(params, losses.load, bias_rate)
        return TrainState(params, opt_state), StepMetrics(losses, optax.tree.norm(grads))

    return step
