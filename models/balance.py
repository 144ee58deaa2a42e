"""Keeping the experts' load level: auxiliary losses, and a bias instead of a loss.

**A loss** pushes down experts that are chosen often and believed in much. For T tokens, f_e = how often expert e was
chosen / T and P_e = its mean probability; the loss is E * sum_e f_e * P_e: k for a router that spreads its tokens
evenly, up to E for one that does not. Only P has a gradient. There are several losses of this name, which differ in
what one product is taken over; all have the same scale here:

    hf          all tokens of all layers, as one long list: Hugging Face's `load_balancing_loss_func`
    batch       all tokens of one layer; the mean over layers (Switch Transformer, Fedus et al. 2021, section 2.2)
    sequence    the tokens of one row in one layer; the mean over layers, and over rows weighted by their real tokens
                (DeepSeek-V2, arXiv:2405.04434, section 2.2.3, whose L_ExpBal is this divided by k)

All are made of sums over real tokens, so no mesh and no padding changes them. A batch cut into micro-batches is another
matter, since a product of sums is not the sum of the parts' products. Each micro-batch then has a *share*, and the
batch's loss is the sum of the shares:

    sequence    its rows' losses, by real tokens: the same number as without micro-batches
    hf          the whole batch's f with its own P: the same number again, but f has to be counted first
    batch       the product over itself, by real tokens: a loss of micro-batches, another number than without

**A bias** on the scores by which experts are chosen (router.py) is moved a fixed step after every batch: up for experts
that had less than their share, down for those that had more. It has no gradient and disturbs none (Wang et al. 2024,
arXiv:2408.15664).
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

AuxLoss = Literal["hf", "batch", "sequence"]
AUX_LOSSES: tuple[AuxLoss, ...] = ("hf", "batch", "sequence")
BIAS = "bias"  # the last key of a router bias's path


class RouterStats(NamedTuple):
    """Router statistics of a whole model: for each row, sums over its real tokens."""

    counts: jax.Array
    """[MoE layers, B, E] float32: how often each expert was chosen."""

    probs: jax.Array
    """[MoE layers, B, E] float32: the sum of its probability."""

    tokens: jax.Array
    """[B] float32: the real tokens of each row."""

    routes: jax.Array
    """[MoE layers, B, S, k] int32: the experts of every token, padding too; not computed where nobody reads it."""

    @property
    def load(self) -> jax.Array:
        """[MoE layers, E] float32: how often each expert was chosen in the whole batch."""
        return jnp.sum(self.counts, axis=1)


class WholeBatch(NamedTuple):
    """What a micro-batch has to know of the batch that it is a part of."""

    tokens: jax.Array
    """Real tokens, float32 scalar."""

    load: jax.Array | None
    """RouterStats.load; None: not counted, and `hf` is then taken like `batch`, by micro-batches."""


def load_balancing_loss(stats: RouterStats, form: AuxLoss = "hf", whole: WholeBatch | None = None) -> jax.Array:
    """The auxiliary loss of a batch, before its coefficient: float32 scalar, 0 where there is nothing to balance.

    With `whole` it is the share of a micro-batch in the loss of the whole.

    One layer, one row of four tokens, each of two experts chosen twice (top-1):
    >>> load_balancing_loss(RouterStats(jnp.array([[[2., 2]]]), jnp.array([[[1., 3]]]), jnp.array([4.]), None))
    Array(1., dtype=float32)
    """
    if form not in AUX_LOSSES:
        raise ValueError(f"the auxiliary loss must be one of {', '.join(AUX_LOSSES)}, got {form!r}")
    layers, _, experts = stats.counts.shape
    if not layers:
        return jnp.zeros((), jnp.float32)
    over = {"hf": (0, 1), "batch": (1,), "sequence": ()}[form]
    counts, probs = (jnp.sum(x, axis=over, keepdims=True) for x in (stats.counts, stats.probs))
    own = stats.tokens[None] if form == "sequence" else jnp.sum(stats.tokens)[None, None]  # [1, rows or 1]
    total = jnp.sum(stats.tokens) if whole is None else whole.tokens
    if form == "hf" and whole is not None and whole.load is not None:
        counts, own = jnp.sum(whole.load, axis=0)[None, None], total[None, None]
    tokens = jnp.maximum(own * (layers if form == "hf" else 1), 1.0)[..., None]  # nothing but padding has no loss
    products = experts * jnp.sum((counts / tokens) * (probs / tokens), axis=2)  # [layers or 1, rows or 1]
    return jnp.mean(jnp.sum(products * own, axis=1)) / jnp.maximum(total, 1.0)


def move_biases(params: nnx.State, load: jax.Array, rate: float) -> nnx.State:
    """The parameters with every router bias moved by `rate` towards an even load.

    `load` [MoE layers, E] is RouterStats.load of the batch. The layers' mean is taken out, so that biases stay near 0.
    """
    moves = rate * jnp.sign(jnp.mean(load, axis=1, keepdims=True) - load)
    flat, at = dict(nnx.to_flat_state(params)), 0
    for path in sorted((path for path in flat if path[-1] == BIAS), key=lambda path: path[1]):  # groups in their order
        bias = flat[path].get_value()
        moved = bias + moves[at : at + len(bias)]
        flat[path] = flat[path].replace(moved - jnp.mean(moved, axis=1, keepdims=True))
        at += len(bias)
    if at != len(load):
        raise ValueError(f"every one of the {len(load)} MoE layers must have a router bias, got {at}")
    return nnx.from_flat_state(list(flat.items()))
