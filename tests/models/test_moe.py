"""A mixture of experts against a loop over tokens in float64; what is counted; routers that are told what to do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hops import equations
from model_helpers import draw, jit, natural, put, relative, sharding

from zigzag_jax.models.moe import MoE
from zigzag_jax.models.router import GroupLimitedTopK, SoftmaxTopK, balanced_routes
from zigzag_jax.models.sharding import abstract_state, parameter_shardings

SIZE, INNER, EXPERTS = 12, 10, 5
MESHES = {"one": (1, 1, 1), "dp2-fsdp2-cp2": (2, 2, 2), "cp3": (1, 1, 3)}


def loop(weights: dict, x: np.ndarray, real: np.ndarray, top_k: int, renormalise: bool):
    """Token by token, float64: y and, for each row, counts and probability sums."""
    y, counts, sums = np.zeros_like(x), np.zeros((len(x), EXPERTS)), np.zeros((len(x), EXPERTS))
    for at in np.ndindex(x.shape[:2]):
        logits = x[at] @ weights["route"]
        probs = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        chosen = np.argsort(-probs)[:top_k]
        scale = probs[chosen].sum() if renormalise else 1.0
        for e in chosen:
            gate, up = x[at] @ weights["gate"][e], x[at] @ weights["up"][e]
            y[at] += probs[e] / scale * ((gate / (1 + np.exp(-gate)) * up) @ weights["down"][e])
        if real[at]:
            counts[at[0], chosen] += 1
            sums[at[0]] += probs
    return y, counts, sums


@functools.cache
def inputs():
    rng = np.random.default_rng(1)
    real = rng.random((4, 24)) < 0.8
    x, cotangent = rng.standard_normal((2, 4, 24, SIZE)).astype(np.float32)
    return x, real, cotangent, rng.standard_normal((4, EXPERTS))


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
            return jnp.sum(y * batch["cotangent"]) + jnp.sum(stats.probs * jnp.asarray(on_probs, jnp.float32)), (
                y,
                stats,
            )

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
        return np.sum(y * inputs()[2]) + np.sum(sums * inputs()[3])

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


def test_given_routes_are_used_and_have_gradients():
    """Replaying a pass's own routes changes nothing; other routes change the experts and not the probabilities."""
    x, real, cotangent, _ = inputs()
    where = sharding(cp=2)
    graphdef, state = build(where)
    batch = put({"x": x, "real": real, "cotangent": cotangent}, where)

    @jit
    def run(state, routes):
        def loss(state):
            y, stats = nnx.merge(graphdef, state)(batch["x"], batch["real"], routes)
            return jnp.sum(y * batch["cotangent"]), (y, stats)

        return jax.grad(loss, has_aux=True)(state)

    free, (y, stats) = run(state, None)
    replayed, (again, _) = run(state, stats.routes)
    np.testing.assert_array_equal(y, again)
    jax.tree.map(np.testing.assert_array_equal, free, replayed)
    even = put(np.asarray(balanced_routes(jnp.arange(24)[None].repeat(4, 0), 1, EXPERTS, 2)[0]), where)
    forced, (other, level) = run(state, even)
    assert relative(other, y) > 0.1
    np.testing.assert_allclose(level.probs, stats.probs, rtol=1e-6)
    assert np.linalg.norm(forced["route"].get_value()) > 0
    weights = {name: np.asarray(state[name].get_value(), np.float64) for name in state}
    at = (1, 7)  # one token by hand
    logits = x[at].astype(np.float64) @ weights["route"]
    probs = np.exp(logits) / np.exp(logits).sum()
    chosen = [(7 * 2) % EXPERTS, (7 * 2 + 1) % EXPERTS]
    inner = [x[at] @ weights["gate"][e] for e in chosen]
    outs = [
        (g / (1 + np.exp(-g)) * (x[at] @ weights["up"][e])) @ weights["down"][e]
        for e, g in zip(chosen, inner, strict=True)
    ]
    want = sum(probs[e] * out for e, out in zip(chosen, outs, strict=True)) / probs[chosen].sum()
    assert relative(natural(other, where)[at], want) < 1e-5


@pytest.mark.parametrize("router", [SoftmaxTopK(2, True), GroupLimitedTopK(2, 4, 2, 2.5)])
def test_a_bias_decides_who_is_chosen_and_not_how_much_they_count(router):
    logits = jnp.asarray(np.random.default_rng(3).standard_normal((6, 8)), jnp.float32)
    bias = jnp.zeros(8).at[5].set(10.0).at[4].set(-10.0)
    plain, routes = router(logits), router(logits, bias=bias)
    assert np.all(np.any(routes.experts == 5, axis=1))
    assert not np.any(routes.experts == 4)
    assert np.any(plain.experts != routes.experts)
    chosen = np.take_along_axis(np.asarray(plain.probs), np.asarray(routes.experts), axis=1)
    scale = 1 / chosen.sum(axis=1, keepdims=True) if isinstance(router, SoftmaxTopK) else 2.5
    np.testing.assert_allclose(routes.weights, chosen * scale, rtol=1e-6)
    gradient = jax.grad(lambda bias: jnp.sum(router(logits, bias=bias).weights ** 2))(bias)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("wide", [False, True])
def test_a_wide_router_is_float32_all_through(wide):
    """A GPU makes TF32 of a float32 product with the default precision, in the gradients' too."""
    where = sharding()
    make = lambda rngs: MoE(SIZE, INNER, EXPERTS, SoftmaxTopK(2, True, wide=wide), where, std=0.5, rngs=rngs)
    graphdef, shapes = abstract_state(make)
    loss = lambda state, x: jnp.sum(nnx.merge(graphdef, state)(x, jnp.ones(x.shape[:2], bool))[0])
    x = jax.ShapeDtypeStruct((1, 7, SIZE), jnp.bfloat16)
    dots = [e for e, _ in equations(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(shapes, x))]
    dots = [eqn for eqn in dots if eqn.primitive.name == "dot_general"]
    both = {(7, SIZE), (SIZE, EXPERTS), (7, EXPERTS)}  # x, the router's weight, the logits: each is made of the others
    own = [eqn for eqn in dots if {eqn.invars[0].aval.shape, eqn.invars[1].aval.shape} < both]
    precisions = [eqn.params["precision"] for eqn in own]
    assert precisions == [(jax.lax.Precision.HIGHEST,) * 2 if wide else None] * 3
    assert {str(eqn.invars[0].aval.dtype) for eqn in own} == {"float32" if wide else "bfloat16"}
