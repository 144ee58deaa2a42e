"""What is learnt: the language-modelling loss of a model, as functions of (parameters, batch).

A batch is the dict of train/data/batches.py: tokens, labels, positions, real, each [B, S] in zigzag order. Both losses
are sums over the tokens of the whole batch divided once by their number, so that no mesh, padding or packing changes
them.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from zigzag_jax.models.balance import AuxLoss, RouterStats, WholeBatch, load_balancing_loss
from zigzag_jax.models.sharding import Sharding
from zigzag_jax.train.loss import cross_entropy, cross_entropy_sum, predicted


class Losses(NamedTuple):
    """What is said of one batch, float32: scalars but for load."""

    loss: jax.Array
    """Mean cross-entropy of the predicted tokens, in nats."""
    aux_loss: jax.Array
    """Load-balancing loss of the routers, before its coefficient."""
    tokens: jax.Array
    """Predicted tokens."""
    load: jax.Array
    """[MoE layers, E]: how often each expert was chosen."""
    z_loss: jax.Array
    """Mean of lse^2, the squared logarithm of the softmax's denominator, before its coefficient."""


class Whole(NamedTuple):
    """What a micro-batch has to know of the batch that it is a part of, float32."""

    predicted: jax.Array
    """Its predicted tokens."""
    router: WholeBatch
    """What its routers see."""


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

    z_coefficient: float = 0.0
    """Weight of z_loss in the objective."""

    def objective(
        self, params: nnx.State, batch: dict[str, jax.Array], whole: Whole | None = None
    ) -> tuple[jax.Array, Losses]:
        """What the optimiser lowers, loss + aux_coefficient * aux_loss + z_coefficient * z_loss, and its parts.

        With `whole`, `batch` is a micro-batch, and all that comes back is its share: the shares of a batch's
        micro-batches, and their gradients, add up to those of the batch (models/balance.py tells the exception).
        """
        hidden, stats, head = self._forward(params, batch)
        with jax.named_scope("loss"):
            sums = cross_entropy_sum(
                hidden, head, batch["labels"], mesh=self.sharding.mesh, dtype=self.dtype, z_loss=self.z_coefficient
            )
        tokens = predicted(batch["labels"])
        divisor = jnp.maximum(tokens if whole is None else whole.predicted, 1.0)
        aux_loss = load_balancing_loss(stats, self.aux_form, None if whole is None else whole.router)
        losses = Losses(sums.loss / divisor, aux_loss, tokens, stats.load, sums.z / divisor)
        return sums.objective / divisor + self.aux_coefficient * aux_loss, losses

    def losses(self, params: nnx.State, batch: dict[str, jax.Array]) -> Losses:
        """The losses of a batch."""
        return self.objective(params, batch)[1]

    def load(self, params: nnx.State, batch: dict[str, jax.Array]) -> jax.Array:
        """Losses.load alone."""
        return self._forward(params, batch)[1].load

    @property
    def counts_first(self) -> bool:
        """Whether the objective of a micro-batch needs the load of its whole batch."""
        return self.aux_form == "hf" and self.aux_coefficient > 0

    def token_losses(self, params: nnx.State, batch: dict[str, jax.Array]) -> jax.Array:
        """The cross-entropy of each token of a batch, float32 [B, S] in zigzag order, 0 where nothing is predicted."""
        hidden, _, head = self._forward(params, batch)
        return cross_entropy(hidden, head, batch["labels"], mesh=self.sharding.mesh, dtype=self.dtype)

    def _forward(self, params: nnx.State, batch: dict[str, jax.Array]) -> tuple[jax.Array, RouterStats, jax.Array]:
        """Hidden states, router statistics and the head."""
        model = nnx.merge(self.graphdef, params)
        hidden, stats = model(batch["tokens"], batch["positions"], real=batch["real"])
        return hidden, stats, model.head_weight
