"""A few lines that the model writes: text continued token by token, to see what it has learnt.

Each token costs a whole forward pass over a short buffer: no cache, one compiled program, the same ring as in training.
"""

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from zigzag_jax.layout import to_zigzag, zigzag_indices
from zigzag_jax.train.data import padded
from zigzag_jax.train.mesh import ROWS
from zigzag_jax.train.task import Task


def continue_texts(task: Task, params, prompts: np.ndarray, count: int, *, seed: int, temperature: float) -> np.ndarray:
    """Continue each row of int prompts [B, n] by `count` tokens: int32 [B, n + count]; B divides over (dp, fsdp).

    Tokens are drawn from softmax(logits / temperature); the same seed draws the same tokens.
    """
    mesh, (batch, begin) = task.sharding.mesh, prompts.shape
    cp, length = mesh.shape["cp"], begin + count
    size = padded(length, cp)
    where = NamedSharding(mesh, P(ROWS, "cp"))
    place = np.argsort(zigzag_indices(size, cp)).astype(np.int32)
    put = lambda x: jax.make_array_from_callback(x.shape, where, lambda index: x[index])
    positions = put(to_zigzag(np.tile(np.arange(size, dtype=np.int32), (batch, 1)), cp))
    # replicated logits, so that every process draws the same tokens
    logits_at = jax.jit(task.logits_at, out_shardings=NamedSharding(mesh, P()))
    text, rng = np.zeros((batch, size), np.int32), np.random.default_rng(seed)
    text[:, :begin] = prompts
    for at in range(begin, length):
        logits = np.asarray(logits_at(params, put(to_zigzag(text, cp)), positions, place[at - 1]), np.float64)
        noise = rng.gumbel(size=logits.shape)  # argmax(logits / t + gumbel noise) is a draw from the softmax
        text[:, at] = np.argmax(logits / temperature + noise, axis=1)
    return text[:, :length]
