"""Does a saved model compute here what it computes in `transformers`? Logits and every gradient, in float32.

A golden file (safetensors) holds input_ids [B, S], logits [B, S, vocab], a random cotangent of that shape, grad.NAME of
sum(logits * cotangent) for every tensor of the saved model, and optionally positions int32 [B, S], each token's index
inside its document (absent: one document a row). All in natural order.

The measure is |got - want| / max(|want|, 1e-3 of the median |want| over all tensors) in the L2 norm, for each tensor:
relative, but a tensor whose gradient is next to nothing is not asked for digits that float32 does not have. Where most
tensors are experts that no token reached the floor is 0, and so must be what is 0.
"""

import os
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file

from zigzag_jax.layout import from_zigzag, padded, to_zigzag
from zigzag_jax.models.devices import ring_mesh
from zigzag_jax.models.errors import may_come_back
from zigzag_jax.models.hf.convert import to_hf
from zigzag_jax.models.hf.names import entries
from zigzag_jax.models.hf.saved import Source, open_source, read_state
from zigzag_jax.models.registry import ModelConfig, model_of, read_config
from zigzag_jax.models.sharding import Sharding, abstract_state

BAR = 1e-5  # float32 against float32

Arrays = dict[str, np.ndarray]


def read_golden(file: str | os.PathLike) -> Arrays:
    """The arrays of a golden file. ValueError for one that is none."""
    try:
        golden = load_file(file)
    except (OSError, SafetensorError) as error:
        if may_come_back(error):
            raise
        raise ValueError(f"golden: must be a safetensors file ({error}), got {file}") from None
    if missing := {"input_ids", "logits", "cotangent"} - golden.keys():
        raise ValueError(f"golden: must hold input_ids, logits and cotangent, got {file} without {sorted(missing)}")
    tokens, logits = golden["input_ids"].shape, golden["logits"].shape
    if len(tokens) != 2 or logits[:-1] != tokens or golden["cotangent"].shape != logits:
        raise ValueError(
            f"golden: input_ids must be [B, S], logits and cotangent [B, S, vocab], got {tokens}, {logits} and "
            f"{golden['cotangent'].shape}"
        )
    if golden.get("positions", golden["input_ids"]).shape != tokens:
        raise ValueError(f"golden: positions must be [B, S] like input_ids {tokens}, got {golden['positions'].shape}")
    return golden


def distances(got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The measure above for each tensor of `want`.

    >>> distances({"a": np.array([3.0]), "b": np.array([1e-9])}, {"a": np.array([2.0]), "b": np.array([0.0])})
    {'a': 0.5, 'b': 1e-06}
    """
    norms = {name: float(np.linalg.norm(np.asarray(value, np.float64))) for name, value in want.items()}
    floor = 1e-3 * float(np.median(list(norms.values())))
    off = lambda name: float(np.linalg.norm(np.asarray(got[name], np.float64) - np.asarray(want[name], np.float64)))
    ratio = lambda a, b: a / b if b else (0.0 if a == 0 else float("inf"))
    return {name: ratio(off(name), max(norms[name], floor)) for name in want}


def compute(source: Source, config: ModelConfig, golden: Arrays, cp: int, say: Callable[[str], None]) -> Arrays:
    """The golden file's arrays as this code computes them over a ring of `cp` devices: logits and grad.NAME."""
    where = Sharding(ring_mesh(cp))
    graphdef, shapes = abstract_state(
        lambda rngs: model_of(config)(config, where, rngs=rngs, dtype=jnp.float32, remat="none")
    )
    say("reading weights")
    state = read_state(source, config, shapes, where)
    say("computing logits and gradients")
    rows, length = golden["input_ids"].shape
    batch = {
        name: jax.device_put(to_zigzag(x, cp), where.named(("batch", "sequence", "embed")[: x.ndim], x.shape))
        for name, x in _batch(golden, config, cp).items()
    }

    def forward(state, batch):
        model = nnx.merge(graphdef, state)
        hidden, _ = model(batch["input_ids"], batch["positions"], real=batch["real"])
        logits = model.logits(hidden)
        return jnp.sum(logits * batch["cotangent"]), logits

    with jax.default_matmul_precision("highest"):
        gradients, logits = jax.jit(jax.grad(forward, has_aux=True))(state, batch)
    found = {f"grad.{name}": value for name, value in to_hf(gradients, config).items()}
    return found | {"logits": from_zigzag(np.asarray(logits), cp)[:rows, :length]}


def _batch(golden: Arrays, config: ModelConfig, cp: int) -> Arrays:
    """A batch, padded to a length that zigzag order can cut; a token of padding is a document of its own."""
    rows, length = golden["input_ids"].shape
    tokens = golden["input_ids"].astype(np.int32)
    if tokens.min() < 0 or tokens.max() >= config.vocab_size or golden["logits"].shape[2] != config.vocab_size:
        raise ValueError(
            f"golden: must be of the model's {config.vocab_size} tokens, got ids {tokens.min()} .. {tokens.max()} and "
            f"logits {golden['logits'].shape}"
        )
    positions = golden.get("positions", np.broadcast_to(np.arange(length), (rows, length))).astype(np.int32)
    batch = {
        "input_ids": tokens,
        "positions": positions,
        "real": np.ones((rows, length), bool),
        "cotangent": golden["cotangent"].astype(np.float32),
    }
    pad = padded(length, cp) - length
    return {name: np.pad(x, ((0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2))) for name, x in batch.items()}


def compare(folder: str | os.PathLike, file: str | os.PathLike, cp: int, say: Callable[[str], None]) -> bool:
    """Say each tensor's distance, the largest last; whether all are within BAR."""
    golden = read_golden(file)
    want = {name: value for name, value in golden.items() if name.startswith("grad.") or name == "logits"}
    source = open_source(folder)
    config = read_config(source.config)
    names = {f"grad.{entry.name}" for entry in entries(config)}
    if unknown := sorted(want.keys() - names - {"logits"}):
        raise ValueError(f"golden: gradients must be of the model's tensors, got {', '.join(unknown[:5])}")
    if len(want) == 1:
        raise ValueError(f"golden: must hold gradients (grad.NAME), got {file} without any")
    if absent := sorted(names - want.keys()):
        more = " ..." if len(absent) > 3 else ""
        say(f"{len(absent)} tensors have no golden gradient: {', '.join(absent[:3])}{more}")
    got = compute(source, config, golden, cp, say)
    found = distances(got, want)
    for name, distance in sorted(found.items(), key=lambda x: x[1]):
        say(f"{distance:.2e}  {'ok  ' if distance <= BAR else 'FAIL'}  {name.removeprefix('grad.')}")
    failed = [name.removeprefix("grad.") for name, distance in found.items() if not distance <= BAR]
    worst = max(found, key=lambda name: found[name] if np.isfinite(found[name]) else np.inf)
    text = f"{len(found)} tensors, the worst {worst.removeprefix('grad.')}: {found[worst]:.2e}, the bar {BAR:.0e}"
    verdict = f"{len(failed)} FAIL: {', '.join(failed[:5])}" if failed else "all within it"
    say(f"{text}: {verdict}")
    return not failed
