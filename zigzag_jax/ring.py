"""The ring: every rank's queries meet every rank's keys while the keys travel. The only file that permutes.

A rank keeps its queries and sends its *payload* (k and v, or what they are made of) on to the next rank; at step s rank
r holds the payload of rank (r - s) % cp. What a step's rows see of it is data (ranges.py), so all steps run one kernel,
and the online softmax is carried from step to step inside it:

    forward    step  0     1     2     3            backward   step  1     2     3     0
               kernel ===== ===== ===== =====                  kernel ===== ===== ===== =====
               payload ---> ----> ---->                        payload ---> ---->
                                                               dk, dv       ----> ----> ---->  home

The backward recomputes with the global lse; its gradient of k and v travels behind the payload, float32, each rank
adding its share. The diagonal step comes last, so that the gradient's hop home has a kernel above it too: cp - 1 hops
forward, cp - 1 payload and cp - 1 gradient hops backward. A static window leaves steps that no rank needs: they are
skipped, the payload taking the gap in one permute.

The one hard thing is to have XLA run the hops *under* the kernels:

- each permute carries `_xla_gpu_collective_stream="p2p"`, a scheduler resource of its own that lets four fly at a time,
  beside an ordinary one for small arrays. It is a hint that XLA may drop one day: a test of the compiled schedule
  guards it;
- the next hop is posted before this step's kernel, and each hop ends in an `optimization_barrier` right behind the
  kernel;
- the loop runs two hops an iteration (one would copy the payload), and straight-line code takes the place of a loop
  with a single trip, which XLA would inline, losing the barriers' isolation;
- the first payload hop of the backward is posted before delta and so rides under the matmul that makes dout.

`strategy="allgather"` brings all keys to every rank instead: better balanced where documents make the ring's lock step
wait, for cp times the memory.
"""

import functools
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.xla_metadata import set_xla_metadata

from zigzag_jax.hops import Hop, backward_hops, forward_hops
from zigzag_jax.kernels import SplitKeys, flash_bwd, flash_fwd
from zigzag_jax.layout import Layout, zigzag_chunks
from zigzag_jax.ranges import KeyRange, key_range

Strategy = Literal["ring", "allgather"]
STRATEGIES: tuple[Strategy, ...] = ("ring", "allgather")
OUT_NAME, LSE_NAME = "attn_out", "attn_lse"  # for jax.checkpoint_policies.save_only_these_names


class Expand(Protocol):
    """How k and v are made of the payload that travels, and how gradients go back. A frozen dataclass without arrays.

    Arithmetic and gradients are float32: a generic jax.vjp would round the travelling gradient to k's dtype at every
    hop.
    """

    def fwd(self, params, payload) -> tuple[jax.Array | SplitKeys, jax.Array]:
        """K [B, S, K, D], an array or SplitKeys, and v [B, S, K, E] of one rank's payload."""
        ...

    def bwd(self, params, payload, dk, dv) -> tuple[Any, Any]:
        """(dparams, dpayload), float32, of float32 dk, in k's form, and dv; dparams is None where there are none."""
        ...


@dataclass(frozen=True)
class Identity:
    """The payload is (k, v)."""

    def fwd(self, params, payload):
        """See Expand."""
        del params
        return payload

    def bwd(self, params, payload, dk, dv):
        """See Expand."""
        del params, payload
        return None, (dk, dv)


