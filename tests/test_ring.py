"""The ring against float64, and what it sends.

A program is compiled once for each (cp, heads, strategy, layout, static window); masks, windows and sinks are its data.
"""

import functools
import math
import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import hops
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from oracle import Heads

import zigzag_jax.ring
from zigzag_jax import from_zigzag, ring_attention, to_zigzag
from zigzag_jax.layout import global_positions
from zigzag_jax.ranges import live_steps, visible_bounds
from zigzag_jax.ring import LSE_NAME, OUT_NAME, Plan, ring

EXAMPLES = Path(__file__).parent.parent / "examples"
SEQUENCE = P(None, "cp")
GQA = Heads(4, 2, 8, 16)
QUICK = {"xla_backend_optimization_level": 0}  # a third off the compile time, which is nearly all of the time here


@dataclass(frozen=True)
class Case:
    """What one compiled program depends on."""

    cp: int
    heads: Heads = GQA
    strategy: zigzag_jax.ring.Strategy = "ring"
    layout: zigzag_jax.ring.Layout = "zigzag"
    window: int | None = None
    """A static window; None lets the window be data."""
    batch: int = 2
    chunk: int = 4

    @property
    def length(self) -> int:
        """Tokens in the sequence."""
        return 2 * self.cp * self.chunk

    def __str__(self) -> str:
        rest = [self.strategy] * (self.strategy != "ring") + [self.layout] * (self.layout != "zigzag")
        return "-".join([f"cp{self.cp}", str(self.heads), *rest, *([f"W{self.window}"] if self.window else [])])

    def to(self, x, axis: int = 1):
        """Natural order into that of the case's layout."""
        return to_zigzag(x, self.cp, axis) if self.layout == "zigzag" else x

    def back(self, x, axis: int = 1):
        """The inverse of `to`."""
        return from_zigzag(x, self.cp, axis) if self.layout == "zigzag" else x


