"""The batch that broke a run, kept for replay: OUT/bad_batch_STEP.npz.

It holds what `Batches.at(STEP - 1)` gave to the step: tokens, labels, positions, real, [batch, S_pad] in zigzag order.
Of several processes each writes what it holds, OUT/bad_batch_STEP-process-I.npz: arrays named FIELD[ROWS,COLUMNS] by
their place in the whole, such as tokens[0:4,128:256].
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from zigzag_jax.train.errors import RunError
from zigzag_jax.train.step import StepMetrics


def check_finite(
    step: int, result: StepMetrics, batch: Mapping[str, jax.Array], folder: Path, newest: Callable[[], str]
) -> None:
    """RunError, the batch kept in `folder`, where the loss or the gradient of step number `step` is not finite.

    Call it before anything of the new state is saved; `newest` says which checkpoint there is. Where both are finite
    the new state is too: the optimiser's updates are.
    """
    for name, value in (("loss", result.losses.loss), ("gradient norm", result.grad_norm)):
        if not math.isfinite(value):
            kept = save_batch(folder, step, batch)
            raise RunError(f"step {step}: the {name} is {float(value)}, training stops; {newest()}; {kept}")


def save_batch(folder: Path, step: int, batch: Mapping[str, jax.Array]) -> str:
    """Write what this process holds of the batch; returns words that say where, or why not."""
    several = jax.process_count() > 1
    path = folder / f"bad_batch_{step}{f'-process-{jax.process_index()}' if several else ''}.npz"
    arrays: dict[str, np.ndarray] = {}
    for field, array in batch.items():
        if not several:
            arrays[field] = np.asarray(array)
            continue
        for shard in array.addressable_shards:
            place = (range(n)[part] for n, part in zip(array.shape, shard.index, strict=True))
            where = ",".join(f"{part.start}:{part.stop}" for part in place)
            arrays[f"{field}[{where}]"] = np.asarray(shard.data)
    try:
        np.savez(path, allow_pickle=False, **arrays)
    except OSError as error:
        return f"its batch could not be kept ({error.strerror})"
    return f"its batch is {path}"
