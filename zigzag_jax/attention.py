"""Attention over a sequence that is sharded over a mesh axis: the two functions a user calls, and their checks.

    zigzag_attention     global arrays in zigzag order, under jit or eagerly: it opens the shard_map itself
    ring_attention       one rank's arrays, inside a shard_map of your own

Both are causal. `positions` (a token's index inside its document) is the mask for packed sequences; a model's rotary
positions may be other numbers and are the model's own affair. At cp = 1 both are plain flash attention.
"""

import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from zigzag_jax.kernels import FLASH, check_implementation
from zigzag_jax.kernels.flash.contract import check_qkv, check_settings
from zigzag_jax.layout import CHUNKS, Layout, check_layout, global_positions
from zigzag_jax.ranges import live_steps, visible_bounds
from zigzag_jax.ring import STRATEGIES, Expand, Identity, Plan, Strategy, ring


# -------------------------------------------------------------------------------------------------------------- checks
def _check_window(window) -> int | None:
    """The window where it is static, None where it is absent or data. ValueError where it is no whole number >= 1."""
    if window is None:
        return None
    if isinstance(window, (int, np.integer)) and not isinstance(window, bool):
        if window < 1:
            raise ValueError(f"window must be >= 1 (a token sees itself and window - 1 before it), got {window}")
        return int(window)
    if not isinstance(window, jax.Array) or window.ndim or not jnp.issubdtype(window.dtype, jnp.integer):
        raise ValueError(f"window must be None, an int or an integer scalar jax.Array, got {window!r}")
    return None


def _check_mask(q, positions, sink) -> None:
    if positions is not None and (tuple(positions.shape) != tuple(q.shape[:2]) or positions.dtype != jnp.int32):
        raise ValueError(
            f"positions must be int32 [B, S] = {list(q.shape[:2])}, got {positions.dtype} {list(positions.shape)}"
        )
    if sink is not None and (tuple(sink.shape) != (q.shape[2],) or not jnp.issubdtype(sink.dtype, jnp.floating)):
        raise ValueError(
            f"sink must hold one floating logit a query head, [{q.shape[2]}], got {sink.dtype} {list(sink.shape)}"
        )


def _check_choice(name: str, value, choices) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_grad_dtype(grad_dtype):
    try:
        dtype = jnp.dtype(jnp.float32 if grad_dtype is None else grad_dtype)
    except TypeError:
        dtype = None
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"grad_dtype must be float32 or bfloat16, got {grad_dtype!r}")
    return dtype


def _check_local_length(length: int, key_length: int, layout: Layout) -> None:
    if length != key_length:
        raise ValueError(f"q and k must have one sequence length, got {length} and {key_length}")
    if length % CHUNKS[layout]:
        raise ValueError(f"a rank's sequence length must be divisible by {CHUNKS[layout]} ({layout}), got {length}")


def _check_inside_shard_map(axis_name: str) -> int:
    """Size of the ring's axis. ValueError outside of a fully manual shard_map(check_vma=False) over it."""
    mesh = jax.sharding.get_abstract_mesh()
    if axis_name not in mesh.manual_axes:
        raise ValueError(
            f"ring_attention must run inside a shard_map over its axis, got axis_name {axis_name!r} and manual axes "
            f"{list(mesh.manual_axes)}"
        )
    if varying := jax.typeof(lax.axis_index(axis_name)).mat.varying:  # only check_vma=True types it so
        raise ValueError(
            f"ring_attention needs shard_map(..., check_vma=False), got values typed as varying over {sorted(varying)}"
        )
    left = [axis for axis in mesh.axis_names if axis not in mesh.manual_axes and mesh.shape[axis] > 1]
    if left:
        raise ValueError(f"ring_attention needs a shard_map that is manual over every mesh axis, got {left} left out")
    return mesh.shape[axis_name]


# ----------------------------------------------------------------------------------------------------------- per shard
def attention_plan(
    q, *, axis_name: str, window, scale, softcap, strategy, implementation, deterministic, grad_dtype, layout: Layout,
    expand: Expand | None = None,
) -> Plan:  # fmt: skip
    """The Plan of q [B, S / cp, H, D] inside a shard_map; the other arguments are ring_attention's, checked here."""
    static_window = _check_window(window)
    _check_choice("strategy", strategy, STRATEGIES)
    check_implementation(implementation, FLASH)
    settings = check_settings(q.shape[3] ** -0.5 if scale is None else scale, softcap)
    cp, length = _check_inside_shard_map(axis_name), q.shape[1]
    return Plan(
        cp=cp, axis_name=axis_name, length=length, live=live_steps(cp, length, static_window, layout), layout=layout,
        scale=settings.scale, softcap=settings.softcap, strategy=strategy, implementation=implementation,
        deterministic=bool(deterministic), grad_dtype=_check_grad_dtype(grad_dtype), expand=expand or Identity(),
    )  # fmt: skip


def attention_bounds(plan: Plan, positions, window) -> tuple[jax.Array, jax.Array]:
    """Global bounds [lo, hi) of the keys that this rank's rows see (ranges.visible_bounds)."""
    rank = lax.axis_index(plan.axis_name) if plan.cp > 1 else 0
    return visible_bounds(global_positions(rank, plan.cp, plan.length, plan.layout), positions, window)


