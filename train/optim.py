"""AdamW with warm-up, a schedule that ends at --steps, and clipping by the global norm."""

import jax
import optax

from zigzag_jax.models.balance import BIAS
from zigzag_jax.train.config import OptimConfig


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate of step n (from 0): linear warm-up, then the named schedule down to its end at `steps`."""
    peak, end = config.learning_rate, config.learning_rate * config.final_fraction
    rest = max(1, steps - config.warmup)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction),
        "linear": optax.linear_schedule(peak, end, rest),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    # step 0 already learns: the warm-up ends, not begins, at its full value
    warmup = optax.linear_schedule(peak / (config.warmup + 1), peak, config.warmup)
    return optax.join_schedules([warmup, after], [config.warmup])


def optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """The run's optimiser; its state is sharded like the parameters it belongs to."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(schedule(config, steps), config.b1, config.b2, weight_decay=config.weight_decay, mask=_decayed),
    )


def _decayed(params):
    # norms and router biases are vectors, stacked over layers [L, d]; matrices have two dimensions of their own
    def one(path, _):
        name = jax.tree_util.keystr(path).lower()
        return "norm" not in name and BIAS not in name

    return jax.tree_util.tree_map_with_path(one, params)
