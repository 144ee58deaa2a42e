"""The attention benchmark: what it counts, that a quick run works on a CPU, and that a wrong result is noticed."""

import json
import math

import bench_attention
import bench_calls
import bench_inputs
import bench_ring_tables
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bench import ceiling
from bench_attention import Bench
from bench_calls import row_dot
from bench_inputs import MODELS, Heads, Inputs, documents, flops, pairs, relative, shapes, step_range, tile_area
from bench_rings import STRATEGIES, Case, Rings
from clock import Clock
from h100 import h100s, on
from hollow import hollow_kernels

from zigzag_jax import cost
from zigzag_jax.hlo import Program
from zigzag_jax.kernels import FLASH, flash_bwd, flash_fwd
from zigzag_jax.kernels.flash import cudnn
from zigzag_jax.ranges import KeyRange
from zigzag_jax.work import pairs as pairs_of_ranks

pytestmark = pytest.mark.source
TINY = ["--quick", "--models", "qwen", "--implementations", "reference"]
HEADS = Heads(2, 1, 16, 16)
ONCE = Clock(1, 1, 0.0, jax.block_until_ready)


def run(tmp_path, *arguments) -> tuple[int, dict]:
    """(exit status, results) of one run."""
    status = bench_attention.main([*TINY, *arguments, "--out", str(tmp_path)])
    (file,) = tmp_path.glob("*.json")
    return status, json.loads(file.read_text())["results"]


