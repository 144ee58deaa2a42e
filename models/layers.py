"""The small parts every transformer here is made of: linear, embedding, norm, SwiGLU.

Two rules of number formats hold for all of them. Parameters are float32 (the master copy that the optimiser changes);
they are cast to the dtype of the activations where they are used. Whatever is a *sum over many tokens*, the gradient
of a weight above all, is accumulated and summed over devices in float32: a weight gradient rounded to bfloat16 on
every device before it is added is the error that grows with the number of devices. (The experts' matrices are the
exception where every device has all of them: grouped_matmul gives their gradient in the dtype it computes in, rounded
once a device, summed in float32. With expert parallelism it is float32 throughout.)
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from zigzag_jax.models.sharding import Sharding, gather, param

MATMUL_NAME = "matmul"
"""Of every Linear's result, for `jax.checkpoint`."""


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> jax.Array:
    """Float32 weights as Hugging Face draws them: normal, mean zero."""
    return std * jax.random.normal(rngs.params(), shape, jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: jax.Array, w: jax.Array, precision: lax.Precision | None = None) -> jax.Array:
    """Rows x [..., k] times w [k, n] in x's dtype; the gradient of w is float32 from the first addition on.

    `precision` is that of all three products, where the default is not enough: of float32 a GPU rounds the factors.
    """
    return jnp.matmul(x, w.astype(x.dtype), precision=precision)


def _linear_bwd(precision, residuals, dy):
    x, w = residuals
    rows = tuple(range(x.ndim - 1))
    dw = lax.dot_general(x, dy, ((rows, rows), ((), ())), precision, preferred_element_type=jnp.float32)
    # contracted where it lies: of a transposed weight XLA would gather a second copy
    dx = lax.dot_general(dy, w.astype(dy.dtype), (((dy.ndim - 1,), (1,)), ((), ())), precision)
    return dx, dw.astype(w.dtype)


linear.defvjp(lambda x, w, precision: (linear(x, w, precision), (x, w)), _linear_bwd)


class Linear(nnx.Module):
    """A matrix [k, n] without bias, named by its logical axes."""

    def __init__(self, shape: tuple[int, int], axes: tuple[str, str], *, std: float, rngs: nnx.Rngs):
        self.weight = param(normal(rngs, shape, std), *axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        return checkpoint_name(linear(x, self.weight[...]), MATMUL_NAME)


class Embedding(nnx.Module):
    """Token ids [B, S] -> rows of a table [vocab, d].

    The table is gathered and each device looks up its own tokens. Left to XLA, a lookup in a table that is cut over
    the embed dimension either moves all activations instead, or scatters its gradient without a sum.
    """

    def __init__(self, vocab: int, size: int, sharding: Sharding, *, std: float, rngs: nnx.Rngs):
        self.sharding = sharding
        self.table = param(normal(rngs, (vocab, size), std), "vocab", "embed")

    def __call__(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        table = self.table[...]
        spec = self.sharding.spec(("vocab", "embed"), table.shape)
        rows = self.sharding.spec(("batch", "sequence"), tokens.shape)

        def look_up(table, tokens):
            # rows are taken in float32 and then cast, so that the rows' gradients add up in float32
            return gather(table, spec, jnp.float32)[tokens].astype(dtype)

        run = jax.shard_map(
            look_up, mesh=self.sharding.mesh, in_specs=(spec, rows), out_specs=P(*rows, None), check_vma=False
        )
        return run(table, tokens)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last dimension: float32 inside, cast, then the weight (Hugging Face's order).

    The last product is float32 again (a bfloat16 times a bfloat16 weight rounds to the same number), for the weight's
    gradient.
    """

    def __init__(self, size: int, eps: float):
        self.eps = eps
        self.weight = param(jnp.ones((size,), jnp.float32), "norm")

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        weight = jnp.expand_dims(self.weight[...], tuple(range(x.ndim - 1)))
        return (wide.astype(x.dtype).astype(jnp.float32) * weight).astype(x.dtype)


class SwiGLU(nnx.Module):
    """The dense feed-forward block: down(silu(gate(x)) * up(x))."""

    def __init__(self, size: int, inner: int, *, std: float, rngs: nnx.Rngs):
        self.gate = Linear((size, inner), ("embed", "mlp"), std=std, rngs=rngs)
        self.up = Linear((size, inner), ("embed", "mlp"), std=std, rngs=rngs)
        self.down = Linear((inner, size), ("mlp", "embed"), std=std, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
