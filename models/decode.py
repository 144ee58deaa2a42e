"""Text from a model, token by token: what the layers keep of a prompt, and what they make of one token more.

    prefill   the whole prompt at once, its sequence over the ring as in training; every layer keeps what its attention
              needs of each token, where it lies: sharded over cp, in zigzag order
    step      one token a row, which looks at what is kept of the prompt and of the tokens written since

A query that may see every key does not ask in which order they lie, so nothing is put back into natural order. What is
kept of a token is its key and value heads (Qwen), or its latent and the rotary key that all heads share (DeepSeek).
Speed is not the point: in a step every device works on all rows.

The two are one model with one set of parameters, built for two shardings: a prompt is cut over the mesh, one token is
not (`step_rules`).
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from zigzag_jax.layout import padded, to_zigzag, zigzag_indices
from zigzag_jax.models.decoder import Decoder
from zigzag_jax.models.rope import rotary
from zigzag_jax.models.sharding import Rules, Sharding, abstract_state
from zigzag_jax.models.stack import scan_layers

Kept = Any  # for each group of layers a tuple of arrays [layers, B, tokens, heads, size]
Make = Callable[[Sharding], Callable[[nnx.Rngs], Decoder]]


def step_rules(rules: Rules) -> Rules:
    """The same, for tokens that are on every device."""
    return tuple((name, () if name in ("batch", "sequence") else axes) for name, axes in rules)


@dataclasses.dataclass(frozen=True)
class Writer:
    """A model that writes; its methods are pure and may be jitted."""

    make: Make
    """make(sharding)(rngs) builds the model for a sharding."""

    sharding: Sharding
    """That of the parameters, and of a prompt."""

    @functools.cached_property
    def _for_prompts(self) -> nnx.GraphDef:
        return abstract_state(self.make(self.sharding))[0]

    @functools.cached_property
    def _for_steps(self) -> nnx.GraphDef:
        return abstract_state(self.make(Sharding(self.sharding.mesh, step_rules(self.sharding.rules))))[0]

    @functools.cached_property
    def compiled(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """`prefill` and `step`, jitted; the logits are on every device."""
        out = (NamedSharding(self.sharding.mesh, P()), None)
        step = jax.jit(self.step, out_shardings=out, donate_argnames="written")
        return jax.jit(self.prefill, out_shardings=out), step

    def prefill(self, params: nnx.State, tokens, positions, real, last) -> tuple[jax.Array, Kept]:
        """Logits [B, V] float32 after the tokens at `last` [B] (places of the zigzag order), and what is kept.

        tokens, positions int32 and real bool [B, S] in zigzag order, as in training.
        """
        model = nnx.merge(self._for_prompts, params)
        turn = rotary(positions, model.config.rotary_size, model.config.rope)

        def call(layer, x, _):
            own = layer.attention.keep(layer.attention_norm(x), turn)
            return layer(x, positions, turn, real, None)[0], own

        x, kept = model.embed(tokens), []
        for layers, length in zip(model.groups, model.lengths, strict=True):
            x, own = scan_layers(layers, length, call, x, "none")
            kept.append(own)
        x = jnp.take_along_axis(model.norm(x), last[:, None, None], axis=1)
        return model.logits(x)[:, 0].astype(jnp.float32), kept

    def step(self, params: nnx.State, token, position, at, real, prompt: Kept, written: Kept) -> tuple[jax.Array, Kept]:
        """Logits [B, V] float32 after one more token [B] at `position` [B], and `written` with it at index `at`.

        real [B, S]: which of the prompt's places hold a token.
        """
        model = nnx.merge(self._for_steps, params)
        turn = rotary(position[:, None], model.config.rotary_size, model.config.rope)
        everything = jnp.ones((len(token), 1), bool)

        def call(layer, x, own):
            old, new = own
            y = layer.attention_norm(x)
            put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=at, axis=1)
            new = jax.tree.map(put, new, layer.attention.keep(y, turn))
            seen = jnp.arange(jax.tree.leaves(new)[0].shape[1])[None] <= at
            x = x + layer.attention.recall(y, turn, [(old, real), (new, seen)])
            y = layer.mlp_norm(x)
            return x + (layer.mlp(y, everything, None)[0] if layer.sparse else layer.mlp(y)), new

        x, kept = model.embed(token[:, None]), []
        for layers, length, own in zip(model.groups, model.lengths, zip(prompt, written, strict=True), strict=True):
            x, new = scan_layers(layers, length, call, x, "none", own)
            kept.append(new)
        return model.logits(model.norm(x))[:, 0].astype(jnp.float32), kept


def choose(logits: jax.Array, key: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
    """One token a row of logits [B, V]: int32 [B].

    Temperature 0 takes the likeliest. Otherwise a draw from softmax(logits / temperature) among the likeliest tokens
    whose probabilities together reach top_p (nucleus sampling, Holtzman et al. 2019, arXiv:1904.09751).
    """
    scaled = logits / jnp.maximum(temperature, 1e-6)
    order = jnp.argsort(-scaled, axis=1)
    probs = jax.nn.softmax(jnp.take_along_axis(scaled, order, axis=1), axis=1)
    before = jnp.cumsum(probs, axis=1) - probs  # of the likelier tokens: 0 for the first, which always stays
    allowed = jnp.take_along_axis(before < top_p, jnp.argsort(order, axis=1), axis=1)
    drawn = jax.random.categorical(key, jnp.where(allowed, scaled, -jnp.inf), axis=1)
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=1)).astype(jnp.int32)


def write(
    writer: Writer, params: nnx.State, prompts: Sequence[Sequence[int]], count: int, *, temperature: float = 0.0,
    top_p: float = 1.0, seed: int = 0, ends: Collection[int] = (),
    told: Callable[[np.ndarray], None] = lambda tokens: None,
) -> list[list[int]]:  # fmt: skip
    """Continue each prompt (token ids, lengths may differ) by up to `count` tokens; only the new ones are returned.

    A row ends after one of the tokens `ends`. The same seed draws the same tokens on any mesh. `told` gets each step's
    tokens, int32 [prompts], as they come.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError(f"every prompt must hold a token, got lengths {[len(prompt) for prompt in prompts]}")
    if count < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"count must be >= 1, temperature >= 0 and top_p in (0, 1], got {count}, {temperature} and {top_p}"
        )
    batch, last, lengths = _batch(writer.sharding, prompts)
    prefill, step = writer.compiled
    pick = jax.jit(choose, out_shardings=NamedSharding(writer.sharding.mesh, P()))
    logits, prompt = prefill(params, **batch, last=last)
    written = jax.tree.map(lambda x: jnp.zeros((*x.shape[:2], count, *x.shape[3:]), x.dtype), prompt)
    found, going = [[] for _ in prompts], np.ones(len(prompts), bool)
    for t in range(count):
        tokens = pick(logits, jax.random.fold_in(jax.random.key(seed), t), temperature, top_p)
        new = np.asarray(tokens)[: len(prompts)]
        told(new)
        for row in np.flatnonzero(going):
            found[row].append(int(new[row]))
        going &= ~np.isin(new, list(ends))
        if not going.any() or t == count - 1:
            break
        logits, written = step(params, tokens, lengths + t, np.int32(t), batch["real"], prompt=prompt, written=written)
    return found


