"""A step in micro-batches is the step without them: losses, gradients, and for which auxiliary losses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import QUICK, SIZES, B, S, make_mesh, natural_batch, on_mesh

from zigzag_jax.models.balance import AUX_LOSSES, AuxLoss, RouterStats, WholeBatch, load_balancing_loss
from zigzag_jax.models.sharding import abstract_state, init_state
from zigzag_jax.train.accumulate import losses_and_gradients, micro_batches
from zigzag_jax.train.config import Config
from zigzag_jax.train.mesh import make_sharding
from zigzag_jax.train.models import maker
from zigzag_jax.train.task import Losses, Task

SMALL = dataclasses.replace(SIZES, num_hidden_layers=2)
COEFFICIENTS = 0.3, 0.1  # of the auxiliary and the z-loss: large, so that an error shows
AXES = (1, 2, 1)  # rows and parameters cut over the same devices


@functools.cache
def task(form: AuxLoss):
    """The task, its parameters and a packed batch whose rows hold very different numbers of tokens."""
    mesh = make_mesh(*AXES)
    sharding = make_sharding(Config(), SMALL, mesh)
    make = maker(Config(remat="none"), SMALL, sharding)
    made = Task(abstract_state(make)[0], sharding, jnp.dtype("float32"), form, *COEFFICIENTS)
    return made, init_state(make, sharding, jax.random.key(3))[1], on_mesh(natural_batch(True, 1), mesh)


@functools.cache
def run(form: AuxLoss, count: int) -> tuple[Losses, list[np.ndarray]]:
    made, params, batch = task(form)
    step = jax.jit(lambda params, batch: losses_and_gradients(made, params, batch, count), compiler_options=QUICK)
    losses, grads = step(params, batch)
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
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a)


def test_the_batch_loss_is_one_of_micro_batches():
    """Its product over each micro-batch, by real tokens; all else is as without them."""
    made, params, batch = task("batch")
    got, want = run("batch", 2)[0], run("sequence", 1)[0]
    np.testing.assert_allclose((got.loss, got.z_loss), (want.loss, want.z_loss), rtol=2e-6)
    parts = jax.jit(lambda x: micro_batches(made, x, 2))(batch)
    losses, tokens = jax.jit(made.losses, compiler_options=QUICK), np.sum(parts["real"], axis=(1, 2))
    own = [losses(params, {name: x[n] for name, x in parts.items()}).aux_loss for n in range(2)]
    np.testing.assert_allclose(got.aux_loss, np.dot(own, tokens) / tokens.sum(), rtol=2e-6)
    whole = float(losses(params, batch).aux_loss)
    assert abs(whole - got.aux_loss) > 1e-3 * whole


def test_micro_batches_are_pieces_of_what_each_device_holds():
    mesh = make_mesh(2, 1, 2)
    made = dataclasses.replace(task("sequence")[0], sharding=make_sharding(Config(), SMALL, mesh))
    rows = np.broadcast_to(np.arange(B)[:, None], (B, S)).astype(np.int32)
    batch = on_mesh({"tokens": rows}, mesh)
    cut = jax.jit(lambda x: micro_batches(made, x, 2), compiler_options=QUICK)
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
    f32 = lambda *parts: [jnp.asarray(x, jnp.float32) for x in parts]
    whole = WholeBatch(*f32(tokens.sum()), f32(counts.sum(1))[0] if counted else None)
    got = 0.0
    for part in (slice(0, 2), slice(2, 4)):
        stats = RouterStats(*f32(counts[:, part], probs[:, part], tokens[part]), jnp.zeros(()))
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
