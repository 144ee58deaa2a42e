"""Token by token is the same model: what the layers keep of a prompt is all that the rest of the text needs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_helpers import TINY, jit, maker, relative, sharding

from zigzag_jax.layout import to_zigzag, zigzag_indices
from zigzag_jax.models.decode import Writer, choose, write
from zigzag_jax.models.memory import Memory, attend
from zigzag_jax.models.presets import PRESETS
from zigzag_jax.models.sharding import abstract_state, init_state

CONFIGS = {
    "qwen3-moe": dataclasses.replace(TINY, mlp_only_layers=(0,)),
    "deepseek-v2": dataclasses.replace(
        PRESETS["tiny-deepseek-v2"],
        vocab_size=64,
        hidden_size=32,
        initializer_range=0.2,
        q_lora_rank=12,
        num_hidden_layers=2,
    ),
}
PROMPTS = [[5, 9, 33, 2, 60, 41, 7, 7, 3, 18, 22], [1], [50, 12, 13, 14, 15]]  # lengths differ, and none divides
CASES = [
    pytest.param("qwen3-moe", (1, 1, 1), marks=pytest.mark.slow),
    ("qwen3-moe", (1, 2, 2)),
    pytest.param("deepseek-v2", (1, 1, 3), marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Compile time is what these tests take."""
    monkeypatch.setattr(jax, "jit", jit)


@functools.cache
def model(name, mesh):
    where = sharding(*mesh)
    make = functools.partial(maker, CONFIGS[name])
    return Writer(make, where), init_state(make(where), where, jax.random.key(4))[1]