def cp_mesh(cp: int):
    return jax.make_mesh((cp,), ("cp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:cp])


def attend(case: Case, **options):
    """(q, k, v, sink, positions, window) -> (out, lse) on global arrays in the layout's order."""

    def local(q, k, v, sink, positions, window):
        return ring_attention(
            q, k, v, positions=positions, window=window if case.window is None else case.window, sink=sink,
            strategy=case.strategy, layout=case.layout, return_lse=True, **options,
        )  # fmt: skip

    specs = (SEQUENCE, SEQUENCE, SEQUENCE, P(), SEQUENCE, P())
    return jax.shard_map(
        local, mesh=cp_mesh(case.cp), in_specs=specs, out_specs=(SEQUENCE, P(None, None, "cp")), check_vma=False
    )


def with_gradients(f):
    """(q, k, v, sink, positions, window, dout, dlse) -> (out, lse, dq, dk, dv, dsink)."""

    def run(q, k, v, sink, positions, window, dout, dlse):
        outs, vjp = jax.vjp(lambda *x: f(*x, positions, window), q, k, v, sink)
        return *outs, *vjp((dout, dlse))

    return run


@functools.cache
def program(case: Case):
    return jax.jit(with_gradients(attend(case)), compiler_options=QUICK)


@dataclass(frozen=True)
class Problem:
    """Arrays of one call in natural order, float32."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    sink: np.ndarray
    positions: np.ndarray
    window: int
    dout: np.ndarray
    dlse: np.ndarray

    @classmethod
    def draw(cls, rng, case: Case, cuts: int = 0, window: int | None = None, sink: bool = True):
        """Random numbers; `cuts` places where a document ends, a sink of -inf where there is to be none."""
        q, k, v, dout = (x.astype(np.float32) for x in case.heads.draw(rng, case.batch, case.length))
        heads = case.heads.heads
        return cls(
            q, k, v, rng.standard_normal(heads).astype(np.float32) if sink else np.full(heads, -np.inf, np.float32),
            oracle.random_documents(rng, case.batch, case.length, cuts), case.length if window is None else window,
            dout, rng.standard_normal((case.batch, heads, case.length)).astype(np.float32),
        )  # fmt: skip

    def arguments(self, case: Case):
        """The arguments of a program, in the layout's order."""
        q, k, v, positions, dout = (case.to(x) for x in (self.q, self.k, self.v, self.positions, self.dout))
        return q, k, v, self.sink, positions, jnp.int32(self.window), dout, case.to(self.dlse, axis=2)

    def want(self) -> oracle.Attention:
        mask = oracle.causal(self.q.shape[1], self.positions, self.window)
        scale = self.q.shape[3] ** -0.5
        return oracle.attention(
            self.q, self.k, self.v, mask, scale=scale, dout=self.dout, dlse=self.dlse, sink=self.sink
        )


def run(case: Case, problem: Problem, compiled=None) -> list[np.ndarray]:
    """(out, lse, dq, dk, dv, dsink) in natural order."""
    got = (compiled or program(case))(*problem.arguments(case))
    out, lse, dq, dk, dv, dsink = (np.asarray(x) for x in got)
    return [case.back(out), case.back(lse, axis=2), *map(case.back, (dq, dk, dv)), dsink]


def masks(case: Case):
    """(cuts, window): one document, packed, windows shorter and longer than a chunk, both."""
    small, large = min(case.chunk - 1, case.length), min(2 * case.chunk + 1, case.length)
    return [(0, None), (case.length // 5, None), (0, 1), (0, small), (0, large), (case.length // 4, large)]


def check(case: Case, problem: Problem, got) -> None:
    oracle.check_all(got, problem.want(), size=float(np.linalg.norm(problem.dout)))


# ------------------------------------------------------------------------------------------------------------- numbers
# any two of cp, the kind of heads and a size of v like or unlike k's meet; not all three
CASES = [
    Case(cp, Heads(heads, kv_heads, 8, (8, 16)[(i + j) % 2]))
    for i, cp in enumerate((1, 2, 3, 4, 5, 8))
    for j, (heads, kv_heads) in enumerate(((2, 2), (4, 2), (3, 1)))
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ring_is_attention(case):
    rng = np.random.default_rng(case.cp)
    for n, (cuts, window) in enumerate(masks(case)):
        problem = Problem.draw(rng, case, cuts, window, sink=n % 2 == 0)
        check(case, problem, run(case, problem))


OTHERS = [Case(cp, strategy="allgather") for cp in (1, 3, 4, 8)]
OTHERS += [Case(cp, layout="contiguous") for cp in (1, 3, 8)]
OTHERS += [Case(4, strategy="allgather", layout="contiguous")]


@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_other_strategies_and_layouts_give_the_same(case):
    rng = np.random.default_rng(case.cp)
    same = Case(case.cp)
    for cuts, window in masks(case):
        problem = Problem.draw(rng, case, cuts, window)
        got = run(case, problem)
        check(case, problem, got)
        for name, a, b in zip(oracle.Attention._fields, got, run(same, problem), strict=True):
            oracle.check(name, a, b, floor=0.05 * float(np.linalg.norm(problem.dout)))


def test_a_softcap_a_scale_and_no_sink():
    case = Case(3)
    rng = np.random.default_rng(0)
    problem = Problem.draw(rng, case, cuts=3)

    def local(q, k, v, positions):
        return ring_attention(q, k, v, positions=positions, scale=0.7, softcap=1.5, return_lse=True)

    f = jax.shard_map(
        local, mesh=cp_mesh(3), in_specs=(SEQUENCE,) * 4, out_specs=(SEQUENCE, P(None, None, "cp")), check_vma=False
    )

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(q, k, v, positions, dout, dlse):
        outs, vjp = jax.vjp(lambda q, k, v: f(q, k, v, positions), q, k, v)
        return *outs, *vjp((dout, dlse))

    q, k, v, _, positions, _, dout, dlse = problem.arguments(case)
    out, lse, *grads = (np.asarray(x) for x in both(q, k, v, positions, dout, dlse))
    got = [case.back(out), case.back(lse, axis=2), *map(case.back, grads)]
    mask = oracle.causal(case.length, problem.positions)
    want = oracle.attention(problem.q, problem.k, problem.v, mask, scale=0.7, dout=problem.dout, dlse=problem.dlse,
                            softcap=1.5)  # fmt: skip
    oracle.check_all(got, want)


STATIC = [Case(8, window=w) for w in (1, 3, 6, 10)] + [Case(5, window=5), Case(3, window=2), Case(8, window=500)]
STATIC += [Case(8, window=6, layout="contiguous"), Case(4, window=3, strategy="allgather")]


@pytest.mark.parametrize("case", STATIC, ids=str)
def test_static_windows_skip_steps_and_change_no_number(case):
    rng = np.random.default_rng(case.cp)
    for cuts in (0, 6):
        problem = Problem.draw(rng, case, cuts, case.window)
        check(case, problem, run(case, problem))
    if case.strategy == "ring":
        f, arguments = attend(case), problem.arguments(case)
        live = len(live_steps(case.cp, 2 * case.chunk, case.window, case.layout))
        forward = hops.count(hops.collectives(f, *arguments[:6]), "ppermute")
        both = hops.count(hops.collectives(with_gradients(f), *arguments), "ppermute")
        assert (forward, both - forward) == (2 * (live - 1), 4 * (live - 1))  # k and v; and dk and dv


def test_a_static_window_on_cp_8_sends_two_hops_and_not_seven():
    case = Case(8, window=5)
    assert live_steps(8, 8, 5) == (0, 1, 7)
    problem = Problem.draw(np.random.default_rng(0), case, 0, 5)
    assert hops.count(hops.collectives(attend(case), *problem.arguments(case)[:6]), "ppermute") == 2 * 2


def test_the_loop_is_the_straight_line(monkeypatch):
    case = Case(8)
    problem = Problem.draw(np.random.default_rng(0), case, cuts=9, window=40)
    arguments = problem.arguments(case)

    def loops(f):
        found = [eqn for eqn, _ in hops.equations(jax.make_jaxpr(f)(*arguments)) if eqn.primitive.name == "scan"]
        return sum("ppermute" in str(eqn.params["jaxpr"]) for eqn in found)

    looped = run(case, problem)
    assert loops(with_gradients(attend(case))) == 2  # one forward, one backward

    def unrolled(hop, first, count, x):
        for n in range(count):
            x = hop(first._replace(step=first.step + n), x)
        return x

    monkeypatch.setattr(zigzag_jax.ring, "_run_equal", unrolled)
    straight = with_gradients(attend(case))
    assert loops(straight) == 0
    for name, a, b in zip(
        oracle.Attention._fields, looped, run(case, problem, jax.jit(straight, compiler_options=QUICK)), strict=True
    ):
        oracle.check(name, a, b, tolerance=1e-6)  # the same sums in the same order, fused otherwise


# ---------------------------------------------------------------------------------------------------- remat and layers
def layer(case: Case):
    """(x, positions, window) -> x: one residual layer of attention, [B, S, D] in the layout's order."""
    f = attend(case)

    def apply(x, w, positions, window):
        q, k, v = (jnp.einsum("bsd,dhe->bshe", x, w[name]) for name in "qkv")
        out, _ = f(q, k, v, jnp.zeros(q.shape[2]), positions, window)
        return x + jnp.einsum("bshe,hed->bsd", out, w["o"])

    return apply


@pytest.fixture(scope="module")
def tower():
    """Two layers whose windows differ: (case, x, weights [2, ..], positions, windows [2], dout)."""
    case, rng = Case(3, Heads(4, 2, 8, 16)), np.random.default_rng(0)
    sizes = {"q": (12, 4, 8), "k": (12, 2, 8), "v": (12, 2, 16), "o": (4, 16, 12)}
    weights = {name: jnp.asarray(0.3 * rng.standard_normal((2, *size)), jnp.float32) for name, size in sizes.items()}
    x, dout = (jnp.asarray(rng.standard_normal((case.batch, case.length, 12)), jnp.float32) for _ in range(2))
    positions = case.to(jnp.asarray(oracle.random_documents(rng, case.batch, case.length, 4)))
    return case, x, weights, positions, jnp.asarray([3, 11], jnp.int32), dout


def tower_gradients(tower, wrap, scanned: bool):
    """(function of (x, weights), its two gradients under the cotangent)."""
    case, x, weights, positions, windows, dout = tower
    apply = wrap(layer(case))

    def loss(x, weights):
        if scanned:
            x, _ = jax.lax.scan(lambda x, w: (apply(x, w[0], positions, w[1]), None), x, (weights, windows))
        else:
            for n in range(2):
                x = apply(x, jax.tree.map(lambda w, n=n: w[n], weights), positions, windows[n])
        return jnp.vdot(x, dout)

    return jax.value_and_grad(loss, (0, 1)), (x, weights)


REMAT = {
    "no-remat": lambda f: f,
    "remat": jax.checkpoint,
    "saved": functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(OUT_NAME, LSE_NAME)
    ),
}


def test_checkpoint_and_scan_change_no_gradient(tower):
    plain, arguments = tower_gradients(tower, REMAT["no-remat"], scanned=False)
    want = jax.tree.leaves(jax.jit(plain, compiler_options=QUICK)(*arguments))
    for name, wrap in REMAT.items():
        f, arguments = tower_gradients(tower, wrap, scanned=True)
        for a, b in zip(jax.tree.leaves(jax.jit(f, compiler_options=QUICK)(*arguments)), want, strict=True):
            oracle.check(name, a, b)


@pytest.mark.parametrize("scanned", [False, True], ids=["straight", "scan"])
def test_with_the_names_saved_the_forward_ring_is_not_run_again(tower, scanned):
    permutes = {}
    for name, wrap in REMAT.items():
        f, arguments = tower_gradients(tower, wrap, scanned)
        permutes[name] = hops.count(hops.collectives(f, *arguments), "ppermute")
    hop = 2 * (3 - 1) * 2  # layers, hops, two arrays
    assert permutes == {"no-remat": 3 * hop, "saved": 3 * hop, "remat": 4 * hop}


# ---------------------------------------------------------------------------------------------------------------- hops
@pytest.mark.parametrize("grad_dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("cp", [1, 2, 3, 5, 8])  # no hop, straight-line code of any length, loops
def test_hops_and_bytes(cp, grad_dtype):
    case = Case(cp)
    problem = Problem.draw(np.random.default_rng(0), case)
    narrow = lambda x: jnp.asarray(x, jnp.bfloat16)
    q, k, v, sink, positions, window, dout, dlse = problem.arguments(case)
    first = (*map(narrow, (q, k, v)), sink, positions, window)
    f = attend(case, grad_dtype=grad_dtype)
    forward, both = hops.collectives(f, *first), hops.collectives(with_gradients(f), *first, narrow(dout), dlse)
    assert {c.name for c in both} <= {"ppermute", "psum", "psum_invariant"}  # psum: dsink's, at shard_map's transpose
    numbers = (k.size + v.size) // cp  # of a rank's payload; its gradient has as many
    moved = (cp - 1) * numbers
    assert hops.count(forward, "ppermute") == 2 * (cp - 1)
    assert hops.sent(forward) == ({"bfloat16": 2 * moved} if moved else {})
    assert hops.count(both, "ppermute") == 2 * 3 * (cp - 1)
    want = {"bfloat16": 2 * 2 * moved}
    gradient = jnp.dtype(grad_dtype)
    want[gradient.name] = want.get(gradient.name, 0) + gradient.itemsize * moved
    assert hops.sent(both) == (want if moved else {})


@pytest.mark.parametrize("cp", [1, 4])
def test_allgather_sends_no_permute(cp):
    case = Case(cp, strategy="allgather")
    arguments = Problem.draw(np.random.default_rng(0), case).arguments(case)
    found = hops.collectives(with_gradients(attend(case)), *arguments)
    # k and v gathered forward and again backward; dk and dv summed and scattered
    counts = [hops.count(found, name) for name in ("ppermute", "all_gather", "reduce_scatter")]
    assert counts == ([0, 4, 2] if cp > 1 else [0, 0, 0])


def test_every_permute_asks_for_a_stream_of_its_own():
    case = Case(8)
    arguments = Problem.draw(np.random.default_rng(0), case).arguments(case)
    text = jax.jit(with_gradients(attend(case))).lower(*arguments).as_text()
    permutes = [line for line in text.splitlines() if "collective_permute" in line]
    assert permutes
    assert all('_xla_gpu_collective_stream = "p2p"' in line for line in permutes)


# ------------------------------------------------------------------------------------------------------------ bfloat16
@pytest.mark.source
def test_bfloat16_error_does_not_grow_with_cp():
    example = runpy.run_path(str(EXAMPLES / "error_over_cp.py"))
    rows = example["errors"]((1, 8), seq_len=128, head_dim=32)
    print("\n" + example["table"](rows))
    one, *more = rows  # all of cp 1..8 are in the example's own table
    # rounding each result once, at most half of 2**-8; 1.3 leaves room for other roundings, not for one more a hop
    assert max(one[1:]) < 2**-8
    for row in more:
        for name in ("out", "dq", "dk", "dv"):
            assert getattr(row, name) < 1.3 * getattr(one, name), f"{name} at cp {row.cp}"
    # a gradient that travels in bfloat16 is rounded at each hop: errors that add in squares, so about sqrt(cp)
    for row in rows:
        for name in ("dk_bf16", "dv_bf16"):
            assert getattr(row, name) < 1.2 * math.sqrt(row.cp) * getattr(one, name), f"{name} at cp {row.cp}"
    assert rows[-1].dk_bf16 > 1.2 * rows[-1].dk  # it did travel in bfloat16


# -------------------------------------------------------------------------------------------------------------- expand
@dataclass(frozen=True)
class Linear:
    """Payload x [B, S, R]; k = x wk, v = x wv, params (wk [R, K, D], wv [R, K, E])."""

    def fwd(self, params, payload):
        wk, wv = params
        return jnp.einsum("bsr,rkd->bskd", payload, wk), jnp.einsum("bsr,rkd->bskd", payload, wv)

    def bwd(self, params, payload, dk, dv):
        grads = tuple(jnp.einsum("bsr,bskd->rkd", payload, g) for g in (dk, dv))
        return grads, sum(jnp.einsum("bskd,rkd->bsr", g, w) for g, w in zip((dk, dv), params, strict=True))


@pytest.mark.parametrize("strategy", ["ring", "allgather"])
@pytest.mark.parametrize(("dp", "cp"), [(1, 1), (2, 2), (2, 4), (1, 7)], ids=str)
def test_a_custom_expand_has_the_dense_gradient(dp, cp, strategy):
    rng, heads, rank, length = np.random.default_rng(0), GQA, 5, 2 * cp * 3
    q, _, _, dout = heads.draw(rng, 2, length)
    x = rng.standard_normal((2, length, rank))
    params = tuple(rng.standard_normal((rank, heads.kv_heads, d)) for d in (heads.dim, heads.out_dim))
    sink = rng.standard_normal(heads.heads)
    plan = Plan(
        cp=cp, axis_name="cp", length=length // cp, live=tuple(range(cp)), scale=0.3, strategy=strategy, expand=Linear()
    )
    mesh = jax.make_mesh((dp, cp), ("dp", "cp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[: dp * cp])

    def local(params, q, x, sink):
        lo, hi = visible_bounds(global_positions(jax.lax.axis_index("cp"), cp, length // cp))
        out, _ = cast(tuple[jax.Array, jax.Array], ring(plan, params, q, x, lo, hi, sink))
        return out

    spec = P("dp", "cp")
    f = jax.shard_map(local, mesh=mesh, in_specs=(P(), spec, spec, P()), out_specs=spec, check_vma=False)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(params, q, x, sink, dout):
        out, vjp = jax.vjp(f, params, q, x, sink)
        return out, *vjp(dout)

    single = lambda tree: jax.tree.map(lambda a: a.astype(np.float32), tree)
    arguments = single((params, *to_zigzag((q, x), cp), sink, to_zigzag(dout, cp)))
    out, dparams, dq, dx, dsink = jax.tree.map(np.asarray, both(*arguments))

    k, v = (np.einsum("bsr,rkd->bskd", x, w) for w in params)
    want = oracle.attention(q, k, v, oracle.causal(length), scale=0.3, dout=dout, sink=sink)
    oracle.check("out", from_zigzag(out, cp), want.out)
    oracle.check("dq", from_zigzag(dq, cp), want.dq)
    oracle.check("dsink", dsink, want.dsink)
    for name, got, dense in zip(("dwk", "dwv"), dparams, (want.dk, want.dv), strict=True):
        oracle.check(name, got, np.einsum("bsr,bskd->rkd", x, dense))  # relative L2: cp times too much has cosine 1
    dense_dx = sum(np.einsum("bskd,rkd->bsr", g, w) for g, w in zip((want.dk, want.dv), params, strict=True))
    oracle.check("dx", from_zigzag(dx, cp), dense_dx)
