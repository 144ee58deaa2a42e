"""The attention benchmark: what it counts, that a quick run works on a CPU, and that a wrong result is noticed."""

import json
import math
import runpy
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from zigzag_jax.kernels import FLASH, flash_bwd, flash_fwd
from zigzag_jax.kernels.flash import cudnn
from zigzag_jax.ranges import KeyRange

pytestmark = pytest.mark.source
EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = ["--quick", "--models", "qwen", "--implementations", "reference"]


@pytest.fixture
def bench(monkeypatch):
    """The names of the three files."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    script = runpy.run_path(str(EXAMPLES / "bench_attention.py"))
    yield {**vars(sys.modules["bench_calls"]), **vars(sys.modules["bench_common"]), **script}
    for name in ("bench_calls", "bench_common"):
        sys.modules.pop(name)


def run(bench, tmp_path, *arguments) -> tuple[int, dict]:
    """(exit status, results) of one run."""
    path = tmp_path / "numbers.json"
    status = bench["main"]([*TINY, *arguments, "--json", str(path)])
    found = json.loads(path.read_text())
    assert {"command", "card", "jax", "date"} < set(found)
    return status, found["results"]


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_pairs_of_a_ring_are_those_of_causal_attention(bench, layout):
    cp, length = 4, 32
    ring = [
        [bench["pairs"](bench["step_range"](rank, source, cp, length, layout)) for source in range(cp)]
        for rank in range(cp)
    ]
    assert np.sum(ring) == cp * length * (cp * length + 1) // 2
    last = length * length * (cp - 1) + length * (length + 1) // 2
    assert sum(ring[-1]) == (last if layout == "contiguous" else np.sum(ring) // cp)


def test_flops_of_the_measured_step(bench):
    heads = bench["MODELS"]["qwen"]
    count = bench["pairs"](bench["step_range"](0, 0, 4, 8192))
    assert count == 8192 * 8193 // 2
    assert bench["flops"](heads, count, "fwd") == pytest.approx(0.55e12, rel=0.01)
    assert bench["flops"](heads, count, "carry") == bench["flops"](heads, count, "fwd")
    assert bench["flops"](heads, count, "bwd") == 2.5 * bench["flops"](heads, count, "fwd")


def test_steps_of_a_rank(bench):
    assert [bench["shapes"](rank, 3) for rank in range(3)] == [
        {"diag": 0, "back": 1},
        {"diag": 1, "front": 0, "back": 2},
        {"diag": 2, "front": 1},
    ]
    assert bench["shapes"](0, 1) == {"diag": 0}


def test_tile_area(bench):
    one = lambda **rest: bench["step_range"](0, 0, 1, 64, **rest)
    assert bench["tile_area"](one(), tile=16) == (1 + 2 + 3 + 4) * 256
    assert bench["tile_area"](one(window=16), tile=16) == (1 + 2 + 2 + 2) * 256
    positions = jnp.tile(jnp.arange(32), 2)[None]
    assert bench["tile_area"](one(positions=positions), tile=16) == 2 * (1 + 2) * 256
    nothing = KeyRange(jnp.zeros((1, 32), jnp.int32), jnp.zeros((1, 32), jnp.int32))
    assert bench["tile_area"](nothing, tile=16) == 0
    packed = np.asarray(bench["documents"](8, 64))
    assert packed.shape == (1, 64)
    assert (packed == 0).sum() == 8
    assert set(np.diff(packed[0])[packed[0, 1:] > 0]) == {1}


def test_the_table_lines_up(bench):
    rows = [{"by": "a", "rank": 0, "ms": 1.25, "% of matmul": 0.5, "ratio": None},
            {"by": "long", "rank": 10, "ms": 123.4, "% of matmul": 1.0, "ratio": 0.777}]  # fmt: skip
    assert bench["table"](rows).splitlines() == [
        "| by   | rank |    ms | % of matmul | ratio |",
        "| ---- | ---: | ----: | ----------: | ----: |",
        "| a    |    0 | 1.250 |          50 |       |",
        "| long |   10 |   123 |         100 |  0.78 |",
    ]


def test_times_are_medians_taken_in_turn(bench, monkeypatch):
    now, order = [0.0], []
    clock = bench["Clock"](samples=3, repeats=2, idle=0.25, matmul=8)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr("time.sleep", order.append)

    def call(name, *seconds):
        durations = iter(seconds)

        def f():
            order.append(name)
            now[0] += next(durations)

        return f

    ms = clock.in_turn({"a": call("a", 9, 1, 1, 9, 2, 2, 9, 70, 70), "b": call("b", *[1] * 9)})
    assert ms == {"a": 2000.0, "b": 1000.0}  # neither the call that wakes the card nor the one that was late
    assert order == [0.25, "a", "a", "a", 0.25, "b", "b", "b"] * 3


def test_steps_on_a_cpu(bench, tmp_path, capsys):
    status, results = run(bench, tmp_path, "--tokens", "256")
    assert status == 0
    assert [row["verdict"] for row in results["qwen check"]] == ["ok"] * 3
    rows = results["qwen steps"]
    # the first and the last rank meet two kinds of steps, the others three
    assert [(row["rank"], row["step"], row["pass"]) for row in rows] == [
        (rank, step, which)
        for rank in range(4)
        for step in ("diag", "front", "back")
        if (rank, step) not in ((0, "front"), (3, "back"))
        for which in ("fwd", "carry", "bwd")
    ]
    assert all(row["ms"] > 0 and row["TF/s"] > 0 and row["% of matmul"] > 0 for row in rows)
    printed = capsys.readouterr().out
    assert printed.startswith("    python examples/bench_attention.py --quick")
    assert "64 tokens a rank, bfloat16" in printed


@pytest.mark.slow
def test_other_tables_on_a_cpu(bench, tmp_path, capsys):
    status, results = run(bench, tmp_path, "--tokens", "256", "--cp", "2", "--ring", "--masks", "--deterministic")
    assert status == 0
    assert [(row["layout"], row["rank"]) for row in results["qwen ring"]] == [
        ("zigzag", 0), ("zigzag", 1), ("contiguous", 1)
    ]  # fmt: skip
    assert "reference: naive / zigzag " in capsys.readouterr().out
    masks = results["qwen masks"]
    assert [row["mask"] for row in masks] == [m for m in ("causal", "8 documents", "window 64") for _ in range(3)]
    assert [row["time / predicted"] for row in masks[:3]] == [1.0] * 3
    assert [row["step"] for row in results["qwen deterministic"]] == ["diag", "back", "front"]


@pytest.mark.slow
def test_cudnn_is_timed_on_what_it_would_be_given(bench, monkeypatch):
    given = []

    def ranges(q, k, causal):
        stop = jnp.arange(1, q.shape[1] + 1) if causal else jnp.full(q.shape[1], k.shape[1])
        return KeyRange(jnp.zeros((1, q.shape[1]), jnp.int32), stop[None].astype(jnp.int32))

    def fwd(q, k, v, *, scale, causal, window):
        given.append((q.shape[1], k.shape[1], causal, window))
        return flash_fwd(q, k, v, ranges(q, k, causal), scale=scale, out_dtype=q.dtype)

    def bwd(q, k, v, out, lse, dout, *, scale, causal, window):
        delta = bench["row_dot"](dout, out)
        return flash_bwd(q, k, v, lse, delta, dout, ranges(q, k, causal), scale=scale)

    monkeypatch.setattr(cudnn, "forward", fwd)
    monkeypatch.setattr(cudnn, "backward", bwd)
    x = bench["Inputs"].draw(bench["Heads"](2, 1, 16, 16), 64, jnp.bfloat16)
    table = bench["Bench"](bench["Heads"](2, 1, 16, 16), x, ["reference", "cudnn"], 2, bench["Clock"](1, 1, 0.0, 64))
    rows = table.steps()
    assert given == [(64, 64, True, None), (32, 64, False, None), (64, 64, True, None), (64, 32, False, None)]
    assert [row["time / cudnn"] for row in rows if row["by"] == "cudnn"] == [1.0] * 8
    assert all(row["time / cudnn"] > 0 for row in rows)
    assert {row["pass"] for row in rows if row["by"] == "cudnn"} == {"fwd", "bwd"}


@pytest.mark.parametrize("wrong", ["out", "dk"])
def test_a_result_that_falls_short_is_exit_status_1(bench, tmp_path, monkeypatch, wrong):
    def fwd(*args):
        out, lse = FLASH["reference"].fwd(*args)
        return out * (1 + 4e-3 * (wrong == "out")), lse

    def bwd(*args):
        dq, dk, dv = FLASH["reference"].bwd(*args)
        return dq, dk * (1 + 5e-3 * (wrong == "dk")), dv

    monkeypatch.setitem(FLASH, "wrong", FLASH["reference"]._replace(fwd=fwd, bwd=bwd))
    status, results = run(bench, tmp_path, "--tokens", "64", "--cp", "1", "--implementations", "wrong")
    assert status == 1
    assert [row["verdict"] for row in results["qwen check"]] == [f"FAIL {wrong}"]


def test_an_implementation_that_cannot_is_said_so(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(FLASH, "none", FLASH["reference"]._replace(limits=lambda *_: "another card"))
    status, results = run(bench, tmp_path, "--tokens", "64", "--cp", "1", "--implementations", "none")
    assert status == 1  # nothing was checked
    assert results == {"qwen check": [], "qwen steps": []}
    assert "none cannot do diag: 'none' needs another card" in capsys.readouterr().out


def test_an_error_counts_rows_that_see_nothing(bench):
    assert bench["relative"]([1.0, -math.inf], [1.0, -math.inf]) == 0.0
    assert math.isnan(bench["relative"]([1.0, 0.0], [1.0, -math.inf]))
    errors = dict.fromkeys(bench["BARS"], 0.0)
    assert bench["verdict"](errors) == "ok"
    assert bench["verdict"](errors | {"lse": math.nan, "dv": 5e-3}) == "FAIL lse dv"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "gpt"], "--models must be of qwen, mla, d64, d96, d256, got gpt"),
        (["--implementations", "magic"], "--implementations must be of mosaic, triton, cudnn, reference"),
        (["--tokens", "100", "--cp", "8"], "--tokens must be a multiple of 2 * cp, got 100 with --cp 8"),
        (["--tokens", "256", "--masks"], "--tokens must be a multiple of 128 * cp, got 256 with --cp 4"),
        (["--cp", "0"], "--cp must be at least 1, got 0"),
    ],
)
def test_bad_arguments(bench, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        bench["main"](arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
