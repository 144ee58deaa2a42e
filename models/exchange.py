"""Expert parallelism: the experts lie on different devices, and the tokens travel to them and back.

The E experts are cut over a *group* of n devices, those along whole mesh axes (cp, fsdp or both); device i owns the
E / n experts from i * E / n on. A device sorts its N = tokens * k (token, choice) pairs by expert, and so by owner:

    sorted pairs    | e0 e0 e1 e1 e1 | e2 e3 e3 | e4 ...          what device 0, 1, 2, ... owns: one range each

**Rounds.** How many rows go where is known when the routers have spoken, and XLA's buffers are as large as they were
compiled. So the ranges travel in blocks of C rows. In round r every device sends rows r C .. r C + C - 1 of each
range to its owner (`all_to_all` of [n, C, d]), the owner puts what it got through its experts, and the results travel
back the same way into the places they came from:

                      sent to device 0     arrives at device 0, in runs               back at the sender
    device 0, round 0   e0 e0 e1 e1        from 0   e0 e0 e1 e1                       y += result
              round 1   e1  -  -  -        from 1   e0 e1 e1  -       -> experts ->
                                           from 2   e1  -  -  -

A run is sorted by expert because its sender's pairs were: the grouped matmul takes the runs as they lie (contract.py),
and nothing is sorted, packed or counted a second time. There are as many rounds as the largest range needs anywhere,
a number that all devices compute from the same counts, so that a collective inside the `while` loop is safe:

    routing                                 rounds                       rows in a device's buffer
    level, up to SLACK of an even share     1                            n C = SLACK * N, in every round
    all tokens of all devices to one owner  n / SLACK (rounded up)       the same

Nothing is dropped and nothing has a capacity that a token could fall out of; routing that is not level costs time,
never memory. What a device sends for a layer, of b bytes a value, all rounds together R:

    forward     R (n - 1) C * (2 d b + 4)       rows and weights there, results back
    backward    R (n - 1) C * (3 d b + 8)       rows, cotangents and weights there, gradients of rows and weights back

Not chosen: gathering the tokens on every device of the group, each adding up the parts of its own experts. It moves
(n - 1) d b a token and way, against SLACK k (n - 1) / n d b here: less where n < SLACK k, more beyond, and it needs
room for n tokens * min(k, E / n) rows, which its rounds would have to select from all tokens again and again.

The backward is written by hand, for a loop with an unknown number of trips has no automatic one and would have to keep
every round: it sends the rows again, beside the cotangents, and computes the experts' inner values again. So
`jax.checkpoint` adds nothing to it: the results of the forward are not needed, and its exchange is not run a second
time. Whatever is a sum over tokens is float32 from the first addition to the optimiser, over rounds, runs and devices:
the gradients of the experts' matrices (which with ep = 1 are rounded once a device), of the tokens, of the weights.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from zigzag_jax.kernels import GROUPED, grouped_implementation
from zigzag_jax.kernels.grouped.swiglu import swiglu, swiglu_grad
from zigzag_jax.models.sharding import gather, scatter

SLACK = 1.25
"""Rows that a round has room for, as a multiple of an even share: a router that is kept level stays in one round."""

_ALIGN = 64  # rows of a block, so that runs begin where the kernels' tiles do


def block_rows(pairs: int, devices: int) -> int:
    """C: rows that a device with so many (token, choice) pairs sends to each device of the group in a round.

    >>> block_rows(65536, 8), block_rows(100, 2)
    (10240, 64)
    """
    return min(pairs, -(-math.ceil(SLACK * pairs / devices) // _ALIGN) * _ALIGN)


class Sent(NamedTuple):
    """Bytes that a device sends to the others of its group in one layer."""

    forward: int
    backward: int


def sent_bytes(pairs: int, size: int, devices: int, itemsize: int, rounds: int = 1) -> Sent:
    """What this file's docstring says, for `pairs` (token, choice) pairs a device of rows [size].

    MiB of Qwen3-30B-A3B with 8192 tokens a device in bfloat16, ep = 8; its experts' matrices are 1152:
    >>> [round(x / 2**20) for x in sent_bytes(8192 * 8, 2048, 8, 2)]
    [560, 841]
    """
    travelling = rounds * (devices - 1) * block_rows(pairs, devices)
    return Sent(travelling * (2 * size * itemsize + 4), travelling * (3 * size * itemsize + 8))


@dataclasses.dataclass(frozen=True)
class Exchange:
    """How the rows of a layer travel; static."""

    axes: tuple[str, ...]
    """Mesh axes that the experts are cut over."""

    everywhere: tuple[str, ...]
    """All mesh axes: every device goes through the same number of rounds."""

    devices: int
    """n: devices of a group."""

    rows: int
    """C: rows that a device sends to each other in a round."""

    implementation: str | None
    """Of the grouped matmul."""


class Experts(NamedTuple):
    """The experts' matrices: pieces of all, or this device's own, whole."""

    gate: Any
    """[E / n, d, f]."""

    up: Any
    """[E / n, d, f]."""

    down: Any
    """[E / n, f, d]."""


class _Own(NamedTuple):
    """A device's own matrices, whole, in the dtype of the arithmetic (or their gradients, in float32)."""

    gate_up: jax.Array
    """[E / n, d, 2 f]: side by side, one matmul."""

    down: jax.Array
    """[E / n, f, d]."""


