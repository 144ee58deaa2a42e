"""A rank's whole ring on one GPU: every step with its carry, but the communication; what bench_attention.py times.

All strategies see one sequence of keys and values, cut into shards as each lays them out, so that one float32 result
checks them all. Under a window only the live steps are run, as in ring.py.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from bench import verdict
from bench_calls import backward, forward, refusal, ring_backward, ring_forward, usable
from bench_inputs import BARS, Heads, Inputs, Mask, flops, masks, pairs, relative, step_range, truth
from clock import Clock

from zigzag_jax import to_zigzag
from zigzag_jax.layout import Layout, global_positions
from zigzag_jax.ranges import KeyRange, live_steps, visible_bounds
from zigzag_jax.work import pairs as pairs_of_ranks


class Strategy(NamedTuple):
    """How keys lie and how they reach a rank."""

    layout: Layout
    gathers: bool
    """All before the first step, in the place of a shard a step."""


STRATEGIES = {
    "zigzag ring": Strategy("zigzag", False),
    "naive ring": Strategy("contiguous", False),
    "zigzag all-gather": Strategy("zigzag", True),
}


class Case(NamedTuple):
    """One rank's part of a ring."""

    strategy: str
    rank: int
    mask: Mask = Mask()


class Rings(NamedTuple):
    """A model's heads on a ring of cp ranks."""

    heads: Heads
    x: Inputs
    names: list[str]
    """Implementations."""
    cp: int
    clock: Clock

    @property
    def length(self) -> int:
        """Tokens of a rank."""
        return self.x.q.shape[1]

    def bounds(self, case: Case) -> tuple[KeyRange, jax.Array, jax.Array | None]:
        """Global range of keys that the rank's rows see, int32 [1, S]; their global positions [S], and in documents."""
        g = global_positions(case.rank, self.cp, self.length, STRATEGIES[case.strategy].layout)
        positions = None if case.mask.positions is None else jnp.asarray(case.mask.positions)[:, g]
        return KeyRange(*jnp.broadcast_arrays(*visible_bounds(g, positions, case.mask.window))), g, positions

    def sources(self, case: Case) -> list[int]:
        """The ranks whose keys it meets, a live step each."""
        steps = live_steps(self.cp, self.length, case.mask.window, STRATEGIES[case.strategy].layout)
        return [(case.rank - step) % self.cp for step in steps]

    def keys(self, case: Case) -> KeyRange:
        """Local ranges of each step, int32 [steps, 1, S]; of the gathered keys, int32 [1, S]."""
        visible, _, positions = self.bounds(case)
        layout, gathers = STRATEGIES[case.strategy]
        if gathers:
            return visible
        steps = [
            step_range(case.rank, source, self.cp, self.length, layout, positions, case.mask.window)
            for source in self.sources(case)
        ]
        return KeyRange(*(jnp.stack(x) for x in zip(*steps, strict=True)))

    def whole(self) -> tuple[jax.Array, jax.Array]:
        """The sequence's k and v, natural order, [1, cp S, K, .]: the drawn numbers cp times, each time rolled on."""
        again = lambda y: jnp.concatenate([jnp.roll(y, 37 * at, 1) for at in range(self.cp)], axis=1)
        return again(self.x.k), again(self.x.v)

    def calls(self, case: Case, name: str) -> dict[str, Callable]:
        """{fwd, bwd}: all steps of one rank by implementation `name`."""
        layout, gathers = STRATEGIES[case.strategy]
        keys, ahead, back, kv = self.keys(case), forward, backward, self.whole()
        if not gathers:
            ahead, back = ring_forward, ring_backward
            kv = to_zigzag(kv, self.cp) if layout == "zigzag" else kv
            kv = [y.reshape(self.cp, 1, self.length, *y.shape[2:])[np.array(self.sources(case))] for y in kv]
        static = {"scale": self.x.scale, "name": name}
        run = functools.partial(ahead, self.x.q, *kv, keys, **static)
        return {"fwd": run, "bwd": functools.partial(back, self.x.q, *kv, *run(), self.x.dout, keys, **static)}

    def check(self, cases: dict[str, Case]) -> list[dict]:
        """Each implementation on whole rings, one kv head and its query heads, against float32.

        A ring's gradient of k and v is here the sum over the ranks it came from, as no rank adds its own.
        """
        at, rows = self.heads.kv_heads // 2, []
        group = self.heads.heads // self.heads.kv_heads
        mine = slice(at * group, (at + 1) * group)
        k, v = (y[0, :, at] for y in self.whole())
        for title, case in cases.items():
            layout, gathers = STRATEGIES[case.strategy]
            out, lse, dq, *dkv = truth(
                self.x.q[0, :, mine], k, v, self.x.dout[0, :, mine], self.bounds(case)[0], self.x.scale
            )
            if not gathers:
                dkv = to_zigzag(tuple(dkv), self.cp, axis=0) if layout == "zigzag" else dkv
                dkv = [y.reshape(self.cp, self.length, -1).sum(0) for y in dkv]
            for name in self.names:
                with refusal(name, title):
                    calls = self.calls(case, name)
                    (got_out, got_lse), grads = calls["fwd"](), calls["bwd"]()
                    got_dq, *got = grads if gathers else (grads[0], *grads[1])
                    got = got_out[0, :, mine], got_lse[0, mine].T, got_dq[0, :, mine], *(y[0, :, at] for y in got)
                    found = {key: relative(a, b) for key, a, b in zip(BARS, got, (out, lse, dq, *dkv), strict=True)}
                    figures = {key: f"{error:.1e}" for key, error in found.items()}
                    rows.append({"ring": title, "by": name, **figures, "verdict": verdict(found, BARS)})
        return rows

    def timed(self, cases: dict, name: str) -> dict:
        """Milliseconds {case: {fwd, bwd}}, in turn; {} where `name` cannot."""
        build = lambda: {(key, which): f for key, case in cases.items() for which, f in self.calls(case, name).items()}
        ms = self.clock.in_turn(usable(name, build))
        if len(ms) < 2 * len(cases):
            return {}
        return {key: {which: ms[key, which] for which in ("fwd", "bwd")} for key in cases}

    def flops(self, case: Case) -> dict[str, int]:
        """Of a rank's forward and backward."""
        count = pairs(self.keys(case))
        return {which: flops(self.heads, count, which) for which in ("fwd", "bwd")}

    def pairs(self, mask: Mask, layout: Layout = "zigzag") -> np.ndarray:
        """Pairs that are seen, [live step, rank]."""
        return pairs_of_ranks(self.cp, self.length, layout=layout, positions=mask.positions, window=mask.window)

    def slowest(self) -> dict[str, Case]:
        """The zigzag ring of the rank with most pairs, for each mask."""
        found = masks(self.cp * self.length)
        return {title: Case("zigzag ring", int(self.pairs(m).sum(0).argmax()), m) for title, m in found.items()}
