"""Muon: momentum whose every matrix is made nearly orthogonal before it is taken as a step.

A step of momentum M = U S V^T is mostly a few large directions; Muon takes U V^T instead, in which all count alike, and
makes it without a decomposition, by five Newton-Schulz steps that push all singular values towards 1:

    X = M / |M|,  then five times  X <- a X + (b X X^T + c (X X^T)^2) X,     a, b, c = 3.4445, -4.7750, 2.0315

(Jordan 2024, github.com/KellerJordan/Muon; the coefficients leave singular values between 0.7 and 1.2: near enough).
The result is scaled by 0.2 sqrt(max(rows, columns)), the root mean square of an AdamW step, so that one learning rate
and one weight decay serve for both (Liu et al. 2025, arXiv:2502.16982).

It is optax.contrib.muon's arithmetic with one difference: there the axes that are not the matrix's are made one, and
[layers, experts] with the experts over devices cannot be one axis: XLA would gather every expert on every device. Here
leading axes stay as they are, each expert of each layer a matrix of its own. A matrix that is cut over devices (fsdp,
cp) stays cut: what travels is X X^T, one all-reduce a step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

ROUNDS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
RMS = 0.2  # of AdamW's steps
_EPS = 1e-8


class MuonState(NamedTuple):
    """What Muon remembers."""

    steps: jax.Array
    """Taken, int32 scalar."""
    mu: optax.Updates
    """Momentum, like the parameters."""


def orthogonalize(x: jax.Array) -> jax.Array:
    """[..., m, n] -> the same matrices with singular values near 1; 0 stays 0."""
    tall = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -1, -2) if tall else x  # the smaller of X X^T and X^T X
    x = x / (jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True)) + _EPS)
    a, b, c = COEFFICIENTS
    for _ in range(ROUNDS):
        square = jnp.matmul(x, jnp.swapaxes(x, -1, -2))
        x = a * x + jnp.matmul(b * square + c * jnp.matmul(square, square), x)
    return jnp.swapaxes(x, -1, -2) if tall else x


def scale_by_muon(momentum: float) -> optax.GradientTransformation:
    """Gradients [..., m, n] -> Muon's direction (to be multiplied by minus the learning rate), with Nesterov's look
    ahead.
    """

    def init(params: optax.Params) -> MuonState:
        return MuonState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params))

    def update(updates, state, params=None):
        del params
        steps, mu = state.steps + 1, optax.tree.update_moment(updates, state.mu, momentum, 1)
        ahead = optax.tree.bias_correction(mu, momentum, steps + 1)
        now = optax.tree.bias_correction(updates, momentum, steps)
        look = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, ahead, now)
        scale = lambda x: RMS * max(x.shape[-2:]) ** 0.5 * orthogonalize(x)
        return jax.tree.map(scale, look), MuonState(steps, mu)

    return optax.GradientTransformation(init, update)
