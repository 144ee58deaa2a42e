"""A slice of a real model as bench_slice.py and bench_multigpu.py run it: built, checked, and a training step of it."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from bench import verdict
from bench_layer import compile_all
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from zigzag_jax import to_zigzag
from zigzag_jax.hlo import Program
from zigzag_jax.models.flops import H100_FLOPS, training_flops
from zigzag_jax.models.options import KernelOptions
from zigzag_jax.models.presets import PRESETS
from zigzag_jax.models.registry import ModelConfig, model_of
from zigzag_jax.models.router import balanced_routes
from zigzag_jax.models.sharding import Sharding, abstract_state, expert_axes, expert_rules, parameter_shardings
from zigzag_jax.train.step import TrainState, make_step, state_shardings
from zigzag_jax.train.task import Losses, Task

AXES = ("dp", "fsdp", "cp")
CHECKED = 1024  # tokens of the check: float32 arithmetic in plain XLA is slow
# Relative differences. Rounding to bfloat16 also sends a token to another expert here and there, which changes the
# experts' and the routers' gradients by a tenth; a gradient that is missing or counted twice is off by 1.
BARS = {"loss": 2e-3, "worst gradient": 0.4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BalancedTask(Task):
    """Tokens go to all experts in turn: a random model's router gives some of them many times what others get."""

    config: ModelConfig
    """The model's sizes."""

    def _forward(self, params: nnx.State, batch: dict[str, jax.Array]):
        model, c = nnx.merge(self.graphdef, params), self.config
        places = batch["positions"]  # of one document: in the order of the tokens, as routes must be
        routes = balanced_routes(places, sum(c.sparse_layers), c.expert_count, c.num_experts_per_tok)
        hidden, stats = model(batch["tokens"], batch["positions"], real=batch["real"], routes=routes)
        return hidden, stats, model.head_weight


class Slice(NamedTuple):
    """Some layers of a model, embedding and head, on the devices of a ring."""

    config: ModelConfig
    sharding: Sharding
    remat: str
    options: KernelOptions
    balanced: bool = False
    """Whether all experts have the same work."""

    @classmethod
    def of(
        cls, name: str, layers: int, remat: str, cp: int = 1, ep: int = 1, *, balanced: bool = False, **options: Any
    ) -> "Slice":
        """So many layers of a preset, on the first cp devices, ep = 1 or cp of which share the experts out among
        themselves; `options` are fields of KernelOptions.
        """
        mesh = Mesh(np.array(jax.devices()[:cp]).reshape(1, 1, cp), AXES)
        config = dataclasses.replace(PRESETS[name], num_hidden_layers=layers)
        sharding = Sharding(mesh, expert_rules(expert_axes(ep, fsdp=1, cp=cp)))
        return cls(config, sharding, remat, KernelOptions(**options), balanced)

    @property
    def cp(self) -> int:
        """Devices of the ring."""
        return self.sharding.mesh.size

    def make(self, rngs: nnx.Rngs, dtype: Any = jnp.bfloat16, options: KernelOptions | None = None) -> nnx.Module:
        """The model itself."""
        model, options = model_of(self.config), options or self.options
        return model(self.config, self.sharding, dtype=dtype, remat=self.remat, options=options, rngs=rngs)

    def task(self, dtype: Any = jnp.bfloat16, options: KernelOptions | None = None) -> Task:
        """What it is trained for, in arithmetic of `dtype`."""
        graphdef = abstract_state(lambda rngs: self.make(rngs, dtype, options))[0]
        what = graphdef, self.sharding, dtype, self.config.aux_loss, self.config.aux_coefficient
        return BalancedTask(*what, config=self.config) if self.balanced else Task(*what)

    def batch(self, length: int) -> dict[str, jax.Array]:
        """One document of random tokens, in zigzag order."""
        tokens = np.random.default_rng(0).integers(0, self.config.vocab_size, (1, length + 1), dtype=np.int32)
        arrays = {
            "tokens": tokens[:, :-1],
            "labels": tokens[:, 1:],
            "positions": np.arange(length, dtype=np.int32)[None],
            "real": np.ones((1, length), bool),
        }
        arrays = {name: to_zigzag(x, self.cp) for name, x in arrays.items()}
        return jax.device_put(arrays, NamedSharding(self.sharding.mesh, P(("dp", "fsdp"), "cp")))

    def speed(self, length: int, ms: float, peak: float = H100_FLOPS) -> dict[str, float | None]:
        """What a pass over `length` tokens in `ms` is worth, and the most memory that the first device has held."""
        memory = jax.devices()[0].memory_stats()  # a CPU has none
        rate = training_flops(self.config, length) / (ms / 1e3)
        return {
            "tokens/s": length / ms * 1e3, "MFU": rate / peak / self.cp,
            "peak GiB": memory and memory["peak_bytes_in_use"] / 2**30,
        }  # fmt: skip

    def gradient(self, task: Task):
        """(params, batch) -> ((objective, Losses), gradients), not yet jitted."""
        return jax.value_and_grad(task.objective, has_aux=True)

    def check(self, params: nnx.State, length: int) -> list[dict]:
        """Loss and gradient of `length` tokens against float32 and plain XLA's kernels, experts not shared out: the
        loss, and the parameter whose gradient is worst.
        """
        whole = self._replace(sharding=Sharding(self.sharding.mesh))
        batch, moved = self.batch(length), jax.device_put(params, parameter_shardings(params, whole.sharding))
        exact = whole.task(jnp.float32, KernelOptions(implementation="reference"))
        passes = {"mine": (self.task(), params), "exact": (exact, moved)}
        arguments = {name: (start, batch) for name, (_, start) in passes.items()}
        run = compile_all({name: (self.gradient(task), arguments[name]) for name, (task, _) in passes.items()})

        def found(name: str) -> tuple[float, dict[str, jax.Array]]:
            (_, losses), grads = run[name](*arguments[name])
            return float(losses.loss), {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(grads)}

        got, mine = found("mine")
        mine = jax.device_get(mine)  # two gradients on the card would be the peak of its memory that is told later
        want, exact = found("exact")
        off = {name: float(_apart(jax.device_put(mine[name], x.sharding), x)) for name, x in exact.items()}
        where = max(off, key=lambda name: math.inf if math.isnan(off[name]) else off[name])
        errors = {"loss": abs(got / want - 1), "worst gradient": off[where]}
        figures = {name: f"{error:.1e}" for name, error in errors.items()}
        return [{"by": "zigzag_jax", **figures, "of": where, "verdict": verdict(errors, BARS)}]


@jax.jit
def _apart(got, want) -> jax.Array:
    """Relative L2."""
    return jnp.sqrt(jnp.sum(jnp.square(got - want)) / jnp.sum(jnp.square(want)))


class Training:
    """AdamW on a slice: `once` is a step, which replaces the state."""

    def __init__(self, this: Slice, params: nnx.State, length: int):
        """Takes the parameters, whose buffers the first step gives on; float32 moments."""
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5, weight_decay=0.1))
        where = state_shardings(jax.eval_shape(lambda: params), tx, this.sharding)
        self.state = TrainState(params, jax.jit(tx.init, out_shardings=where.opt_state)(params))
        self.batch = this.batch(length)
        step = jax.jit(make_step(this.task(), tx), donate_argnums=0, out_shardings=(where, None))
        self.step = step.lower(self.state, self.batch).compile()

    def program(self) -> Program:
        """The step as XLA compiled it."""
        return Program(self.step.as_text() or "")

    def once(self) -> Losses:
        """A step on the same batch; what it lost before it."""
        self.state, metrics = self.step(self.state, self.batch)
        return metrics.losses