def rings(length: int, cp: int) -> Rings:
    """Whole rings of `length` tokens a rank."""
    return Rings(HEADS, Inputs.draw(HEADS, length, jnp.bfloat16), ["reference"], cp, ONCE)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_pairs_of_a_ring_are_those_of_causal_attention(layout):
    cp, length = 4, 32
    ring = [[pairs(step_range(rank, source, cp, length, layout)) for source in range(cp)] for rank in range(cp)]
    assert np.sum(ring) == cp * length * (cp * length + 1) // 2
    last = length * length * (cp - 1) + length * (length + 1) // 2
    assert sum(ring[-1]) == (last if layout == "contiguous" else np.sum(ring) // cp)


def test_flops_of_the_measured_step():
    heads = MODELS["qwen"]
    count = pairs(step_range(0, 0, 4, 8192))
    assert count == 8192 * 8193 // 2
    assert flops(heads, count, "fwd") == pytest.approx(0.55e12, rel=0.01)
    assert flops(heads, count, "carry") == flops(heads, count, "fwd")
    assert flops(heads, count, "bwd") == 2.5 * flops(heads, count, "fwd")


def test_mla_s_hop_is_that_of_the_expanded_ring():
    sizes = cost.LatentSizes(latent=512, rope=64, heads=16, dim=192, out_dim=128)
    assert MODELS["mla"].layer().payload == sizes.payloads["expanded"]


def test_steps_of_a_rank():
    assert [shapes(rank, 3) for rank in range(3)] == [
        {"diag": 0, "back": 1},
        {"diag": 1, "front": 0, "back": 2},
        {"diag": 2, "front": 1},
    ]
    assert shapes(0, 1) == {"diag": 0}


def test_tile_area():
    one = lambda **rest: step_range(0, 0, 1, 64, **rest)
    assert tile_area(one(), tile=16) == (1 + 2 + 3 + 4) * 256
    assert tile_area(one(window=16), tile=16) == (1 + 2 + 2 + 2) * 256
    positions = jnp.tile(jnp.arange(32), 2)[None]
    assert tile_area(one(positions=positions), tile=16) == 2 * (1 + 2) * 256
    nothing = KeyRange(jnp.zeros((1, 32), jnp.int32), jnp.zeros((1, 32), jnp.int32))
    assert tile_area(nothing, tile=16) == 0
    packed = np.asarray(documents(8, 64))
    assert packed.shape == (1, 64)
    assert (packed == 0).sum() == 8
    assert set(np.diff(packed[0])[packed[0, 1:] > 0]) == {1}


def test_steps_on_a_cpu(tmp_path, capsys):
    status, results = run(tmp_path, "--tokens", "192", "--cp", "3")
    assert status == 0
    assert [row["verdict"] for row in results["qwen check"]] == ["ok"] * 3
    rows = results["qwen steps"]
    # the first and the last rank meet two kinds of steps, the middle one three
    assert [(row["rank"], row["step"], row["pass"]) for row in rows] == [
        (rank, step, which)
        for rank in range(3)
        for step in ("diag", "front", "back")
        if (rank, step) not in ((0, "front"), (2, "back"))
        for which in ("fwd", "carry", "bwd")
    ]
    assert all(row["ms"] > 0 and row["TF/s"] > 0 and row["% of matmul"] > 0 for row in rows)
    printed = capsys.readouterr().out
    assert printed.startswith("    python examples/bench_attention.py --quick")
    assert "64 tokens a rank, bfloat16" in printed


@pytest.mark.slow
def test_other_tables_on_a_cpu(tmp_path, capsys):
    status, results = run(tmp_path, "--tokens", "256", "--cp", "2", "--ring", "--masks", "--deterministic")
    assert status == 0
    assert (tmp_path / "attention-ring-masks-deterministic.png").stat().st_size > 10_000
    for check, rings in (("ring", list(STRATEGIES)), ("masks ring", ["8 documents", "window 64"])):
        assert [(row["ring"], row["verdict"]) for row in results[f"qwen {check} check"]] == [(r, "ok") for r in rings]
    rows = results["qwen ring"]
    assert [(row["strategy"], row["rank"]) for row in rows] == [(s, rank) for s in STRATEGIES for rank in range(2)]
    for row in results["qwen ring path"]:
        own = [other["both ms"] for other in rows if other["strategy"] == row["strategy"]]
        assert row["compute critical path ms"] == max(own)
        assert 0 < row["modelled wire ms"] < 1  # kilobytes, at 200 GB/s
    printed = capsys.readouterr().out
    assert "reference: naive / zigzag " in printed
    assert "the wire modelled at 200 GB/s" in printed
    causal = [row for row in results["qwen masks"] if row["mask"] == "causal"]
    assert [row["time / area"] for row in causal] == [1.0] * 3
    assert results["qwen masks ring"][0]["time / area"] == 1.0
    for row in results["qwen masks ring"]:
        mask = bench_inputs.masks(256)[row["mask"]]
        inside = np.arange(256) if mask.positions is None else mask.positions[0]
        chunk = np.minimum(inside + 1, mask.window or 256).reshape(4, 64).sum(axis=1)  # what its rows see
        slowest = max(chunk[0] + chunk[3], chunk[1] + chunk[2])
        assert row["area / causal"] == pytest.approx(slowest / (256 * 257 // 4))
    assert [row["step"] for row in results["qwen deterministic"]] == ["diag", "back", "front"]


@pytest.mark.slow
def test_a_whole_ring_that_is_wrong_is_not_timed(tmp_path, monkeypatch):
    def fwd(q, k, v, keys, settings, carry, out_dtype):
        return FLASH["reference"].fwd(q, k, v, keys, settings, None, out_dtype)  # forgets what came before

    monkeypatch.setitem(FLASH, "forgets", FLASH["reference"]._replace(fwd=fwd))
    status, results = run(tmp_path, "--tokens", "64", "--cp", "2", "--ring", "--implementations", "forgets")
    assert status == 1
    assert {row["verdict"] for row in results["qwen check"]} == {"ok"}  # a step alone is right
    wrong = {row["ring"]: row["verdict"][:8] for row in results["qwen ring check"]}
    assert wrong == {"zigzag ring": "FAIL out", "naive ring": "FAIL out", "zigzag all-gather": "ok"}
    assert results["qwen ring"] == []


def test_a_ring_meets_the_shards_of_its_live_steps():
    few = rings(64, 4)
    assert few.sources(Case("zigzag ring", 1)) == [1, 0, 3, 2]
    narrow = Case("zigzag ring", 1, bench_inputs.Mask(window=8))
    assert few.sources(narrow) == [1, 0, 2]  # the middle step of four is dead
    for strategy in STRATEGIES:
        for mask in bench_inputs.masks(256).values():
            work = pairs_of_ranks(
                4, 64, layout=STRATEGIES[strategy].layout, positions=mask.positions, window=mask.window
            )
            assert pairs(few.keys(Case(strategy, 3, mask))) == work[:, 3].sum()
    slowest = few.slowest()
    assert set(slowest) == set(bench_inputs.masks(256))
    assert all(few.pairs(case.mask).sum(0).max() == pairs(few.keys(case)) for case in slowest.values())


def test_the_wire_is_the_cost_model_s():
    length, cp, link = 8192, 4, 50e9
    big = Rings(MODELS["qwen"], Inputs.draw(HEADS, length, jnp.bfloat16), ["mosaic"], cp, ONCE)
    ms = {}
    for strategy in STRATEGIES:
        for rank in range(cp):
            work = big.flops(Case(strategy, rank))
            ms[strategy, rank] = work["fwd"] / cost.H100.forward * 1e3, work["bwd"] / cost.H100.backward * 1e3
    rows = [
        {"strategy": strategy, "rank": rank, "by": "mosaic", "fwd ms": fwd, "bwd ms": bwd, "both ms": fwd + bwd}
        for (strategy, rank), (fwd, bwd) in ms.items()
    ]
    layer, machine = MODELS["qwen"].layer(), cost.H100._replace(link=link)
    zigzag, naive = (pairs_of_ranks(cp, length, layout=layout) for layout in ("zigzag", "contiguous"))
    want = {
        "zigzag ring": cost.ring_seconds(layer, cp, length, zigzag, machine=machine),
        "naive ring": cost.ring_seconds(layer, cp, length, naive, layout="contiguous", machine=machine),
        "zigzag all-gather": cost.gather_seconds(layer, cp, length, zigzag, machine=machine),
    }
    for row in bench_ring_tables.paths(big, rows, link):
        total = row["compute critical path plus the modelled wire ms"]
        assert total == pytest.approx(want[row["strategy"]].both * 1e3)
        assert row["modelled wire ms"] > 0
        assert row["naive / path plus wire"] == pytest.approx(want["naive ring"].both / want[row["strategy"]].both)
    assert "naive / zigzag 1.750 (by pairs 1.750), slowest / fastest zigzag rank 1.000" in bench_ring_tables.balance(
        rows
    )


@pytest.mark.parametrize("strategy", ["naive ring", "zigzag ring"])
@pytest.mark.parametrize("more", [0.0, 0.7])
def test_the_wire_is_not_made_of_noise(strategy: str, more: float):
    """Of the naive ring rank 1 has three times the pairs; here rank 0 takes as long, or a little longer."""
    rows = [
        {"rank": rank, "by": "reference", "fwd ms": 13.0 + late, "bwd ms": 13.0, "both ms": 26.0 + late}
        for rank, late in enumerate((more, 0.0))
    ]
    (wire,) = {round(bench_ring_tables.modelled_wire(rings(128, 2), strategy, x, 200e9), 9) for x in (rows, rows[::-1])}
    assert 0 <= wire < 0.01  # kilobytes


@pytest.mark.aot
@pytest.mark.slow
def test_whole_rings_call_a_kernel_a_step():
    mesh, heads, length, cp = h100s(1), MODELS["qwen"], 8192, 2
    array = lambda shape, dtype=jnp.bfloat16: on(mesh, shape, dtype)
    q, lse = array((1, length, heads.heads, heads.dim)), array((1, heads.heads, length), jnp.float32)
    bounds = lambda *shape: KeyRange(*[array((*shape, 1, length), jnp.int32)] * 2)  # pyright: ignore[reportArgumentType]
    own, static = (heads.kv_heads, heads.dim), {"scale": 0.1, "name": "mosaic"}
    for ahead, back, kv, keys in (
        (bench_calls.ring_forward, bench_calls.ring_backward, array((cp, 1, length, *own)), bounds(cp)),
        (bench_calls.forward, bench_calls.backward, array((1, cp * length, *own)), bounds()),
    ):
        calls = cp if kv.ndim == 5 else 1
        with hollow_kernels():
            compiled = [
                ahead.lower(q, kv, kv, keys, **static).compile(),
                back.lower(q, kv, kv, q, lse, q, keys, **static).compile(),
            ]
        forward, backward = (Program(x.as_text() or "").kernels() for x in compiled)
        assert forward == {"flash_fwd": calls}
        assert backward == {"zeros": 1, "flash_bwd": calls}


@pytest.mark.slow
def test_cudnn_is_timed_on_what_it_would_be_given(monkeypatch):
    given = []

    def ranges(q, k, causal):
        stop = jnp.arange(1, q.shape[1] + 1) if causal else jnp.full(q.shape[1], k.shape[1])
        return KeyRange(jnp.zeros((1, q.shape[1]), jnp.int32), stop[None].astype(jnp.int32))

    def fwd(q, k, v, *, scale, causal, window):
        given.append((q.shape[1], k.shape[1], causal, window))
        return flash_fwd(q, k, v, ranges(q, k, causal), scale=scale, out_dtype=q.dtype)

    def bwd(q, k, v, out, lse, dout, *, scale, causal, window):
        delta = row_dot(dout, out)
        return flash_bwd(q, k, v, lse, delta, dout, ranges(q, k, causal), scale=scale)

    monkeypatch.setattr(cudnn, "forward", fwd)
    monkeypatch.setattr(cudnn, "backward", bwd)
    x = Inputs.draw(HEADS, 64, jnp.bfloat16)
    table = Bench(HEADS, x, ["reference", "cudnn"], 2, ONCE, ceiling(True, x.q.dtype), 1.0)
    rows = table.steps()
    assert given == [(64, 64, True, None), (32, 64, False, None), (64, 64, True, None), (64, 32, False, None)]
    assert [row["time / cudnn"] for row in rows if row["by"] == "cudnn"] == [1.0] * 8
    assert all(row["time / cudnn"] > 0 for row in rows)
    assert {row["pass"] for row in rows if row["by"] == "cudnn"} == {"fwd", "bwd"}


@pytest.mark.parametrize("wrong", ["out", "dk"])
def test_a_result_that_falls_short_is_exit_status_1(tmp_path, monkeypatch, wrong):
    def fwd(*args):
        out, lse = FLASH["reference"].fwd(*args)
        return out * (1 + 4e-3 * (wrong == "out")), lse

    def bwd(*args):
        dq, dk, dv = FLASH["reference"].bwd(*args)
        return dq, dk * (1 + 5e-3 * (wrong == "dk")), dv

    name = f"wrong-{wrong}"  # what is compiled is kept by this name
    monkeypatch.setitem(FLASH, name, FLASH["reference"]._replace(fwd=fwd, bwd=bwd))
    status, results = run(tmp_path, "--tokens", "64", "--cp", "1", "--implementations", name)
    assert status == 1
    assert [row["verdict"] for row in results["qwen check"]] == [f"FAIL {wrong}"]
    assert list(results) == ["qwen check"]


def test_an_implementation_that_cannot_is_said_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(FLASH, "none", FLASH["reference"]._replace(limits=lambda *_: "another card"))
    status, results = run(tmp_path, "--tokens", "64", "--cp", "1", "--implementations", "none")
    assert status == 1  # nothing was checked
    assert results == {"qwen check": []}
    assert "none cannot do diag: 'none' needs another card" in capsys.readouterr().out


def test_an_error_counts_rows_that_see_nothing():
    assert relative([1.0, -math.inf], [1.0, -math.inf]) == 0.0
    assert math.isnan(relative([1.0, 0.0], [1.0, -math.inf]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "gpt"], "--models must be of qwen, mla, d64, d96, d256, got gpt"),
        (["--implementations", "magic"], "--implementations must be of mosaic, triton, cudnn, reference"),
        (["--tokens", "100", "--cp", "8"], "--tokens must be a multiple of 2 * cp, got 100 with --cp 8"),
        (["--tokens", "256", "--masks"], "--tokens must be a multiple of 128 * cp, got 256 with --cp 4"),
        (["--cp", "0"], "--cp must be at least 1, got 0"),
        (["--link", "0"], "--link must be > 0 bytes a second, got 0.0"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        bench_attention.main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
