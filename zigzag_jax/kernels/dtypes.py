"""The number formats that every kernel's contract takes; sums are float32 whatever they are."""

import jax.numpy as jnp

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
DTYPE_NAMES = "bfloat16, float16 or float32"

__all__ = ["DTYPES", "DTYPE_NAMES"]