@functools.cache
def whole(name):
    """The jitted model itself: logits [B, S, V] of rows in natural order on one device."""
    where = sharding()
    graphdef = abstract_state(maker(CONFIGS[name], where))[0]
    params = model(name, (1, 1, 1))[1]

    @jit
    def run(tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        merged = nnx.merge(graphdef, params)
        return merged.logits(merged(tokens, positions)[0])

    return lambda row: run(np.asarray([row + [0] * (32 - len(row))], np.int32))[0, : len(row)]


@pytest.mark.parametrize(("name", "mesh"), CASES, ids=str)
def test_the_likeliest_tokens_are_those_of_the_whole_model(name, mesh):
    writer, params = model(name, mesh)
    steps: list[np.ndarray] = []
    got = write(writer, params, PROMPTS, 6, told=steps.append)
    for prompt, new in zip(PROMPTS, got, strict=True):
        row = list(prompt)
        for token in new:
            assert int(np.argmax(whole(name)(row)[-1])) == token
            row.append(token)
    np.testing.assert_array_equal(np.stack(steps, axis=1), got)
    assert len({tuple(x) for x in got}) == 3


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_a_step(name):
    """Numbers, not only their order: a prompt over the ring and one token more."""
    writer, params = model(name, (1, 1, 3))
    row = PROMPTS[0]
    where = writer.sharding.named(("batch", "sequence"), (1, 12))

    place = np.arange(12, dtype=np.int32)[None]
    batch = {"tokens": np.array([[*row, 0]], np.int32), "positions": place % 11, "real": place < 11}
    batch = {key: jax.device_put(x, where) for key, x in to_zigzag(batch, 3).items()}
    last = np.argsort(zigzag_indices(12, 3))[[10]].astype(np.int32)
    logits, kept = jit(writer.prefill)(params, **batch, last=last)
    want = whole(name)(row)[-1]
    assert relative(logits[0], want) < 1e-5
    written = jax.tree.map(lambda x: jnp.full((*x.shape[:2], 4, *x.shape[3:]), jnp.nan, x.dtype), kept)
    written = jax.tree.map(
        lambda x: x.at[:, :, 1:].set(7.0).at[:, :, :1].set(0.0), written
    )  # what comes later is not seen
    logits, _ = jit(writer.step)(params, np.array([44]), np.array([11]), 0, batch["real"], kept, written)
    want = whole(name)([*row, 44])[-1]
    assert relative(logits[0], want) < 1e-5


def test_deepseek_keeps_its_latent():
    config = CONFIGS["deepseek-v2"]
    writer, params = model("deepseek-v2", (1, 1, 1))
    one = jnp.zeros((1, 2), jnp.int32)
    _, kept = jax.eval_shape(writer.prefill, params, one, one, one == 0, one[:, 0])
    width = config.kv_lora_rank + config.qk_rope_head_dim
    assert [x.shape for x in jax.tree.leaves(kept)] == [(n, 1, 2, 1, width) for n in (1, 1)]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attend_is_attention_over_all_memories(kv_heads):
    rng = np.random.default_rng(kv_heads)
    q = rng.standard_normal((2, 1, 4, 6))
    sizes, visible = (5, 3, 2), [rng.random((2, 5)) < 0.7, np.zeros((1, 3), bool), np.ones((1, 2), bool)]
    k, v = ([rng.standard_normal((2, n, kv_heads, d)) for n in sizes] for d in (6, 3))
    memories = [
        Memory(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), jnp.asarray(s))
        for a, b, s in zip(k, v, visible, strict=True)
    ]
    got = attend(jnp.asarray(q, jnp.float32), memories, 0.3)
    seen = np.concatenate([np.zeros((2, n), bool) | x for x, n in zip(visible, sizes, strict=True)], axis=1)
    k, v = (np.repeat(np.concatenate(x, axis=1), 4 // kv_heads, axis=2) for x in (k, v))
    scores = np.where(seen[:, None], 0.3 * np.einsum("bhd,bnhd->bhn", q[:, 0], k), -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    want = np.einsum("bhn,bnhe->bhe", p / p.sum(-1, keepdims=True), v)
    assert relative(got[:, 0], want) < 1e-6


def test_drawing_follows_the_probabilities():
    logits = jnp.log(jnp.array([[0.5, 0.1, 0.3, 0.1]]))
    keys = jax.random.split(jax.random.key(0), 4000)
    draw = jax.jit(jax.vmap(lambda key, t, p: choose(logits, key, t, p)[0], (0, None, None)))
    share = lambda t, p: np.bincount(np.asarray(draw(keys, t, p)), minlength=4) / len(keys)
    np.testing.assert_allclose(share(1.0, 1.0), [0.5, 0.1, 0.3, 0.1], atol=0.03)
    np.testing.assert_allclose(share(0.5, 1.0), np.array([25, 1, 9, 1]) / 36, atol=0.03)
    np.testing.assert_allclose(share(1.0, 0.6), [5 / 8, 0, 3 / 8, 0], atol=0.03)  # 0.5 is not enough, 0.5 + 0.3 is
    np.testing.assert_array_equal(share(1.0, 0.4), [1, 0, 0, 0])
    np.testing.assert_array_equal(share(0.0, 1.0), [1, 0, 0, 0])


def test_a_seed_and_an_end():
    writer, params = model("qwen3-moe", (1, 1, 1))
    draw = functools.partial(write, writer, params, PROMPTS, 6, temperature=1.0)
    one, other = draw(seed=1), draw(seed=2)
    assert one != other
    assert write(*model("qwen3-moe", (1, 2, 2)), PROMPTS, 6, temperature=1.0, seed=1) == one
    end = one[0][2]
    cut = draw(seed=1, ends=[end, 63])
    for row, whole_row in zip(cut, one, strict=True):
        stops = [n for n, token in enumerate(whole_row) if token in (end, 63)]
        assert row == (whole_row[: stops[0] + 1] if stops else whole_row)


def test_what_cannot_be_continued():
    writer, params = model("qwen3-moe", (1, 1, 1))
    for prompts in ([], [[1], []]):
        with pytest.raises(ValueError, match="every prompt must hold a token, got lengths"):
            write(writer, params, prompts, 1)
    for count, temperature, top_p in ((0, 0.0, 1.0), (1, -1.0, 1.0), (1, 0.0, 0.0)):
        with pytest.raises(ValueError, match=r"count must be >= 1, temperature >= 0 and top_p in \(0, 1\], got"):
            write(writer, params, [[1]], count, temperature=temperature, top_p=top_p)
