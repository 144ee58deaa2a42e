"""The auxiliary losses against their definitions, token by token, and the bias that needs none."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_helpers import TINY, flat, jit, maker, put, sharding

from zigzag_jax.models.balance import AUX_LOSSES, RouterStats, load_balancing_loss, move_biases
from zigzag_jax.models.router import balanced_routes
from zigzag_jax.models.sharding import abstract_state, init_state

LAYERS, ROWS, LENGTH, EXPERTS, TOP_K = 3, 4, 10, 6, 2


def routing(seed: int = 0):
    """Random routes and probabilities [layers, rows, tokens, ...] in float64, and which tokens are real."""
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(EXPERTS) * 0.3, (LAYERS, ROWS, LENGTH))
    chosen = np.argsort(-probs, axis=-1)[..., :TOP_K]
    real = rng.random((ROWS, LENGTH)) < 0.7
    real[2] = False  # a row of padding alone
    return probs, chosen, real


def statistics(probs, chosen, real) -> RouterStats:
    hot = np.eye(EXPERTS)[chosen].sum(axis=3) * real[None, :, :, None]
    single = lambda x: jnp.asarray(x, jnp.float32)
    probs = (probs * real[None, :, :, None]).sum(axis=2)
    return RouterStats(single(hot.sum(axis=2)), single(probs), single(real.sum(axis=1)), jnp.asarray(chosen))


def product(probs, chosen) -> float:
    """E * sum_e f_e P_e of a list of tokens."""
    share = np.bincount(chosen.reshape(-1), minlength=EXPERTS) / len(probs)
    return EXPERTS * float(share @ probs.mean(axis=0))


def test_each_form_is_its_definition():
    probs, chosen, real = routing()
    flat_real = real.reshape(-1)
    layers = [
        (p.reshape(-1, EXPERTS)[flat_real], c.reshape(-1, TOP_K)[flat_real]) for p, c in zip(probs, chosen, strict=True)
    ]
    want = {
        "hf": product(*(np.concatenate(x) for x in zip(*layers, strict=True))),
        "batch": np.mean([product(*layer) for layer in layers]),
        "sequence": np.mean([
            sum(product(probs[n, b][real[b]], chosen[n, b][real[b]]) * real[b].sum() for b in (0, 1, 3)) / real.sum()
            for n in range(LAYERS)
        ]),
    }  # fmt: skip
    got = {form: float(load_balancing_loss(statistics(probs, chosen, real), form)) for form in AUX_LOSSES}
    for form in AUX_LOSSES:
        np.testing.assert_allclose(got[form], want[form], rtol=1e-6)
    assert len({round(x, 4) for x in got.values()}) == 3  # they are not one


def test_one_product_over_all_layers_is_not_a_mean_of_products():
    """Two layers, each favouring its own half of the experts: level together, though neither is level alone."""
    stats = RouterStats(
        jnp.array([[[4.0, 4, 0, 0]], [[0, 0, 4, 4]]]), jnp.array([[[2.0, 2, 0, 0]], [[0, 0, 2, 2]]]), jnp.array([4.0]),
        jnp.zeros((2, 1, 4, 2), jnp.int32),
    )  # fmt: skip
    np.testing.assert_allclose(load_balancing_loss(stats, "hf"), 2.0)  # k, the least there is
    np.testing.assert_allclose(load_balancing_loss(stats, "batch"), 4.0)
    np.testing.assert_allclose(load_balancing_loss(stats, "sequence"), 4.0)


def test_the_sequence_form_averages_exactly_over_micro_batches():
    probs, chosen, real = routing(1)
    parts = [statistics(probs[:, rows], chosen[:, rows], real[rows]) for rows in (slice(2), slice(2, 4))]
    whole = load_balancing_loss(statistics(probs, chosen, real), "sequence")
    tokens = [float(jnp.sum(part.tokens)) for part in parts]
    averaged = np.average([float(load_balancing_loss(part, "sequence")) for part in parts], weights=tokens)
    np.testing.assert_allclose(averaged, whole, rtol=1e-6)


@pytest.mark.parametrize("form", AUX_LOSSES)
def test_nothing_to_balance_is_zero(form):
    nothing = RouterStats(jnp.zeros((0, 2, 4)), jnp.zeros((0, 2, 4)), jnp.ones(2), jnp.zeros((0, 2, 1, 1), jnp.int32))
    assert load_balancing_loss(nothing, form) == 0
    padding = RouterStats(jnp.zeros((2, 2, 4)), jnp.zeros((2, 2, 4)), jnp.zeros(2), jnp.zeros((2, 2, 1, 1), jnp.int32))
    assert load_balancing_loss(padding, form) == 0


def test_an_unknown_form():
    with pytest.raises(ValueError, match="the auxiliary loss must be one of hf, batch, sequence, got 'mean'"):
        load_balancing_loss(statistics(*routing()), "mean")  # pyright: ignore[reportArgumentType]


MIXED = dataclasses.replace(TINY, num_hidden_layers=4, mlp_only_layers=(1,))


def test_biases_move_towards_an_even_load_layer_by_layer():
    """Groups of layers with a dense one between: each bias must get the load of its own layer."""
    where = sharding()
    graphdef, state = init_state(maker(MIXED, where, router_bias=True), where, jax.random.key(0))
    load = jnp.asarray(np.random.default_rng(0).integers(0, 9, (3, 6)), jnp.float32)
    moved = flat(move_biases(state, load, 0.01))
    want = 0.01 * np.sign(np.mean(load, axis=1, keepdims=True) - load)
    want -= want.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(moved["groups.0.mlp.bias"], want[:1], atol=1e-7)
    np.testing.assert_allclose(moved["groups.2.mlp.bias"], want[1:], atol=1e-7)
    before = flat(state)
    for name in before.keys() - {"groups.0.mlp.bias", "groups.2.mlp.bias"}:
        np.testing.assert_array_equal(before[name], moved[name])
    with pytest.raises(ValueError, match="every one of the 2 MoE layers must have a router bias, got 3"):
        move_biases(state, load[:2], 0.01)
    del graphdef


def test_a_bias_levels_the_load_of_a_model_that_does_not_learn():
    where = sharding(cp=2)
    graphdef, state = init_state(maker(MIXED, where, router_bias=True), where, jax.random.key(1))
    tokens = np.random.default_rng(1).integers(0, 64, (4, 48)).astype(np.int32)
    tokens, positions = put((tokens, np.tile(np.arange(48, dtype=np.int32), (4, 1))), where)

    @jit
    def step(state):
        _, stats = nnx.merge(graphdef, state)(tokens, positions)
        return move_biases(state, stats.load, 0.01), stats.load

    uneven = []
    for _ in range(60):
        state, load = step(state)
        uneven.append(float(np.max(load / np.mean(load, axis=1, keepdims=True))))
    assert uneven[-1] < 1.2 < uneven[0], (uneven[0], uneven[-1])


def test_replayed_and_balanced_routes_of_a_whole_model():
    where = sharding(cp=2)
    graphdef, state = init_state(maker(MIXED, where), where, jax.random.key(2))
    tokens = np.random.default_rng(2).integers(0, 64, (2, 48)).astype(np.int32)
    tokens, positions = put((tokens, np.tile(np.arange(48, dtype=np.int32), (2, 1))), where)
    run = jit(lambda state, routes=None: nnx.merge(graphdef, state)(tokens, positions, routes=routes))
    hidden, stats = run(state)
    again, _ = run(state, stats.routes)
    np.testing.assert_array_equal(hidden, again)
    _, level = run(state, balanced_routes(positions, 3, 6, 2))
    np.testing.assert_array_equal(level.load, 2 * 48 * 2 / 6)
    with pytest.raises(ValueError, match=r"routes must be integers \[MoE layers, B, S, k\] = \(3, 2, 48, 2\), got"):
        run(state, stats.routes[1:])


def test_without_a_bias_there_is_no_parameter_for_it():
    where = sharding()
    names = {name for name in flat(abstract_state_shapes(where)) if name.endswith("bias")}
    assert not names


def abstract_state_shapes(where):
    return jax.tree.map(lambda x: np.zeros(x.shape, np.int8), abstract_state(maker(MIXED, where))[1])
