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
from zigzag_jax.models.sharding import abstract_state, parameter_shardings

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


def random_state(config, where, **options):
    """(graphdef, parameters) with NumPy's numbers: nothing is compiled. Biases are zero."""
    graphdef, shapes = abstract_state(maker(config, where, **options))
    rng = np.random.default_rng(7)
    values = []
    for path, variable in nnx.to_flat_state(shapes):
        shape, scale = variable.get_value().shape, 0.0 if path[-1] == "bias" else 0.2
        values.append((path, variable.replace(jnp.asarray(scale * rng.standard_normal(shape), jnp.float32))))
    return graphdef, jax.device_put(nnx.from_flat_state(values), parameter_shardings(shapes, where))


def test_biases_move_towards_an_even_load_layer_by_layer():
    """Groups of layers with a dense one between: each bias must get the load of its own layer."""
    _, state = random_state(MIXED, sharding(), router_bias=True)
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
    _, plain = random_state(MIXED, sharding())
    assert not {name for name in flat(plain) if name.endswith("bias")}


def test_a_bias_levels_the_load_and_routes_can_be_replayed_and_balanced():
    where = sharding(cp=2)
    graphdef, state = random_state(TINY, where, router_bias=True)
    tokens = np.random.default_rng(1).integers(0, 64, (4, 48)).astype(np.int32)
    places = np.tile(np.arange(48, dtype=np.int32), (4, 1))
    tokens, places, packed = put((tokens, places, places % 6), where)

    @jit
    def run(state, routes):
        hidden, stats = nnx.merge(graphdef, state)(tokens, packed, routes=routes)
        return hidden, stats, move_biases(state, stats.load, 0.003)

    hidden, stats, moved = run(state, None)
    uneven = lambda load: float(np.max(load / np.mean(load, axis=1, keepdims=True)))
    first = uneven(stats.load)
    replayed, _, _ = run(state, stats.routes)
    np.testing.assert_array_equal(hidden, replayed)
    _, level, _ = run(state, balanced_routes(places, 2, 6, 2))
    np.testing.assert_array_equal(level.load, 4 * 48 * 2 / 6)  # packed rows too
    with pytest.raises(ValueError, match=r"routes must be integers \[MoE layers, B, S, k\] = \(2, 4, 48, 2\), got"):
        run(state, stats.routes[1:])
    for _ in range(80):
        _, stats, moved = run(moved, None)
    assert uneven(stats.load) < 1.15 < 1.3 < first, (first, uneven(stats.load))
