"""Zigzag ring attention for JAX: training on contexts that do not fit one GPU.

    layout      which tokens a rank holds          ranges      what each row may see
    kernels     flash attention, grouped matmul    ring        the keys' way round the mesh
    attention   the functions to call

Importing this touches no device and needs jax and numpy only; `zigzag_jax.models` and `zigzag_jax.train` need the
`train` extra.
"""

from zigzag_jax.attention import ring_attention, zigzag_attention
from zigzag_jax.layout import check_positions, from_zigzag, to_zigzag

__all__ = ["check_positions", "from_zigzag", "ring_attention", "to_zigzag", "zigzag_attention"]
