"""The chunked cross-entropy against float64, on any mesh, and that no array of [B, S, V] is ever made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from zigzag_jax.train.loss import _lse_in_one_pass, cross_entropy, cross_entropy_sum, predicted

B, S, D, V = 4, 24, 16, 50
FACTOR = 0.37  # cotangent of the objective: a gradient that forgets it is another


def make_mesh(dp: int, cp: int) -> Mesh:
    return jax.make_mesh(
        (dp, 1, cp), ("dp", "fsdp", "cp"), axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[: dp * cp]
    )


def case(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(-1, V, (B, S)).astype(np.int32)
    labels[0] = -1  # a row with nothing to predict
    return rng.standard_normal((B, S, D)), rng.standard_normal((D, V)), labels


def oracle(hidden, head, labels, z_loss):
    """Float64: objective, cross-entropy, sum of lse^2, and the objective's gradients."""
    logits = hidden @ head
    lse = np.log(np.exp(logits).sum(-1))
    p = np.exp(logits - lse[..., None])
    real = labels >= 0
    own = np.take_along_axis(p, np.maximum(labels, 0)[..., None], -1)[..., 0]
    loss, z = -np.log(own[real]).sum(), (lse[real] ** 2).sum()
    dlogits = (p * (1 + 2 * z_loss * lse[..., None]) - np.eye(V)[np.maximum(labels, 0)]) * real[..., None]
    return loss + z_loss * z, loss, z, dlogits @ head.T, np.einsum("bsd,bsv->dv", hidden, dlogits)


