"""AdamW or Muon, with warm-up, a schedule that ends at --steps, and clipping by the global norm.

    gradient -> clipped -> direction (Adam's, or Muon's for hidden matrices) -> + decay * parameter -> * -rate * scale

Parameters are float32 whatever the arithmetic's dtype (they are the master weights), and so are gradients and moments.
What is done to which parameter is decided by its name (groups.py).
"""

from collections.abc import Hashable
from typing import Any

import jax
import optax

from zigzag_jax.train.config import OptimConfig
from zigzag_jax.train.groups import is_hidden_matrix, lr_and_decay, name_of, parse
from zigzag_jax.train.muon import scale_by_muon


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate of step n (from 0): linear warm-up, then the named schedule down to its end at `steps`."""
    peak, end = config.learning_rate, config.learning_rate * config.final_fraction
    rest = max(1, steps - config.warmup)
    # step 0 already learns: the warm-up ends, not begins, at its full value
    warmup = optax.linear_schedule(peak / (config.warmup + 1), peak, config.warmup)
    if config.schedule == "wsd":
        decay = min(rest, max(1, round(config.decay_fraction * steps)))
        after = optax.linear_schedule(peak, end, decay, transition_begin=rest - decay)
    else:
        after = {
            "cosine": optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction),
            "linear": optax.linear_schedule(peak, end, rest),
            "constant": optax.constant_schedule(peak),
        }[config.schedule]
    return optax.join_schedules([warmup, after], [config.warmup])


def optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """The run's optimiser; its state is sharded like the parameters it belongs to."""
    direction = optax.scale_by_adam(config.b1, config.b2)
    if config.name == "muon":
        by_kind: dict[Hashable, optax.GradientTransformation] = {
            "muon": scale_by_muon(config.muon_momentum),
            "adam": direction,
        }
        direction = optax.partition(by_kind, _kinds)
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        direction,
        _decay_and_scale(config),
        optax.scale_by_learning_rate(schedule(config, steps)),
    )


def _kinds(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "muon" if is_hidden_matrix(name_of(path)) else "adam", params
    )


def _decay_and_scale(config: OptimConfig) -> optax.GradientTransformation:
    groups = tuple(parse(text) for text in config.groups)

    def update(updates: Any, params: Any) -> Any:
        def one(path, u, p):
            scale, decay = lr_and_decay(name_of(path), groups, config.weight_decay)
            return scale * (u + decay * p if decay else u)

        return jax.tree_util.tree_map_with_path(one, updates, params)

    return optax.stateless(update)
