"""A mixture of experts against a loop over tokens in float64; what is counted; the load-balancing loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_helpers import draw, jit, natural, put, relative, sharding

from zigzag_jax.models.balance import load_balancing_loss
from zigzag_jax.models.moe import MoE, SoftmaxTopK
from zigzag_jax.models.sharding import abstract_state, parameter_shardings

SIZE, INNER, EXPERTS = 12, 10, 5
MESHES = {"one": (1, 1, 1), "dp2-fsdp2-cp2": (2, 2, 2), "cp3": (1, 1, 3)}


def loop(weights: dict, x: np.ndarray, real: np.ndarray, top_k: int, renormalise: bool):
    """Token by token, float64: y, counts, probability sums."""
    y, counts, sums = np.zeros_like(x), np.zeros(EXPERTS), np.zeros(EXPERTS)
    for at in np.ndindex(x.shape[:2]):
        logits = x[at] @ weights["route"]
        probs = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        chosen = np.argsort(-probs)[:top_k]
        scale = probs[chosen].sum() if renormalise else 1.0
        for e in chosen:
            gate, up = x[at] @ weights["gate"][e], x[at] @ weights["up"][e]
            y[at] += probs[e] / scale * ((gate / (1 + np.exp(-gate)) * up) @ weights["down"][e])
        if real[at]:
            counts[chosen] += 1
            sums += probs
    return y, counts, sums


@functools.cache
def inputs():
    rng = np.random.default_rng(1)
    real = rng.random((4, 24)) < 0.8
    x, cotangent = rng.standard_normal((2, 4, 24, SIZE)).astype(np.float32)
    return x, real, cotangent, rng.standard_normal(EXPERTS)


@functools.cache
def drawn():
    """Parameters on one device, compiled once."""
    where = sharding()
    make = lambda rngs: MoE(SIZE, INNER, EXPERTS, SoftmaxTopK(2, True), where, std=0.5, rngs=rngs)
    return draw(make)


def build(where, top_k=2, renormalise=True):
    router = SoftmaxTopK(top_k, renormalise)
    graphdef, shapes = abstract_state(lambda rngs: MoE(SIZE, INNER, EXPERTS, router, where, std=0.5, rngs=rngs))
    return graphdef, jax.device_put(drawn(), parameter_shardings(shapes, where))


@pytest.mark.parametrize(("top_k", "renormalise"), [(2, True), (3, False)])
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_against_a_loop(mesh, top_k, renormalise):
    where = sharding(*mesh)
    graphdef, state = build(where, top_k, renormalise)
    x, real, cotangent, on_probs = inputs()
    batch = put({"x": x, "real": real, "cotangent": cotangent}, where)

    @jit
    def run(state, x):
        def loss(state, x):
            y, stats = nnx.merge(graphdef, state)(x, batch["real"])
            return jnp.sum(y * batch["cotangent"]) + stats.probs @ jnp.asarray(on_probs, jnp.float32), (y, stats)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(state, x)

    (dstate, dx), (y, stats) = run(state, batch["x"])
    weights = {name: np.asarray(state[name].get_value(), np.float64) for name in state}
    oracle = functools.partial(loop, real=real, top_k=top_k, renormalise=renormalise)
    want, counts, sums = oracle(weights, x.astype(np.float64))
    assert relative(natural(y, where), want) < 1e-6
    np.testing.assert_array_equal(stats.counts, counts)
    np.testing.assert_allclose(stats.probs, sums, rtol=1e-5)
    if mesh == (2, 2, 2):  # each gradient along one random direction, by a central difference of the loop
        gradients = {name: np.asarray(dstate[name].get_value()) for name in state} | {"x": natural(dx, where)}
        check_gradients(gradients, oracle, weights | {"x": x.astype(np.float64)})


def check_gradients(gradients, oracle, at, eps=1e-7):
    def loss(point):
        y, _, sums = oracle(point, point["x"])
        return np.sum(y * inputs()[2]) + sums @ inputs()[3]

    rng = np.random.default_rng(2)
    for name, gradient in gradients.items():
        along = rng.standard_normal(gradient.shape)
        ahead, behind = (loss(at | {name: at[name] + sign * eps * along}) for sign in (1, -1))
        want = (ahead - behind) / (2 * eps)
        # a float32 gradient, and a sum with cancellation: measured against the size of its terms
        assert abs(np.sum(gradient * along) - want) < 1e-5 * np.linalg.norm(gradient * along), name


def test_padding_is_not_counted_and_not_in_the_way():
    x, real, _, _ = inputs()
    where = sharding(cp=2)
    graphdef, state = build(where)
    run = jit(nnx.merge(graphdef, state))
    y, stats = run(*put((x, real), where))
    noisy = np.where(real[:, :, None], x, 100 * x)
    other, noisy_stats = run(*put((noisy, real), where))
    np.testing.assert_array_equal(natural(y, where)[real], natural(other, where)[real])
    np.testing.assert_allclose(stats.probs, noisy_stats.probs, rtol=1e-6)
    np.testing.assert_array_equal(stats.counts, noisy_stats.counts)
    assert np.sum(stats.counts) == 2 * real.sum()


def test_load_balancing_loss_is_one_product_over_all_layers():
    """Two layers, each favouring its own half of the experts: level together, though neither is level alone."""
    counts = jnp.array([[4.0, 4, 0, 0], [0, 0, 4, 4]])
    probs = jnp.array([[2.0, 2, 0, 0], [0, 0, 2, 2]])
    tokens = jnp.array(4.0)
    np.testing.assert_allclose(load_balancing_loss(counts, probs, tokens), 2.0)  # k, the least there is
    np.testing.assert_allclose(load_balancing_loss(counts[:1], probs[:1], tokens), 4.0)


def test_load_balancing_loss_of_nothing_is_zero():
    nothing = jnp.zeros((0, 4))
    assert load_balancing_loss(nothing, nothing, jnp.array(4.0)) == 0
    assert load_balancing_loss(jnp.zeros((2, 4)), jnp.zeros((2, 4)), jnp.array(0.0)) == 0
