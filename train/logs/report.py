"""What a run says at its end: has it learnt, what does it write, how does one go on.

The held-out loss means little alone. Beside it stand the cross-entropies, on the same held-out tokens, of a unigram and
an interpolated bigram model fitted on the training text: a model below the bigram has learnt more than which word
follows which.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from zigzag_jax.train.data import ngram
from zigzag_jax.train.data.batches import BLANK, Batches
from zigzag_jax.train.data.dataset import Dataset
from zigzag_jax.train.data.token_file import Tokens
from zigzag_jax.train.logs import metrics
from zigzag_jax.train.task import Losses

_EVAL_TOKENS = 32768  # held-out places that are scored: enough for the second digit, seconds on a CPU


class HeldOut:
    """The held-out batches that every evaluation of a run scores."""

    def __init__(self, batches: Batches, accumulate: int = 1) -> None:
        """`batches` of 1 / accumulate of a training step's rows: what a device has room for."""
        self.batches = batches
        # counted in tokens before padding and in whole steps, so that every mesh scores the same rows
        steps = max(1, _EVAL_TOKENS // (accumulate * batches.batch * batches.plan.seq_len))
        self.count = min(len(batches), accumulate * steps)

    @property
    def rows(self) -> int:
        """Rows of the plan's stream that these batches hold."""
        return min(self.count * self.batches.batch, self.batches.plan.rows)

    def loss(self, losses: Callable[..., Losses], params: nnx.State, part: Callable[[], None] = lambda: None) -> float:
        """Mean cross-entropy in nats over the predicted tokens of these batches; losses(params, batch) -> Losses.

        `part` is called after each batch.
        """
        parts: list[Losses] = []
        for n in range(self.count):  # one batch at a time: a hundred in flight at once can hang CPU devices
            parts.append(jax.device_get(losses(params, self.batches.at(n))))
            part()
        tokens = np.array([float(p.tokens) for p in parts])
        return float(np.dot([float(p.loss) for p in parts], tokens) / tokens.sum())

    def baselines(self, dataset: Dataset[Tokens]) -> tuple[float, float]:
        """(unigram, bigram) cross-entropy in nats on the same tokens."""
        rows = np.concatenate([self.batches.rows(n) for n in range(self.count)])
        block = self.batches.natural(rows[rows != BLANK])
        return ngram.fit(dataset.train, dataset.vocab_size).cross_entropy(block["tokens"], block["labels"])


def prompts(dataset: Dataset[Tokens], rows: int, length: int) -> np.ndarray:
    """The first `length` tokens of `rows` held-out documents that are long enough: int32 [rows, length]."""
    store = dataset.held_out
    long = np.flatnonzero(store.lengths > length)
    if not len(long):
        return np.zeros((rows, length), np.int32)
    chosen = store.offsets[long[np.linspace(0, len(long) - 1, rows).astype(int)]]
    return np.stack([store.read(at, at + length) for at in chosen]).astype(np.int32)


def draw_loss(
    metrics_path: Path, baselines: tuple[float, float], picture: Path, say: Callable[[str], None] = lambda text: None
) -> None:
    """The loss curve as a PNG, with the held-out loss and the two baselines; `say` as metrics.read has it."""
    from matplotlib.figure import Figure  # slow to import, and only needed here

    train, held_out = metrics.read(metrics_path, "loss", say), metrics.read(metrics_path, "eval_loss")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*_curve(train), color="#8ab4d8", linewidth=1, label="training")
    axes.plot(*_curve(held_out), color="#12476b", marker="o", markersize=4, label="held out")
    for value, name, style in zip(baselines, ("unigram", "bigram"), (":", "--"), strict=True):
        axes.axhline(value, color="#b5541c", linestyle=style, linewidth=1, label=f"{name} {value:.2f}")
    axes.set(xlabel="step", ylabel="cross-entropy, nats a token", title="Loss")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=130)


def _curve(points: dict[int, float]) -> tuple[list[int], list[float]]:
    steps = sorted(points)
    return steps, [points[step] for step in steps]
