"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): what travels round the ring is the latent.

Keys and values of all heads are made of one small vector a token and one rotary key that the heads share:

    latent [B, S, R], k_pe [B, S, P]        kv = latent @ kv_b [R, H, N + E]
    k = [kv[..., :N], k_pe of every head]   v = kv[..., N:]                       D = N + P

The rotary key is not copied into the heads here: k is SplitKeys(kv[..., :N], k_pe), whose parts a forward kernel reads
where they are (kernels/flash/contract.py).

For DeepSeek-V2-Lite the latent and the rotary key are 512 + 64 = 576 values instead of 16 x (128 + 128) + 64 = 4160: a
hop of a seventh of the bytes, for one more matmul a hop, which runs under the next hop's flight like the kernel does.
`payload="latent"` sends the small form and expands it at every hop; `payload="expanded"` expands once and sends k and
v. Both are one attention; the gradient of kv_b is summed over hops in float32 in the one, and is one matmul in the
other.
"""

import functools
from dataclasses import dataclass
from typing import cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from zigzag_jax.attention import attention_bounds, attention_plan
from zigzag_jax.cost import LatentSizes, Payload, choose_payload
from zigzag_jax.kernels import SplitKeys
from zigzag_jax.layout import CHUNKS
from zigzag_jax.ring import ring

PAYLOADS: tuple[Payload, ...] = ("latent", "expanded")

_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@dataclass(frozen=True)
class Latent:
    """The Expand (ring.py) whose payload is (latent [B, S, R], k_pe [B, S, P]) and whose params are kv_b [R, H, N + E].

    Products are of the payload's dtype and summed in float32; k and v are rounded to it once, as a layer's projection
    would.
    """

    nope: int
    """N: columns of a head that are keys without a place; the rest are values."""

    def fwd(self, params, payload):
        """See ring.Expand."""
        latent, k_pe = payload
        # two matmuls, v's with an operand of its own: XLA would merge them and cut v out of what that makes, a copy
        times = lambda x, w: _einsum("bsr,rhc->bshc", x, w.astype(x.dtype)).astype(x.dtype)
        nope = times(latent, params[..., : self.nope])
        v = times(jax.lax.optimization_barrier(latent), params[..., self.nope :])
        return SplitKeys(nope, k_pe), v

    def bwd(self, params, payload, dk, dv):
        """See ring.Expand."""
        latent, _ = payload
        dkv = jnp.concatenate([dk.own, dv], -1).astype(latent.dtype)  # the cast needs a pass, and this is in it
        dparams = _einsum("bsr,bshc->rhc", latent, dkv)
        dlatent = _einsum("bshc,rhc->bsr", dkv, params.astype(latent.dtype))
        return dparams, (dlatent, dk.shared)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def expand(latent: Latent, params, payload):
    """Make k and v of a payload outside of the ring, with the gradient that `Latent.bwd` gives."""
    return latent.fwd(params, payload)


def _expand_bwd(latent: Latent, residuals, cotangents):
    params, payload = residuals
    dparams, dpayload = latent.bwd(params, payload, *jax.tree.map(lambda x: x.astype(jnp.float32), cotangents))
    return dparams.astype(params.dtype), jax.tree.map(lambda g, x: g.astype(x.dtype), dpayload, payload)


expand.defvjp(lambda latent, params, payload: (latent.fwd(params, payload), (params, payload)), _expand_bwd)


def latent_attention(
    q, latent, k_pe, kv_b, *, positions=None, window=None, scale=None, mesh, spec, axis_name="cp", payload=None,
    strategy=None, implementation=None, deterministic=False, grad_dtype=None,
) -> jax.Array:  # fmt: skip
    """Causal multi-head latent attention on global arrays whose sequence axis is sharded in zigzag order.

    Args:
      q: [B, S, H, D] in zigzag order, its last P values turned by the rotary embedding.
      latent: [B, S, R], normed, q's dtype.
      k_pe: [B, S, P], turned by the rotary embedding, q's dtype.
      kv_b: [R, H, N + E] float32 or q's dtype, N = D - P; the same on every device.
      positions: as in zigzag_attention, like window, scale (default D ** -0.5), mesh, axis_name, strategy,
        implementation, deterministic, grad_dtype.
      window: see positions.
      scale: see positions.
      mesh: see positions.
      spec: PartitionSpec(batch axes, axis_name, None, None) of q.
      axis_name: see positions.
      payload: "latent", "expanded", or None, which is the cost rule's for this mesh and strategy (cost.choose_payload).
      strategy: see positions.
      implementation: see positions.
      deterministic: see positions.
      grad_dtype: see positions.

    Returns:
      out [B, S, H, E] in q's dtype, sharded as q.

    Raises:
      ValueError: an argument breaks a rule above; the message names the rule and the value.
    """
    _check(q, latent, k_pe, kv_b, mesh, spec, axis_name)
    if payload is not None and payload not in PAYLOADS:
        raise ValueError(f"payload must be None or one of {', '.join(PAYLOADS)}, got {payload!r}")
    nope = q.shape[3] - k_pe.shape[2]
    rows = PartitionSpec(*spec[:2])
    extras = {} if positions is None else {"positions": positions}

    def attend(q, latent, k_pe, kv_b, extras: dict[str, jax.Array]):
        make = Latent(nope)
        batch, length, heads, dim = q.shape
        sizes = LatentSizes(latent.shape[2], k_pe.shape[2], heads, dim, kv_b.shape[2] - nope)
        way, cp = strategy or "ring", mesh.shape[axis_name]
        form = payload or choose_payload(cp, batch, length, sizes, q.dtype.itemsize, strategy=way)
        plan = attention_plan(
            q, axis_name=axis_name, window=window, scale=scale, softcap=None, strategy=way,
            implementation=implementation, deterministic=deterministic, grad_dtype=grad_dtype, layout="zigzag",
            expand=make if form == "latent" else None,
        )  # fmt: skip
        lo, hi = attention_bounds(plan, extras.get("positions"), window)
        if form == "latent":
            out, _ = cast(tuple[jax.Array, jax.Array], ring(plan, kv_b, q, (latent, k_pe), lo, hi))
        else:
            made = expand(make, kv_b, (latent, k_pe))
            out, _ = cast(tuple[jax.Array, jax.Array], ring(plan, None, q, made, lo, hi))
        return out

    in_specs = (
        spec,
        PartitionSpec(*rows, None),
        PartitionSpec(*rows, None),
        PartitionSpec(),
        dict.fromkeys(extras, rows),
    )
    run = jax.shard_map(attend, mesh=mesh, in_specs=in_specs, out_specs=spec, check_vma=False)
    return run(q, latent, k_pe, kv_b, extras)


def _check(q, latent, k_pe, kv_b, mesh, spec, axis_name) -> None:
    if axis_name not in mesh.axis_names:
        raise ValueError(f"axis_name must be an axis of the mesh {list(mesh.axis_names)}, got {axis_name!r}")
    if q.ndim != 4 or len(spec) != 4 or spec[2] is not None or spec[3] is not None:
        raise ValueError(f"q must be [B, S, H, D] with spec (batch, {axis_name}, None, None), got {q.shape} and {spec}")
    for name, x in (("latent", latent), ("k_pe", k_pe)):
        if x.shape[:2] != q.shape[:2] or x.ndim != 3 or x.dtype != q.dtype:
            raise ValueError(f"{name} must be [B, S, n] like q {q.shape[:2]} {q.dtype}, got {x.shape} {x.dtype}")
    if kv_b.ndim != 3 or kv_b.shape[:2] != (latent.shape[2], q.shape[2]):
        raise ValueError(f"kv_b must be [R, H, N + E] with R = {latent.shape[2]}, H = {q.shape[2]}, got {kv_b.shape}")
    if not 0 < q.shape[3] - k_pe.shape[2] < kv_b.shape[2]:
        raise ValueError(f"D - P must lie in 1..{kv_b.shape[2] - 1}, got D = {q.shape[3]}, P = {k_pe.shape[2]}")
    parts = CHUNKS["zigzag"] * mesh.shape[axis_name]
    if q.shape[1] % parts:
        raise ValueError(f"sequence length must be divisible by {parts} (2 * cp), got {q.shape[1]}: pad it")


__all__ = ["Latent", "Payload", "expand", "latent_attention"]