class _Routing(NamedTuple):
    """Where a device's pairs go; int32."""

    pair: jax.Array
    """[N]: the pairs sorted by expert, as token * k + choice."""

    owner: jax.Array
    """[T, k]: the device that owns a pair's expert."""

    place: jax.Array
    """[T, k]: where a pair lies in the range of its owner."""

    begin: jax.Array
    """[n]: where the range of each owner begins."""

    arriving: jax.Array
    """[n, E / n]: rows that come from each device for each expert of this one."""

    rounds: jax.Array
    """How many rounds there are; the same on all devices."""


def exchanged_experts(
    plan: Exchange, specs: Experts, x: jax.Array, experts: jax.Array, weights: jax.Array, sizes: jax.Array,
    matrices: Experts,
) -> jax.Array:  # fmt: skip
    """Tokens x [T, d] through their experts [T, k] on other devices, added by weights [T, k]: [T, d]. In a shard_map.

    sizes int32 [E]: how many of this device's pairs chose each expert. `matrices` are this device's float32 pieces, cut
    as `specs` say: the experts over plan.axes; what is cut over other axes is gathered here.
    """
    routing = _route(plan, experts, sizes)
    rest = Experts(*(P(None, *spec[1:]) for spec in specs))
    return _exchanged(plan, rest, routing, x, weights.astype(jnp.float32), matrices)


