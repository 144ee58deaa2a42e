"""The rotary embedding: pairings, scalings (against numbers that transformers 5.24 gives), and what does not change."""

import jax.numpy as jnp
import numpy as np
import pytest

from zigzag_jax.models.rope import Linear, Rope, Yarn, rotary, rotate_half, rotate_pairs, stretch

DEEPSEEK = Yarn(40.0, 4096, mscale=0.707, mscale_all_dim=0.707)


def test_default_and_linear_frequencies():
    want = 1e4 ** -(np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(Rope(1e4).frequencies(64), want, rtol=1e-6)
    np.testing.assert_allclose(Rope(1e4, Linear(4.0)).frequencies(64), want / 4, rtol=1e-6)


def test_yarn_keeps_fast_frequencies_and_divides_slow_ones():
    own, scaled = Rope(1e4).frequencies(64), Rope(1e4, DEEPSEEK).frequencies(64)
    turns = own * 4096 / (2 * np.pi)  # in the original context
    ratio = scaled / own
    np.testing.assert_allclose(ratio[turns > 40], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns < 0.8], 1 / 40, rtol=1e-6)
    assert (np.diff(ratio) <= 1e-7).all()
    assert ((ratio > 1 / 40 + 1e-3) & (ratio < 1 - 1e-3)).sum() > 5  # the ramp


@pytest.mark.parametrize(
    ("scaling", "amplitude"),
    [
        (None, 1.0),
        (Linear(8.0), 1.0),
        (Yarn(1.0, 4096), 1.0),
        (Yarn(4.0, 4096), 0.1 * np.log(4) + 1),
        (DEEPSEEK, 1.0),
        (Yarn(40.0, 4096, mscale=1.0, mscale_all_dim=0.707), stretch(40, 1) / stretch(40, 0.707)),
        (Yarn(4.0, 4096, attention_factor=1), 1.0),
    ],
)
def test_amplitude(scaling, amplitude):
    rope = Rope(1e4, scaling)
    assert rope.amplitude == pytest.approx(amplitude)
    cos, _ = rotary(jnp.zeros((1, 1), jnp.int32), 8, rope)
    np.testing.assert_allclose(cos, amplitude, rtol=1e-6)


def test_a_ramp_of_no_width_is_a_step():
    narrow = Yarn(2.0, 64, beta_fast=1.0, beta_slow=1.0, truncate=False)
    ratio = Rope(1e4, narrow).frequencies(16) / Rope(1e4).frequencies(16)
    assert set(np.round(ratio, 6)) == {0.5, 1.0}


@pytest.mark.parametrize("turn", [rotate_half, rotate_pairs])
def test_scores_depend_on_the_distance_only(turn):
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 16)), jnp.float32) for _ in range(2))
    at = lambda x, p: turn(x, rotary(jnp.full((1, 1), p, jnp.int32), 16, Rope(100.0)))
    score = lambda i, j: float(jnp.sum(at(q, i) * at(k, j)))
    assert score(9, 4) == pytest.approx(score(105, 100), rel=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), rel=1e-2)


def test_the_two_pairings_are_a_permutation_of_each_other():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 3, 2, 8)), jnp.float32)
    turn = rotary(jnp.arange(3, dtype=jnp.int32)[None], 8, Rope(10.0))
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # pairs (2i, 2i+1) -> (i, i + D/2)
    np.testing.assert_allclose(rotate_half(x[..., order], turn), rotate_pairs(x, turn)[..., order], rtol=1e-6)