def ring_attention(
    q, k, v, *, axis_name: str = "cp", positions=None, window=None, scale=None, sink=None, softcap=None,
    strategy: Strategy = "ring", implementation=None, return_lse=False, deterministic=False, grad_dtype=None,
    layout: Layout = "zigzag",
) -> Any:  # fmt: skip
    """Causal attention of this rank's queries over the keys of all ranks on `axis_name`, inside your own shard_map.

    The shard_map must be manual over every mesh axis and have `check_vma=False`: manual over `axis_name` alone, XLA
    would gather the batch in front of the kernel.

    Args:
      q: [B, S / cp, H, D], this rank's rows in zigzag order; bfloat16, float16 or float32.
      k: [B, S / cp, K, D], H % K == 0, same dtype.
      v: [B, S / cp, K, E], same dtype; E may differ from D.
      axis_name: mesh axis of the ring.
      positions: int32 [B, S / cp], index of each token inside its document, or None: one document a row.
      window: a token sees itself and the window - 1 tokens before it: an int (ring steps that nobody needs are skipped)
        or an integer scalar jax.Array, traced too (it may differ per layer), or None.
      scale: static factor of q.k; default D ** -0.5.
      sink: float [H], logits of an attention sink per head, or None.
      softcap: static cap of the scores, or None.
      strategy: "ring" or "allgather".
      implementation: a key of zigzag_jax.kernels.FLASH, None for this backend's kernel, "hopper" for a Hopper GPU's.
      return_lse: also return lse float32 [B, H, S / cp] (natural log); it may have a cotangent.
      deterministic: gradient sums in a fixed order.
      grad_dtype: dtype in which the gradient of k and v travels: float32 (default) or bfloat16 (half the bytes, error
        grows with cp).
      layout: "zigzag", or "contiguous" (the naive layout, unbalanced: for comparison).

    Returns:
      out [B, S / cp, H, E] in q's dtype, or (out, lse).

    Raises:
      ValueError: an argument breaks a rule above; the message names the rule and the value.
    """
    check_qkv(q, k, v)
    check_layout(layout)
    _check_local_length(q.shape[1], k.shape[1], layout)
    _check_mask(q, positions, sink)
    plan = attention_plan(
        q, axis_name=axis_name, window=window, scale=scale, softcap=softcap, strategy=strategy,
        implementation=implementation, deterministic=deterministic, grad_dtype=grad_dtype, layout=layout,
    )  # fmt: skip
    lo, hi = attention_bounds(plan, positions, window)
    out, lse = cast(tuple[jax.Array, jax.Array], ring(plan, None, q, (k, v), lo, hi, sink))
    return (out, lse) if return_lse else out


# ------------------------------------------------------------------------------------------------------- global arrays
def _find_mesh(mesh) -> Mesh | AbstractMesh:
    if manual := jax.sharding.get_abstract_mesh().manual_axes:
        raise ValueError(
            "zigzag_attention must be called outside of any shard_map (inside one: ring_attention), got a shard_map "
            f"over {list(manual)}"
        )
    if mesh is None:
        mesh = jax.sharding.get_abstract_mesh()
    if not mesh.axis_names:
        raise ValueError("mesh must be given, or set by jax.set_mesh: got none (for one device, a mesh with cp = 1)")
    return mesh


def _known_specs(x) -> list[PartitionSpec]:
    """What x is known to be sharded as: its type tells Explicit axes, and a concrete array tells all of them."""
    specs = [jax.typeof(x).sharding.spec]
    if isinstance(x, jax.Array) and not isinstance(x, Tracer) and isinstance(x.sharding, NamedSharding):
        specs.append(x.sharding.spec)
    return specs


def _axes(entry) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _size(mesh, entry) -> int:
    return math.prod(mesh.shape[axis] for axis in _axes(entry))


def _find_spec(q, k, v, mesh, spec, axis_name: str) -> PartitionSpec:
    """The full [batch, sequence, heads, head_dim] spec, checked against the mesh and what the arrays are."""
    if spec is None:
        if not all(t == AxisType.Explicit for t in mesh.axis_types):
            raise ValueError(
                "spec must be given, P(batch axes, cp axis, head axes, None), unless every mesh axis is Explicit: "
                f"got None and axis types {[t.name for t in mesh.axis_types]}"
            )
        spec = jax.typeof(q).sharding.spec
    if len(spec) > 4:
        raise ValueError(f"spec must have at most 4 entries, [batch, sequence, heads, head_dim], got {spec}")
    spec = PartitionSpec(*spec, *[None] * (4 - len(spec)))
    named = [axis for entry in spec for axis in _axes(entry)]
    if unknown := [axis for axis in named if axis not in mesh.axis_names]:
        raise ValueError(f"spec must name axes of the mesh {list(mesh.axis_names)}, got {unknown}")
    if _axes(spec[1]) != (axis_name,) or spec[3] is not None:
        raise ValueError(f"spec must shard the sequence over {axis_name!r} alone and head_dim over nothing, got {spec}")
    for name, known in ((name, known) for name, x in (("q", q), ("k", k), ("v", v)) for known in _known_specs(x)):
        left = [axis for entry in known for axis in _axes(entry) if axis not in named and mesh.shape.get(axis) != 1]
        if left:
            raise ValueError(
                f"spec must name every axis that {name} is sharded over, got {spec}, but {name} is {known}"
            )
    return spec


