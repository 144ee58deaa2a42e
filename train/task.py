"""What is learnt: the language-modelling loss of a model, as functions of (parameters, batch).

A batch is the dict of train/data.py: tokens, labels, positions, real, each [B, S] in zigzag order. Both losses are sums
over the tokens of the whole batch divided once by their number, so that no mesh, padding or packing changes them.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from zigzag_jax.models.balance import AuxLoss, load_balancing_loss
from zigzag_jax.models.sharding import Sharding
from zigzag_jax.train.loss import cross_entropy, cross_entropy_sum, predicted


class Losses(NamedTuple):
    """What is said of one batch, float32: scalars but for the last."""

    loss: jax.Array
    """Mean cross-entropy of the predicted tokens, in nats."""
    aux_loss: jax.Array
    """Load-balancing loss of the routers, before its coefficient."""
    tokens: jax.Array
    """Predicted tokens."""
    load: jax.Array
    """[MoE layers, E]: how often each expert was chosen."""


@dataclass(frozen=True)
class Task:
    """A model's structure and what it is trained for; its methods are pure and may be jitted."""

    graphdef: nnx.GraphDef
    """The model without its parameters."""
    sharding: Sharding
    """Where its arrays live."""
    dtype: Any
    """Dtype of the arithmetic."""
    aux_form: AuxLoss
    """Which auxiliary loss."""
    aux_coefficient: float
    """Weight of aux_loss in the objective."""

    def objective(self, params: nnx.State, batch: dict[str, jax.Array]) -> tuple[jax.Array, Losses]:
        """What the optimiser lowers, loss + aux_coefficient * aux_loss, and its parts."""
        losses = self.losses(params, batch)
        return losses.loss + self.aux_coefficient * losses.aux_loss, losses

    def losses(self, params: nnx.State, batch: dict[str, jax.Array]) -> Losses:
        """The losses of a batch."""
        model = nnx.merge(self.graphdef, params)
        hidden, stats = model(batch["tokens"], batch["positions"], real=batch["real"])
        with jax.named_scope("loss"):
            total = cross_entropy_sum(
                hidden, model.head_weight, batch["labels"], mesh=self.sharding.mesh, dtype=self.dtype
            )
        tokens = predicted(batch["labels"])
        return Losses(total / jnp.maximum(tokens, 1.0), load_balancing_loss(stats, self.aux_form), tokens, stats.load)

    def token_losses(self, params: nnx.State, batch: dict[str, jax.Array]) -> jax.Array:
        """The cross-entropy of each token of a batch, float32 [B, S] in zigzag order, 0 where nothing is predicted."""
        model = nnx.merge(self.graphdef, params)
        hidden, _ = model(batch["tokens"], batch["positions"], real=batch["real"])
        return cross_entropy(hidden, model.head_weight, batch["labels"], mesh=self.sharding.mesh, dtype=self.dtype)