def _batch(sharding: Sharding, prompts: Sequence[Sequence[int]]) -> tuple[dict[str, jax.Array], np.ndarray, np.ndarray]:
    """Prompts as a batch in zigzag order, where each row's last token lies, and the rows' lengths.

    Rows are filled up to a number that the mesh divides; a token of padding is a document of its own, which no token
    sees.
    """
    mesh = sharding.mesh
    cp = mesh.shape.get("cp", 1)
    ways = np.prod([mesh.shape[axis] for axis in ("dp", "fsdp") if axis in mesh.shape], dtype=int)
    rows = [*prompts, *[prompts[0]] * (-len(prompts) % ways)]
    lengths = np.array([len(row) for row in rows], np.int32)
    size = padded(int(lengths.max()), cp)
    place = np.arange(size, dtype=np.int32)[None]
    real = place < lengths[:, None]
    tokens = np.zeros(real.shape, np.int32)
    tokens[real] = np.concatenate([np.asarray(row, np.int32) for row in rows])
    batch = to_zigzag({"tokens": tokens, "positions": np.where(real, place, 0), "real": real}, cp)
    where = sharding.named(("batch", "sequence"), real.shape)
    put = lambda x: jax.make_array_from_callback(x.shape, where, lambda index: x[index])
    last = np.argsort(zigzag_indices(size, cp))[lengths - 1].astype(np.int32)
    return {name: put(x) for name, x in batch.items()}, last, lengths
