"""Optimisers against float64 NumPy, schedules point by point, and what is done to which parameter."""

import doctest
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from zigzag_jax.models.presets import PRESETS
from zigzag_jax.models.sharding import Sharding, abstract_state
from zigzag_jax.train import groups
from zigzag_jax.train.config import Config, OptimConfig, RouterConfig
from zigzag_jax.train.errors import UserError
from zigzag_jax.train.groups import check_groups, is_hidden_matrix, is_vector, names
from zigzag_jax.train.models import maker
from zigzag_jax.train.muon import MuonState, scale_by_muon
from zigzag_jax.train.optim import optimizer, schedule
from zigzag_jax.train.step import state_shardings

RATE = 0.125
SHAPES = {
    "embedding": {"table": (10, 6)},
    "groups": {"0": {"attention": {"q": {"weight": (2, 6, 4)}}, "norm": {"weight": (2, 6)},
                     "mlp": {"gate": (2, 3, 6, 9), "route": (2, 6, 3), "bias": (2, 3)}}},
    "head": {"weight": (6, 10)},
}  # fmt: skip


def draw(seed: int, shapes=SHAPES) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(rng.standard_normal, shapes, is_leaf=lambda x: isinstance(x, tuple))


def float32(tree) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def newton_schulz(x: np.ndarray) -> np.ndarray:
    """One matrix, float64, as Jordan's Muon has it."""
    if x.shape[0] > x.shape[1]:
        return newton_schulz(x.T).T
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def flat(tree) -> dict[str, np.ndarray]:
    return dict(zip(names(tree), (np.asarray(x, np.float64) for x in jax.tree.leaves(tree)), strict=True))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_gradient_whose_norm_is_finite_makes_a_finite_update(name: str):
    """So a state that is saved is finite: the loop stops where loss or norm are not, and larger gradients have none."""
    tx, params = optimizer(OptimConfig(name, clip=1e30), 10), float32(draw(0))  # type: ignore[arg-type]
    grads = jax.tree.map(lambda x: jnp.float32(1e17) * x, float32(draw(1)))
    assert np.isfinite(optax.tree.norm(grads))
    assert np.isinf(optax.tree.norm(jax.tree.map(lambda x: jnp.float32(1e20) * x, params)))
    updates, state = jax.jit(tx.update)(grads, jax.jit(tx.init)(params), params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))


def test_two_steps_of_muon_against_float64():
    config = OptimConfig("muon", RATE, warmup=0, schedule="constant", weight_decay=0.5, clip=1e9)
    tx, params, grads = optimizer(config, 10), draw(0), [draw(1), draw(2)]
    state, got = tx.init(float32(params)), float32(params)
    for g in grads:
        updates, state = jax.jit(tx.update)(float32(g), state, got)
        got = optax.apply_updates(got, updates)
    b, (b1, b2) = config.muon_momentum, (config.b1, config.b2)
    pairs = zip(flat(params).items(), flat(got).values(), *(flat(g).values() for g in grads), strict=True)
    for (name, p), found, g1, g2 in pairs:
        decay = 0.0 if is_vector(name) else 0.5
        if is_hidden_matrix(name):
            mu1, mu2 = (1 - b) * g1, (1 - b) * (b * g1 + g2)
            look = [b * mu / (1 - b ** (t + 1)) + (1 - b) * g / (1 - b**t) for t, mu, g in ((1, mu1, g1), (2, mu2, g2))]
            # every matrix [m, n] of the stack by itself
            ortho = [np.stack([newton_schulz(m) for m in x.reshape(-1, *x.shape[-2:])]).reshape(x.shape) for x in look]
            steps = [0.2 * np.sqrt(max(p.shape[-2:])) * x for x in ortho]
        else:
            mu = [g1, (b1 * g1 + g2) / (1 + b1)]
            nu = [g1**2, (b2 * g1**2 + g2**2) / (1 + b2)]
            steps = [m / (np.sqrt(v) + 1e-8) for m, v in zip(mu, nu, strict=True)]
        for step in steps:
            p = p - RATE * (step + decay * p)
        np.testing.assert_allclose(found, p, rtol=2e-4, atol=2e-5, err_msg=name)  # float32, five cubics deep


