"""Many equal layers as one: stacked parameters, a scan, and what the backward pass keeps of it.

The parameters of L equal layers are stacked along a new first axis, and one compiled layer runs L times: the compile
time does not grow with the depth. Layers that are not alike (a dense block among mixtures of experts) make several
*groups*, each its own stack.

Without rematerialisation a layer keeps every intermediate for the backward pass. The policies, by name:

    none         keep everything: the fastest for small models (it keeps the gathered experts of every layer)
    matmuls      as attention, and keep the results of the matmuls that the backward needs: the projections of
                 attention (DeepSeek's latent, not the keys and values made of it), gate and up (of experts with ep = 1:
                 exchange.py keeps nothing). Recomputed are norms, rotary embedding, router, gathers and SwiGLU
    attention    keep the layer's input and the attention's output and log-sum-exp, recompute the rest: the ring,
                 whose cost grows with the square of the context and which waits for the network, runs once
    full         keep the layer's input only; the ring runs again
    offload      as attention, but what is kept waits in the host's pinned memory: each layer's is copied out in the
                 forward and back in the backward, over PCIe
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from zigzag_jax.kernels.grouped.swiglu import HIDDEN_NAME
from zigzag_jax.models.layers import MATMUL_NAME
from zigzag_jax.ring import LSE_NAME, OUT_NAME

INPUT_NAME = "layer_input"
REMAT: dict[str, Callable | None] = {
    "none": None,
    "matmuls": jax.checkpoint_policies.save_only_these_names(OUT_NAME, LSE_NAME, MATMUL_NAME, HIDDEN_NAME),
    "attention": jax.checkpoint_policies.save_only_these_names(OUT_NAME, LSE_NAME),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[INPUT_NAME, OUT_NAME, LSE_NAME],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def check_remat(name: str) -> None:
    """Raise ValueError unless `name` is a policy of this file."""
    if name not in REMAT:
        raise ValueError(f"remat must be one of {', '.join(REMAT)}, got {name!r}")


def equal_groups(kinds: list) -> list[tuple[Any, int]]:
    """Runs of equal layers, as (kind, length).

    >>> equal_groups(["dense", "moe", "moe"])
    [('dense', 1), ('moe', 2)]
    """
    groups = []
    for kind in kinds:
        if groups and groups[-1][0] == kind:
            groups[-1] = (kind, groups[-1][1] + 1)
        else:
            groups.append((kind, 1))
    return groups


def stack_layers(make: Callable[[nnx.Rngs], nnx.Module], length: int, rngs: nnx.Rngs) -> nnx.Module:
    """`length` layers drawn independently, as one module whose parameters have a leading "layers" axis."""

    @nnx.split_rngs(splits=length)
    @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
    def init(rngs):
        return make(rngs)

    return init(rngs)


def scan_layers(
    layers: nnx.Module,
    length: int,
    call: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]],
    x: jax.Array,
    remat: str,
    given: Any = None,
) -> tuple[jax.Array, Any]:
    """Takes x through stacked layers by `call(layer, x, own) -> (x, extra)`; the extras come back stacked.

    `given` is a pytree of arrays [length, ...] of which each layer gets its own part.
    """
    graphdef, params = nnx.split(layers, nnx.Param)

    def body(x, layer):
        params, own = layer
        return call(nnx.merge(graphdef, params), checkpoint_name(x, INPUT_NAME), own)

    if (policy := REMAT[remat]) is not None:
        # a loop keeps XLA from merging the recomputation with the first run; a loop of one trip is inlined and does not
        body = jax.checkpoint(body, policy=policy, prevent_cse=length == 1)
    return lax.scan(body, x, (params, given))