def test_the_denominator_in_one_pass():
    """As GPUs take it: large, small, equal and absent logits; what is not finite stays in its row."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((8, 1000)).astype(np.float32) * np.float32(10)
    logits[1] += 1e4
    logits[2] -= 1e4
    logits[3] = 5
    logits[4, ::2] = -np.inf
    logits[5, 7] = np.nan
    logits[6, :2] = -np.inf
    got = np.asarray(_lse_in_one_pass(jnp.asarray(logits)))
    finite = np.delete(logits, 5, 0).astype(np.float64)
    top = finite.max(1)
    want = top + np.log(np.exp(finite - top[:, None]).sum(1))
    np.testing.assert_allclose(np.delete(got, 5), want, rtol=1e-6)
    assert np.isnan(got[5])


@pytest.mark.parametrize("z_loss", [0.0, 0.1], ids=["z0", "z0.1"])
@pytest.mark.parametrize(("dp", "cp", "chunk"), [(1, 1, 1000), (1, 1, 7), (2, 2, 5), (4, 2, 12), (1, 3, 1)])
def test_sum_and_gradients(dp: int, cp: int, chunk: int, z_loss: float):
    hidden, head, labels = case(dp * 10 + cp)
    how = {"mesh": make_mesh(dp, cp), "dtype": jnp.float32, "z_loss": z_loss, "chunk": chunk}
    f = lambda h, w: cross_entropy_sum(h, w, jnp.asarray(labels), **how)

    @jax.jit
    def run(h, w):
        objective = lambda h, w: (FACTOR * (sums := f(h, w)).objective, sums)
        made_with = jax.value_and_grad(objective, (0, 1), has_aux=True)(h, w)
        parts = jax.grad(lambda h, w: f(h, w).loss + f(h, w).z, (0, 1))(h, w)
        return f(h, w), made_with, parts

    alone, ((_, sums), grads), parts = run(jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32))
    *totals, dhidden, dhead = oracle(hidden, head, labels, z_loss)
    for a, b in zip((*sums, *grads), (*totals, FACTOR * dhidden, FACTOR * dhead), strict=True):
        assert np.linalg.norm(np.asarray(a, np.float64) - b) <= 1e-5 * np.linalg.norm(b)  # float32 sums
    np.testing.assert_allclose(np.stack(alone), np.stack(sums), rtol=1e-6)  # without a gradient
    assert not any(np.any(part) for part in parts)


def test_the_loss_of_each_token():
    hidden, head, labels = case(5)
    args = jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32), jnp.asarray(labels)
    each = np.asarray(cross_entropy(*args, mesh=make_mesh(2, 2), dtype=jnp.float32, chunk=5))
    assert each.shape == (B, S)
    assert not each[labels < 0].any()
    np.testing.assert_allclose(each.sum(), oracle(hidden, head, labels, 0.0)[1], rtol=1e-5)


def test_gradients_in_bfloat16():
    hidden, head, labels = case(3)
    sums = lambda h, w: cross_entropy_sum(h, w, jnp.asarray(labels), mesh=make_mesh(2, 2), dtype=jnp.bfloat16)
    h, w = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(head, jnp.float32)
    dhidden, dhead = jax.grad(lambda h, w: FACTOR * sums(h, w).objective, (0, 1))(h, w)
    assert (dhidden.dtype, dhead.dtype) == (jnp.bfloat16, jnp.float32)
    rounded = np.asarray(w.astype(jnp.bfloat16), np.float64)
    *_, want_hidden, want_head = oracle(np.asarray(h, np.float64), rounded, labels, 0.0)
    for a, b in zip((dhidden, dhead), (want_hidden, want_head), strict=True):  # two roundings: of G, of the result
        assert np.linalg.norm(np.asarray(a, np.float64) - FACTOR * b) <= 4e-3 * np.linalg.norm(FACTOR * b)


def test_what_is_not_predicted_reaches_no_gradient():
    hidden, head, labels = case(4)
    spoilt = np.where((labels < 0)[:, :, None], np.nan, hidden)
    sums = lambda h, w: cross_entropy_sum(
        h, w, jnp.asarray(labels), mesh=make_mesh(1, 2), dtype=jnp.float32, z_loss=0.1, chunk=5
    )
    f = lambda h, w: sums(h, w).objective
    gradient = lambda h: jax.grad(f, (0, 1))(jnp.asarray(h, jnp.float32), jnp.asarray(head, jnp.float32))
    for got, want in zip(gradient(spoilt), gradient(hidden), strict=True):
        np.testing.assert_array_equal(got, want)


def test_the_gradient_of_a_bfloat16_head_is_summed_in_float32():
    """512 chunks whose own gradient, (1 + 2**-8) / 2, is no bfloat16: rounded once a chunk the sum would be 256."""
    hidden, head = jnp.tile(jnp.array([1.0, 2.0**-8]), 512).reshape(1, 1024, 1), jnp.zeros((1, 2))
    labels = jnp.zeros((1, 1024), jnp.int32)
    f = lambda w: cross_entropy_sum(hidden, w, labels, mesh=make_mesh(1, 1), dtype=jnp.bfloat16, chunk=2).objective
    np.testing.assert_allclose(np.asarray(jax.grad(f)(head)), [[-257.0, 257.0]], rtol=1e-6)


def shapes_in(jaxpr) -> set[tuple[int, ...]]:
    found = set()
    for eqn in jaxpr.eqns:
        found |= {tuple(v.aval.shape) for v in eqn.outvars}
        for value in eqn.params.values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found |= shapes_in(inner)
    return found


def test_no_array_of_all_logits():
    hidden, head, labels = case(0)
    f = lambda h, w: cross_entropy_sum(
        h, w, jnp.asarray(labels), mesh=make_mesh(2, 2), dtype=jnp.float32, z_loss=1e-4, chunk=4
    )
    args = jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32)
    shapes = shapes_in(jax.make_jaxpr(jax.grad(lambda h, w: f(h, w).objective, (0, 1)))(*args).jaxpr)
    dhead = {(D, V), (4 * D, V)}  # that of every device, until they are added
    with_vocabulary = [s for s in shapes if s and s[-1] == V and s not in dhead]
    assert with_vocabulary
    assert max(np.prod(s) for s in with_vocabulary) == 4 * V  # one chunk on one device


def test_predicted_counts_labels():
    assert float(predicted(jnp.array([[0, -1, 3], [-1, -1, 5]]))) == 3.0