def sort_pairs(experts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Pairs (token, choice) of experts [T, k] sorted by expert, as token * k + choice, and the inverse: int32 [N]."""
    pair = jnp.argsort(experts.reshape(-1), stable=True).astype(jnp.int32)
    return pair, jnp.zeros_like(pair).at[pair].set(jnp.arange(pair.size, dtype=jnp.int32), unique_indices=True)


def _route(plan: Exchange, experts: jax.Array, sizes: jax.Array) -> _Routing:
    choice, own = experts.reshape(-1), sizes.size // plan.devices
    pair, inverse = sort_pairs(experts)
    sizes = lax.all_gather(sizes, plan.axes).reshape(plan.devices, plan.devices, own)  # from, to, expert
    me, ranges = lax.axis_index(plan.axes), jnp.sum(sizes, axis=2, dtype=jnp.int32)
    begin = jnp.cumsum(ranges[me]) - ranges[me]
    owner = choice // own
    place = (inverse - begin[owner]).reshape(experts.shape)
    rounds = lax.pmax(-(-jnp.max(ranges) // plan.rows), plan.everywhere)
    return _Routing(pair, owner.reshape(experts.shape), place, begin, sizes[:, me], rounds)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _exchanged(plan: Exchange, specs: Experts, routing: _Routing, x, weights, matrices: Experts) -> jax.Array:
    own = _gathered(specs, matrices, x.dtype)

    def one(r, y):
        sizes, there = _arriving(plan, routing, r), (x, weights.reshape(-1, 1))
        rows, scale = (_travel(plan, _block(plan, routing, r, part)) for part in there)
        inner = swiglu(_product(plan, rows, own.gate_up, sizes), scale[:, 0])
        back = _travel(plan, _product(plan, inner, own.down, sizes))
        return y + jnp.sum(_returned(plan, routing, r, back), axis=1)

    return lax.fori_loop(0, routing.rounds, one, jnp.zeros(x.shape, jnp.float32)).astype(x.dtype)


def _exchanged_fwd(plan, specs, routing, x, weights, matrices):
    return _exchanged(plan, specs, routing, x, weights, matrices), (routing, x, weights, matrices)


def _exchanged_bwd(plan, specs, residuals, dy):
    routing, x, weights, matrices = residuals
    own = _gathered(specs, matrices, x.dtype)

    def one(r, sums):
        sizes, there = _arriving(plan, routing, r), (x, dy, weights.reshape(-1, 1))
        rows, cotangents, scale = (_travel(plan, _block(plan, routing, r, part)) for part in there)
        *back, parts = _through_bwd(plan, own, sizes, rows, cotangents, scale)
        drows, dscale = (_returned(plan, routing, r, _travel(plan, part)) for part in back)
        return jax.tree.map(jnp.add, sums, (jnp.sum(drows, axis=1), dscale[:, :, 0], parts))

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), (x, weights, own))
    dx, dweights, dmatrices = lax.fori_loop(0, routing.rounds, one, zeros)
    whole = *jnp.split(dmatrices.gate_up, 2, axis=-1), dmatrices.down
    dmatrices = Experts(*(scatter(dw, spec) for dw, spec in zip(whole, specs, strict=True)))
    return None, dx.astype(x.dtype), dweights, dmatrices


_exchanged.defvjp(_exchanged_fwd, _exchanged_bwd)


def _gathered(specs: Experts, matrices: Experts, dtype) -> _Own:
    return _Own(gather_gate_up(specs, matrices, dtype), gather(matrices.down, specs.down, dtype))


def gather_gate_up(specs: Experts, matrices: Experts, dtype) -> jax.Array:
    """Pieces of gate and up -> both whole, side by side [.., d, 2 f], in `dtype`: one collective and no copy."""
    if len(specs.gate) > 2 and specs.gate[2] is not None:  # pieces would come out in the order gate, up, gate, up
        raise ValueError(f"the mlp axis of the experts' matrices must not be cut, got {specs.gate}")
    return gather(jnp.concatenate([matrices.gate, matrices.up], axis=-1), specs.gate, dtype)


def _block(plan: Exchange, routing: _Routing, r, x: jax.Array) -> jax.Array:
    """What is sent in round r, [n C, d]: rows of tokens [T, d] or of pairs [N, d]; past a range's end, anything."""
    at = routing.begin[:, None] + r * plan.rows + jnp.arange(plan.rows)[None]
    pair = routing.pair[jnp.minimum(at.reshape(-1), routing.pair.size - 1)]
    return x[pair // (routing.pair.size // x.shape[0])]


def _arriving(plan: Exchange, routing: _Routing, r) -> jax.Array:
    """The group sizes of the runs that arrive in round r, [n, E / n]."""
    end = jnp.cumsum(routing.arriving, axis=1)
    inside = lambda row: jnp.clip(row - r * plan.rows, 0, plan.rows)
    return inside(end) - inside(end - routing.arriving)


def _travel(plan: Exchange, rows: jax.Array) -> jax.Array:
    """[n C, d]: block i to device i, and the block that came from device i at its place. Its own transpose."""
    return lax.all_to_all(rows, plan.axes, split_axis=0, concat_axis=0, tiled=True)


def _returned(plan: Exchange, routing: _Routing, r, back: jax.Array) -> jax.Array:
    """Of the blocks that came back in round r each pair's row, float32 [T, k, d]; zero for pairs of other rounds."""
    inside = routing.place - r * plan.rows
    here = (inside >= 0) & (inside < plan.rows)
    row = back[jnp.where(here, routing.owner * plan.rows + inside, 0)]
    return jnp.where(here[:, :, None], row, 0).astype(jnp.float32)


def _through_bwd(plan: Exchange, own: _Own, sizes, rows, cotangents, scale):
    """The experts' transpose: gradients of the rows, of their weights `scale` [n C, 1] and of the matrices.

    `cotangents` are those of the tokens: of a result times its weight.
    """
    hidden, scale = _product(plan, rows, own.gate_up, sizes), scale[:, 0]
    z = _product(plan, cotangents, own.down, sizes, transposed=True)
    dhidden, dscale = swiglu_grad(z, hidden, scale)
    drows = _product(plan, dhidden, own.gate_up, sizes, transposed=True)
    pairs = _Own((rows, dhidden), (swiglu(hidden, scale), cotangents))
    return drows, dscale[:, None], _Own(*(_outer(plan, *both, w, sizes) for both, w in zip(pairs, own, strict=True)))


def _product(plan: Exchange, rows, matrices, sizes, transposed: bool = False) -> jax.Array:
    kernel = GROUPED[grouped_implementation(rows, matrices, plan.implementation)]
    return kernel.product(rows, matrices, sizes, transposed=transposed, out_dtype=rows.dtype)


def _outer(plan: Exchange, left, right, matrices, sizes) -> jax.Array:
    kernel = GROUPED[grouped_implementation(left, matrices, plan.implementation)]
    return kernel.outer(left, right, sizes, out_dtype=jnp.float32)