def test_muon_is_optax_muon_matrix_by_matrix():
    grads = [draw(n, {"w": (2, 3, 6, 9)}) for n in range(3)]
    ours, theirs = scale_by_muon(0.95), optax.contrib.scale_by_muon(
        weight_dimension_numbers={"w": optax.contrib.MuonDimensionNumbers(-2, -1)}
    )  # fmt: skip
    a, b = ours.init(float32(grads[0])), theirs.init(float32(grads[0]))
    for g in grads:
        x, a = jax.jit(ours.update)(float32(g), a)
        y, b = jax.jit(theirs.update)(float32(g), b)
        np.testing.assert_allclose(x["w"], 0.2 * 3 * y["w"], rtol=1e-3, atol=1e-4)


def test_muon_gathers_no_expert():
    """Experts over cp, their rows over fsdp: only X X^T travels (optax's muon gathers whole experts here)."""
    mesh = jax.make_mesh((2, 2), ("fsdp", "cp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    x = {"w": jax.ShapeDtypeStruct((2, 4, 64, 16), jnp.float32, sharding=NamedSharding(mesh, P(None, "cp", "fsdp")))}
    tx = scale_by_muon(0.95)
    step = jax.jit(lambda g, mu: tx.update(g, MuonState(jnp.int32(0), mu))[0], out_shardings={"w": x["w"].sharding})
    text = step.lower(x, x).compile().as_text()
    assert text is not None
    assert "all-reduce" in text
    assert "all-gather" not in text
    assert "all-to-all" not in text


def where() -> Sharding:
    return Sharding(jax.make_mesh((1, 2), ("fsdp", "cp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:2]))


@pytest.mark.parametrize("model", ["tiny-qwen3-moe", "tiny-deepseek-v2"])
def test_what_is_done_to_the_parameters_of_a_model(model: str):
    sharding = where()
    config = Config(router=RouterConfig(bias_rate=0.1), dtype="bfloat16")
    _, shapes = abstract_state(maker(config, PRESETS[model], sharding))
    muon = {name.split(".", 2)[2] for name in names(shapes) if is_hidden_matrix(name)}
    vectors = {name.split(".")[-2] for name in names(shapes) if is_vector(name)}
    moe, attention = {"gate", "up", "down"}, {"q", "k", "v", "o"}
    if model == "tiny-qwen3-moe":
        assert muon == {f"attention.{x}.weight" for x in attention} | {f"mlp.{x}" for x in moe}
        assert vectors == {"attention_norm", "mlp_norm", "q_norm", "k_norm", "norm", "mlp"}  # mlp.bias
    else:
        assert muon == {f"attention.{x}.weight" for x in ("q", "kv_a", "kv_b", "o")} | {
            f"mlp.{x}" for y in moe for x in (f"{y}.weight", f"routed.{y}", f"shared.{y}.weight")
        }
    for name in ("adamw", "muon"):
        tx = optimizer(OptimConfig(name), 10)
        state = jax.eval_shape(tx.init, shapes)
        dtypes = {x.dtype for x in jax.tree.leaves((shapes, state)) if x.ndim}
        assert dtypes == {jnp.dtype("float32")}  # master weights and moments, whatever the arithmetic
        placed = state_shardings(shapes, tx, sharding)
        tables = [x for path, x in jax.tree_util.tree_leaves_with_path(placed.opt_state) if "gate" in str(path)]
        assert tables
        assert {x.spec for x in tables if "norm" not in str(x)} <= {
            P(None, None, ("fsdp", "cp"), None), P(None, ("fsdp", "cp"), None)
        }  # fmt: skip


def test_groups_scale_the_rate_and_replace_the_decay():
    made = ("*.q.*=0.5", "embedding.*=1,0", "*norm*=2,0.25", "*.route=0", "groups.0.mlp.*=1")
    config = OptimConfig(learning_rate=RATE, warmup=0, schedule="constant", weight_decay=0.5, groups=made)
    params, grads = draw(0), draw(1)
    check_groups(made, params)
    moved = {}
    for key, value in (("with", config), ("without", OptimConfig(learning_rate=RATE, warmup=0, schedule="constant"))):
        tx = optimizer(value, 10)
        moved[key] = flat(tx.update(float32(grads), tx.init(float32(params)), float32(params))[0])
    want = {"q": (0.5, 0.5), "table": (1, 0), "norm": (2, 0.25), "route": (0, 0.5), "gate": (1, 0.5), "bias": (1, 0),
            "head": (1, 0.5)}  # fmt: skip
    for name, p in flat(params).items():
        scale, decay = next(value for key, value in want.items() if key in name.split("."))
        adam = moved["without"][name] + RATE * (0 if is_vector(name) else 0.1) * p
        np.testing.assert_allclose(moved["with"][name], scale * (adam - RATE * decay * p), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("text", ["*norm*", "=1", "x=", "x=1,2,3", "x=-1", "x=nan", "x=a"])
def test_a_group_that_is_none(text: str):
    with pytest.raises(UserError, match=r"^optim.groups: must be PATTERN=LR_SCALE or .*, got "):
        groups.parse(text)


@pytest.mark.parametrize("texts", [("mlp=1",), ("*norm*=1", "*.norm.*=2")])
def test_a_group_that_fits_nothing_lists_the_names(texts: tuple[str, ...]):
    with pytest.raises(UserError, match=r"^optim.groups: must fit a name .*, of embedding.table, .*head.weight, got"):
        check_groups(texts, draw(0))


def test_the_examples():
    assert doctest.testmod(groups).failed == 0


def rates(steps: int, **config) -> np.ndarray:
    rate = schedule(OptimConfig(learning_rate=1.0, **config), steps)
    return np.array([np.asarray(rate(n)) for n in range(steps)])


def test_wsd_rises_stays_and_comes_down():
    got = rates(20, schedule="wsd", warmup=4, decay_fraction=0.25, final_fraction=0.5)
    np.testing.assert_allclose(got[:4], [0.2, 0.4, 0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(got[4:16], 1.0)
    np.testing.assert_allclose(got[15:], 1 - 0.1 * np.arange(5), rtol=1e-6)  # 0.5 would be step 20
    longer = rates(40, schedule="wsd", warmup=4, decay_fraction=0.25, final_fraction=0.5)
    np.testing.assert_array_equal(longer[:16], got[:16])  # a longer run is the same until the shorter one comes down
    short = rates(8, schedule="wsd", warmup=6, decay_fraction=1.0, final_fraction=0.0)
    np.testing.assert_allclose(short[6:], [1.0, 0.5], rtol=1e-6)  # the warm-up is never cut


def test_cosine_comes_down_to_its_last_fraction():
    got = rates(100, schedule="cosine", warmup=10, final_fraction=0.1)
    np.testing.assert_allclose(got[[9, 10, 55]], [10 / 11, 1.0, 0.55], rtol=1e-5)
    assert 0.1 < got[-1] < 0.101


def test_clipping_is_by_the_global_norm():
    """Adam forgets a common factor, so what shows is its first moment."""
    tx = optimizer(OptimConfig(clip=0.5), 10)
    grads = draw(1)
    mu = flat(optax.tree.get(tx.update(float32(grads), tx.init(float32(grads)), float32(grads))[1], "mu"))
    norm = np.sqrt(sum(np.sum(g**2) for g in flat(grads).values()))
    for name, g in flat(grads).items():
        np.testing.assert_allclose(mu[name], 0.1 * g * 0.5 / norm, rtol=1e-5)