@dataclass(frozen=True)
class Plan:
    """All that is static in one attention call."""

    cp: int
    """Ranks on the ring."""
    axis_name: str
    """Mesh axis that the ring runs over."""
    length: int
    """Tokens that a rank holds."""
    live: tuple[int, ...]
    """Steps at which any rank sees any key, ascending; the first is 0 (ranges.live_steps)."""
    scale: float
    """Factor of q.k."""
    softcap: float | None = None
    """Cap of the scores, or None."""
    layout: Layout = "zigzag"
    """Which tokens a rank holds."""
    strategy: Strategy = "ring"
    """How queries and keys meet."""
    expand: Expand = Identity()
    """What k and v are made of."""
    implementation: str | None = None
    """Kernel implementation."""
    deterministic: bool = False
    """Gradient sums in a fixed order."""
    grad_dtype: Any = jnp.float32
    """Dtype in which the gradient of the payload travels."""

    def source(self, step):
        """Rank whose payload is here at `step`; at cp = 1 no mesh axis is needed."""
        return 0 if self.cp == 1 else (lax.axis_index(self.axis_name) - step) % self.cp

    def keys(self, lo, hi, step) -> KeyRange:
        """What each row sees of the payload that is here at `step`."""
        return key_range(lo, hi, self.source(step), self.cp, self.length, self.layout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring(plan: Plan, params, q, payload, lo, hi, sink=None) -> tuple[jax.Array, jax.Array]:
    """Attention of this rank's queries over all ranks' keys; runs inside a fully manual shard_map(check_vma=False).

    params: float32 pytree of plan.expand's weights, the same on every rank, or None. q: [B, length, H, D]. payload:
    pytree that plan.expand makes k and v of. lo int32 [B or 1, length] and hi int32 [1, length]: global bounds of the
    keys a row sees (ranges.visible_bounds). sink: float32 [H] logits or None.

    Returns out [B, length, H, E] in q's dtype and lse float32 [B, H, length], natural log. The gradient of params and
    sink is this rank's share: sum it over the mesh (the transpose of shard_map does for an in_spec of P()).
    """
    return _ring_fwd(plan, params, q, payload, lo, hi, sink)[0]


def _ring_fwd(plan: Plan, params, q, payload, lo, hi, sink):
    forward = _gathered_forward if plan.strategy == "allgather" else _ring_forward
    # The barrier keeps XLA from running the last kernel twice, or from fusing its in-place result into a stack of
    # residuals.
    out, lse = lax.optimization_barrier(forward(plan, params, q, payload, lo, hi, sink))
    # kept flat: of a stack [layers, B, length, H, E] XLA would move the heads outwards and back, a copy each
    flat, lse = checkpoint_name(out.reshape(*out.shape[:2], -1), OUT_NAME), checkpoint_name(lse, LSE_NAME)
    return (flat.reshape(out.shape), lse), (params, q, payload, lo, hi, sink, flat, lse)


def _ring_bwd(plan: Plan, residuals, cotangents):
    params, q, payload, lo, hi, sink, flat, lse = residuals
    dout, dlse = cotangents
    out = flat.reshape(dout.shape)
    backward = _gathered_backward if plan.strategy == "allgather" else _ring_backward
    dq, dparams, dpayload, delta = backward(plan, params, q, payload, lo, hi, out, lse, dout, dlse)
    if sink is not None:
        share = jnp.exp(sink.astype(jnp.float32)[None, :, None] - lse)  # the sink's probability; its "value" is 0
        sink = -jnp.sum(share * delta, axis=(0, 2)).astype(sink.dtype)
    narrow = functools.partial(jax.tree.map, lambda g, x: g.astype(x.dtype))
    dparams = None if params is None else narrow(dparams, params)
    return dparams, dq.astype(q.dtype), narrow(dpayload, payload), None, None, sink


ring.defvjp(_ring_fwd, _ring_bwd)


def _first_carry(q, v, sink):
    """The state before any key: None, or the sink's logit with a value of zero."""
    if sink is None:
        return None
    batch, rows, heads, _ = q.shape
    lse = jnp.broadcast_to(sink.astype(jnp.float32)[None, :, None], (batch, heads, rows))
    return jnp.zeros((batch, rows, heads, v.shape[3]), jnp.float32), lse


def _delta(out, dout, dlse):
    """rowsum(dout * out) - dlse, float32 [B, H, S]."""
    return jnp.einsum("bshe,bshe->bhs", dout.astype(jnp.float32), out.astype(jnp.float32)) - dlse


# ------------------------------------------------------------------------------------------------------------ rotation
def _rotate(plan: Plan, tree, by: int):
    """Every array of `tree` sent `by` ranks on: the two largest as p2p, for two such trees may fly at once, and any
    smaller ones as an ordinary collective, which XLA merges with the other tree's and flies beside the four.
    """
    leaves, structure = jax.tree.flatten(tree)
    partners = [(rank, (rank + by) % plan.cp) for rank in range(plan.cp)]
    largest = sorted(range(len(leaves)), key=lambda n: -leaves[n].nbytes)[:2]
    p2p = lambda n: set_xla_metadata(_xla_gpu_collective_stream="p2p") if n in largest else nullcontext()

    def send(n):
        with p2p(n):
            return lax.ppermute(leaves[n], plan.axis_name, partners)

    return structure.unflatten(map(send, range(len(leaves))))


def _run(hop: Callable, hops: Iterable[Hop], x):
    """Run x = hop(h, x) for each of `hops`; stretches of equal hops become a loop, two hops an iteration."""
    hops, at = list(hops), 0
    while at < len(hops):
        first, end = hops[at], at + 1
        while end < len(hops) and hops[end] == first._replace(step=first.step + end - at):
            end += 1
        x = _run_equal(hop, first, end - at, x)
        at = end
    return x


def _run_equal(hop: Callable, first: Hop, count: int, x):
    """`count` hops that differ in their consecutive steps only."""
    at = lambda n: first._replace(step=first.step + n)
    if count % 2:
        x, first, count = hop(first, x), at(1), count - 1
    if count <= 2:  # a loop with one trip would be inlined
        for n in range(count):
            x = hop(at(n), x)
        return x
    return lax.fori_loop(0, count // 2, lambda i, x: hop(at(2 * i + 1), hop(at(2 * i), x)), x)


# ------------------------------------------------------------------------------------------------------------ the ring
def _ring_forward(plan: Plan, params, q, payload, lo, hi, sink):
    def attend(step, carry, payload, out_dtype=jnp.float32):
        k, v = plan.expand.fwd(params, payload)
        carry = _first_carry(q, v, sink) if carry is None else carry
        return flash_fwd(
            q, k, v, plan.keys(lo, hi, step), scale=plan.scale, carry=carry, softcap=plan.softcap, out_dtype=out_dtype,
            implementation=plan.implementation,
        )  # fmt: skip

    def hop(h: Hop, x):
        carry, payload = x
        following = _rotate(plan, payload, h.by)
        return lax.optimization_barrier((attend(h.step, carry, payload), following))

    *hops, last = forward_hops(plan.live)
    x = (None, payload)
    if hops:
        x = _run(hop, hops[1:], hop(hops[0], x))  # the first starts the carry
    return attend(last.step, *x, out_dtype=q.dtype)


def _ring_backward(plan: Plan, params, q, payload, lo, hi, out, lse, dout, dlse):
    hops = backward_hops(plan.live, plan.cp)
    moved = payload
    if len(plan.live) > 1:
        # Not before the forward's end: XLA would take its first hop for this one and keep what came all the while.
        first, _ = lax.optimization_barrier((payload, lse))
        moved, dout = lax.optimization_barrier((_rotate(plan, first, plan.live[1]), dout))
    delta = _delta(out, dout, dlse)
    dout = dout.astype(q.dtype)

    def hop(h: Hop, x):
        dq, dparams, traveller, payload = x
        following = _rotate(plan, payload, h.by) if h.by else None
        arrived = _rotate(plan, _narrow(plan, traveller), h.came) if h.came else None
        k, v = plan.expand.fwd(params, payload)
        grads = flash_bwd(
            q, k, v, lse, delta, dout, plan.keys(lo, hi, h.step), scale=plan.scale, dq=dq, softcap=plan.softcap,
            deterministic=plan.deterministic, implementation=plan.implementation,
        )  # fmt: skip
        # hops end here: before expand's backward and before the sum, so that their wait is for a kernel and not for
        # small matmuls
        (dq, dk, dv), following, arrived = lax.optimization_barrier((grads, following, arrived))
        share, traveller = plan.expand.bwd(params, payload, _like(k, dk), dv)
        if arrived is not None:
            traveller = jax.tree.map(lambda own, others: own + others.astype(jnp.float32), traveller, arrived)
        dparams = share if dparams is None else jax.tree.map(jnp.add, dparams, share)
        return dq, dparams, traveller, following

    *others, diagonal = hops
    x = (None, None, None, moved)
    if others:
        x = _run(hop, others[1:], hop(others[0], x))  # the first starts dq and the traveller
    dq, dparams, traveller, _ = x
    dq, dparams, home, _ = hop(diagonal, (dq, dparams, traveller, payload))
    return dq, dparams, home, delta


def _like(k, dk):
    """The gradient of the whole keys in k's form."""
    return k.split(dk) if isinstance(k, SplitKeys) else dk


def _narrow(plan: Plan, tree):
    return jax.tree.map(lambda x: x.astype(plan.grad_dtype), tree)


# ---------------------------------------------------------------------------------------------------------- all-gather
def _to_natural(plan: Plan, x, inverse: bool = False):
    """Gathered shards [B, cp * length, ...] from layout order into natural order, or back."""
    if plan.layout == "contiguous":
        return x
    order = np.argsort(zigzag_chunks(plan.cp))
    chunks = x.reshape(x.shape[0], len(order), -1, *x.shape[2:])
    return chunks[:, np.argsort(order) if inverse else order].reshape(x.shape)


def _gather(plan: Plan, payload):
    def gather(x):
        full = lax.all_gather(x, plan.axis_name, axis=1, tiled=True) if plan.cp > 1 else x
        return _to_natural(plan, full)

    return jax.tree.map(gather, payload)


def _scatter(plan: Plan, grads):
    def scatter(x):
        x = _to_natural(plan, x.astype(plan.grad_dtype), inverse=True)
        return lax.psum_scatter(x, plan.axis_name, scatter_dimension=1, tiled=True) if plan.cp > 1 else x

    return jax.tree.map(scatter, grads)


def _natural_keys(lo, hi) -> KeyRange:
    """In natural order the visible keys are the global bounds themselves."""
    return KeyRange(lo, jnp.broadcast_to(hi, lo.shape))


def _gathered_forward(plan: Plan, params, q, payload, lo, hi, sink):
    k, v = plan.expand.fwd(params, _gather(plan, payload))
    return flash_fwd(
        q, k, v, _natural_keys(lo, hi), scale=plan.scale, carry=_first_carry(q, v, sink), softcap=plan.softcap,
        out_dtype=q.dtype, implementation=plan.implementation,
    )  # fmt: skip


def _gathered_backward(plan: Plan, params, q, payload, lo, hi, out, lse, dout, dlse):
    full = _gather(plan, payload)  # again: the forward keeps the local part only
    delta = _delta(out, dout, dlse)
    k, v = plan.expand.fwd(params, full)
    dq, dk, dv = flash_bwd(
        q, k, v, lse, delta, dout.astype(q.dtype), _natural_keys(lo, hi), scale=plan.scale, softcap=plan.softcap,
        deterministic=plan.deterministic, implementation=plan.implementation,
    )  # fmt: skip
    dparams, dfull = plan.expand.bwd(params, full, _like(k, dk), dv)
    return dq, dparams, _scatter(plan, dfull), delta


__all__ = ["LSE_NAME", "OUT_NAME", "STRATEGIES", "Expand", "Identity", "Plan", "Strategy", "ring"]