def _reshard(x, mesh, spec: PartitionSpec) -> jax.Array:
    """The array x, typed as `spec` says of the mesh's Explicit axes; the Auto ones have no place in a type."""
    typed = {axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    entries = [tuple(axis for axis in _axes(entry) if axis in typed) or None for entry in spec]
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*entries)))


def _check_divides(name: str, size: int, mesh, entry) -> None:
    if size % _size(mesh, entry):
        raise ValueError(f"{name} must be divisible by the {_size(mesh, entry)} shards of {entry}, got {size}")


def _check_global(q, k, v, mesh, spec, axis_name: str, layout: Layout) -> None:
    check_qkv(q, k, v)
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"q and k must have one sequence length, got {q.shape[1]} and {k.shape[1]}")
    parts = CHUNKS[layout] * mesh.shape[axis_name]
    if q.shape[1] % parts:
        raise ValueError(f"sequence length must be divisible by {parts} (2 * cp with zigzag), got {q.shape[1]}: pad it")
    _check_divides("batch size", q.shape[0], mesh, spec[0])
    _check_divides("q heads", q.shape[2], mesh, spec[2])
    _check_divides("kv heads", k.shape[2], mesh, spec[2])


def zigzag_attention(
    q, k, v, *, positions=None, window=None, scale=None, sink=None, softcap=None, mesh=None, spec=None, axis_name="cp",
    strategy=None, implementation=None, deterministic=False, grad_dtype=None, layout: Layout = "zigzag",
) -> jax.Array:  # fmt: skip
    """Causal attention on global arrays whose sequence axis is sharded over `axis_name` in zigzag order.

    Args:
      q: [B, S, H, D] in zigzag order (to_zigzag), S % (2 * cp) == 0; bfloat16, float16 or float32.
      k: [B, S, K, D], H % K == 0, same dtype.
      v: [B, S, K, E], same dtype; E may differ from D.
      positions: int32 [B, S], zigzag order, index of each token inside its document; None: one document a row.
      window: as in ring_attention, like scale, sink, softcap, implementation, deterministic, grad_dtype, layout.
      scale: see window.
      sink: see window.
      softcap: see window.
      mesh: Mesh with the axis `axis_name`; None takes the one set by jax.set_mesh.
      spec: how q is sharded, PartitionSpec(batch axes, axis_name, head axes, None); k and v alike. Needed on a mesh
        with Auto axes, where no array's type tells it; an axis that an array is sharded over and spec leaves out would
        be gathered. None: from q's type (Explicit axes).
      axis_name: mesh axis of the ring.
      strategy: "ring", "allgather", or None, which is "ring": it needs least memory. With many short documents in a row
        "allgather" is better balanced.
      implementation: see window.
      deterministic: see window.
      grad_dtype: see window.
      layout: see window.

    Returns:
      out [B, S, H, E] in q's dtype, sharded as q.

    Raises:
      ValueError: an argument breaks a rule above; the message names the rule and the value.
    """
    mesh = _find_mesh(mesh)
    if axis_name not in mesh.axis_names:
        raise ValueError(f"axis_name must be an axis of the mesh {list(mesh.axis_names)}, got {axis_name!r}")
    check_layout(layout)
    strategy = "ring" if strategy is None else strategy
    spec = _find_spec(q, k, v, mesh, spec, axis_name)
    _check_global(q, k, v, mesh, spec, axis_name, layout)
    _check_mask(q, positions, sink)
    _check_window(window)

    # What is optional and an array goes in as an argument: a closure over a tracer would not survive grad.
    extras: dict[str, Any] = {"positions": positions}
    if sink is not None:  # float32, so that the ranks' shares of its gradient are summed in float32
        extras["sink"] = sink.astype(jnp.float32)
    specs = {"positions": PartitionSpec(spec[0], spec[1]), "sink": PartitionSpec(spec[2])}
    static_window = window
    if isinstance(window, jax.Array):
        static_window, extras["window"], specs["window"] = None, window, PartitionSpec()
    extras = {name: x for name, x in extras.items() if x is not None}
    if AxisType.Explicit in mesh.axis_types:
        extras = {name: _reshard(x, mesh, specs[name]) for name, x in extras.items()}

    def attend(q, k, v, extras):
        return ring_attention(
            q, k, v, **({"window": static_window} | extras), axis_name=axis_name, scale=scale, softcap=softcap,
            strategy=strategy, implementation=implementation, deterministic=deterministic, grad_dtype=grad_dtype,
            layout=layout,
        )  # fmt: skip

    in_specs = (spec, spec, spec, {name: specs[name] for name in extras})
    return jax.shard_map(attend, mesh=mesh, in_specs=in_specs, out_specs=spec, check_vma=False)(q, k, v, extras)
