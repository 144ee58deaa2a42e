"""A step in micro-batches is the step without them: losses, gradients, and for which auxiliary losses."""

import functools
import json
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from test_step import B, S, V, make_mesh, natural_batch, on_mesh

from zigzag_jax.models.balance import AUX_LOSSES, AuxLoss, RouterStats, WholeBatch, load_balancing_loss
from zigzag_jax.models.presets import PRESETS
from zigzag_jax.models.sharding import Sharding, abstract_state, init_state, param
from zigzag_jax.train.accumulate import losses_and_gradients, micro_batches
from zigzag_jax.train.config import Config, OptimConfig, RouterConfig
from zigzag_jax.train.data.tokenizer import train_tokenizer
from zigzag_jax.train.identity import identity_of
from zigzag_jax.train.task import Losses, Task

COEFFICIENTS = 0.3, 0.1  # of the auxiliary and the z-loss: large, so that an error shows
E, D = 8, 16


class Router(nnx.Module):
    """Two layers of nothing but a router, whose statistics are all that the losses know of a model."""

    def __init__(self, rngs: nnx.Rngs):
        draw = lambda *shape: jax.random.normal(rngs.params(), shape)
        self.table = param(draw(V, D), "vocab", "embed")
        self.routes = param(draw(2, D, E), "layers", "embed", "experts")
        self.head = param(draw(D, V), "embed", "vocab")

    def __call__(self, tokens: jax.Array, positions: jax.Array, *, real: jax.Array):
        x = self.table[...][tokens]
        probs = jax.nn.softmax(jnp.einsum("bsd,lde->lbse", x, self.routes[...]))
        chosen = jax.nn.one_hot(jax.lax.top_k(probs, 2)[1], E).sum(-2)
        mask = real[None, :, :, None]
        counts, sums = (jnp.sum(y * mask, 2) for y in (chosen, probs))
        stats = RouterStats(counts, sums, jnp.sum(real, 1, dtype=float), tokens)
        return x + jnp.einsum("lbse,lde->bsd", probs, self.routes[...]), stats

    @property
    def head_weight(self) -> jax.Array:
        return self.head[...]


def task(form: AuxLoss, mesh: Mesh) -> Task:
    graphdef = abstract_state(Router)[0]
    return Task(graphdef, Sharding(mesh), jnp.dtype("float32"), form, *COEFFICIENTS)


@functools.cache
def run(form: AuxLoss, count: int) -> tuple[Losses, list[np.ndarray]]:
    """Of a packed batch whose rows hold very different numbers of tokens."""
    mesh = make_mesh(1, 2, 2)
    params = init_state(Router, Sharding(mesh), jax.random.key(3))[1]
    step = jax.jit(lambda params, batch: losses_and_gradients(task(form, mesh), params, batch, count))
    losses, grads = step(params, on_mesh(natural_batch(True, 1), mesh))
    if count > 1:
        pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True)
        assert all(g.sharding.is_equivalent_to(p.sharding, p.ndim) for g, p in pairs)  # cut as they were carried
    return jax.device_get(losses), [np.asarray(g) for g in jax.tree.leaves(grads)]


@pytest.mark.parametrize("form", ["sequence", "hf"])
def test_two_micro_batches_are_one_batch(form: AuxLoss):
    (want, grads), (got, found) = run(form, 1), run(form, 2)
    np.testing.assert_array_equal(got.load, want.load)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-6), got, want)
    for a, b in zip(grads, found, strict=True):
        assert a.dtype == b.dtype == np.float32
        assert np.linalg.norm(a - b) <= 2e-6 * np.linalg.norm(a)


def test_the_batch_loss_is_one_of_micro_batches():
    (want, grads), (got, found) = run("batch", 1), run("batch", 2)
    np.testing.assert_allclose((got.loss, got.z_loss), (want.loss, want.z_loss), rtol=2e-6)
    assert abs(got.aux_loss - want.aux_loss) > 1e-3 * want.aux_loss
    assert any(np.linalg.norm(a - b) > 1e-4 * np.linalg.norm(a) for a, b in zip(grads, found, strict=True))


def test_micro_batches_are_pieces_of_what_each_device_holds():
    mesh = make_mesh(2, 1, 2)
    made = task("sequence", mesh)
    rows = np.broadcast_to(np.arange(B)[:, None], (B, S)).astype(np.int32)
    batch = on_mesh({"tokens": rows}, mesh)
    cut = jax.jit(lambda x: micro_batches(made, x, 2))
    np.testing.assert_array_equal(cut(batch)["tokens"][:, :, 0], [[0, 2], [1, 3]])  # devices hold 0, 1 and 2, 3
    text = cut.lower(batch).compile().as_text()
    assert text is not None
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))


@pytest.mark.parametrize("form", AUX_LOSSES)
@pytest.mark.parametrize("counted", [True, False])
def test_shares_of_the_auxiliary_loss_against_float64(form: AuxLoss, counted: bool):
    rng = np.random.default_rng(0)
    layers, rows, experts = 3, 4, 8
    tokens = np.array([5.0, 0, 17, 30])
    counts = rng.integers(0, 9, (layers, rows, experts)).astype(float) * (tokens[:, None] > 0)
    probs = rng.random((layers, rows, experts)) * tokens[:, None]
    f32 = lambda x: jnp.asarray(x, jnp.float32)
    whole = WholeBatch(f32(tokens.sum()), f32(counts.sum(1)) if counted else None)
    got = 0.0
    for part in (slice(0, 2), slice(2, 4)):
        stats = RouterStats(f32(counts[:, part]), f32(probs[:, part]), f32(tokens[part]), jnp.zeros(()))
        got += float(load_balancing_loss(stats, form, whole))
    product = lambda c, p, t: experts * np.sum(c * p) / t**2
    if form == "sequence":
        want = np.mean([sum(product(counts[n, r], probs[n, r], t) * t for r, t in enumerate(tokens) if t)
                        for n in range(layers)]) / tokens.sum()  # fmt: skip
    elif form == "hf" and counted:
        want = product(counts.sum((0, 1)), probs.sum((0, 1)), layers * tokens.sum())
    else:
        halves = [(counts[:, s].sum(1), probs[:, s].sum(1), tokens[s].sum()) for s in (slice(0, 2), slice(2, 4))]
        by_layer = lambda c, p, t: np.mean([product(c[n], p[n], t) for n in range(layers)])
        whole_list = lambda c, p, t: product(c.sum(0), p.sum(0), layers * t)
        each = whole_list if form == "hf" else by_layer
        want = sum(each(*half) * half[2] for half in halves) / tokens.sum()
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_only_the_batch_loss_ties_a_run_to_its_micro_batches():
    dataset: Any = SimpleNamespace(digest="0" * 64, tokenizer=train_tokenizer(["a b c " * 50], characters=300))
    known = lambda form: identity_of(
        Config(accumulate=2, router=RouterConfig(form), optim=OptimConfig(groups=("*norm*=1",))),
        PRESETS["tiny-qwen3-moe"], dataset,
    )  # fmt: skip
    assert known("batch")["accumulate"] == 2
    assert "accumulate" not in known("sequence")
    assert json.loads(json.dumps(known(None))) == known(None)  # or a resumed run would be another
