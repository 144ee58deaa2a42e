"""The program of a run: the optimiser step of its Config on a mesh, jitted, and its state as shapes.

Nothing is computed and no device is asked, so the mesh may be one of devices that are only described: the trainer runs
this program, `plan` compiles it for GPUs that are not there.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from zigzag_jax.models.registry import ModelConfig
from zigzag_jax.models.sharding import abstract_state
from zigzag_jax.train.config import Config
from zigzag_jax.train.groups import check_groups
from zigzag_jax.train.mesh import make_sharding
from zigzag_jax.train.models import maker
from zigzag_jax.train.optim import optimizer
from zigzag_jax.train.step import TrainState, abstract_train_state, make_step
from zigzag_jax.train.task import Task


@dataclass(frozen=True)
class Program:
    """What is the same at every step of a run."""

    task: Task
    """Its model and loss."""
    tx: optax.GradientTransformation
    """Its optimiser."""
    parameters: nnx.State
    """Its parameters as shapes."""
    state: TrainState
    """Its state as shapes with shardings."""
    step: jax.stages.Wrapped
    """Jitted step(state, batch) -> (state, metrics); it takes the state's buffers for the new one."""


def make_program(config: Config, sizes: ModelConfig, mesh: Mesh, implementation: str | None = None) -> Program:
    """The program of `config`; `implementation` names the kernels (KernelOptions). UserError for an ep or a parameter
    group that does not fit.
    """
    sharding = make_sharding(config, sizes, mesh)
    graphdef, parameters = abstract_state(maker(config, sizes, sharding, implementation))
    check_groups(config.optim.groups, parameters)
    tx = optimizer(config.optim, config.steps)
    coefficient = config.router.aux_coefficient
    coefficient = sizes.aux_coefficient if coefficient is None else coefficient
    form, dtype = config.router.aux_loss or sizes.aux_loss, jnp.dtype(config.dtype)
    task = Task(graphdef, sharding, dtype, form, coefficient, config.optim.z_loss)
    step = jax.jit(make_step(task, tx, config.router.bias_rate, config.accumulate), donate_argnums=0)
    return Program(task, tx, parameters, abstract_train_state(parameters, tx, sharding), step)
