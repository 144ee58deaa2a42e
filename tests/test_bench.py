"""What the benchmarks share: times in turn, tables, bars, and that what is wrong is not timed."""

import json
import math

import matplotlib.image
import pytest
from bench import Report, table, verdict
from bench_picture import Chart, Panel, digits
from clock import Clock

pytestmark = pytest.mark.source


def test_times_are_medians_taken_in_turn(monkeypatch):
    now, order, waited = [0.0], [], []
    clock = Clock(samples=3, repeats=2, idle=0.25, wait=waited.append)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr("time.sleep", order.append)

    def call(name, *seconds):
        durations = iter(seconds)

        def f():
            order.append(name)
            now[0] += next(durations)
            return name

        return f

    ms = clock.in_turn({"a": call("a", 9, 1, 1, 9, 2, 2, 9, 70, 70), "b": call("b", *[1] * 9)})
    assert ms == {"a": 2000.0, "b": 1000.0}  # neither the call that wakes the card nor the one that was late
    assert order == [0.25, "a", "a", "a", 0.25, "b", "b", "b"] * 3
    assert waited == ["a", "a", "b", "b"] * 3  # for the call that wakes the card, and for the last


def test_the_table_lines_up():
    rows = [{"by": "a", "rank": 0, "ms": 1.25, "% of matmul": 0.5, "ratio": None},
            {"by": "long", "rank": 10, "ms": 123.4, "% of matmul": 1.0, "ratio": 0.777}]  # fmt: skip
    assert table(rows).splitlines() == [
        "| by   | rank |    ms | % of matmul | ratio |",
        "| ---- | ---: | ----: | ----------: | ----: |",
        "| a    |    0 | 1.250 |          50 |       |",
        "| long |   10 |   123 |         100 |  0.78 |",
    ]


def test_the_verdict_names_what_falls_short():
    bars = {"out": 1e-3, "lse": 1e-6, "dv": 1e-3}
    assert verdict({"out": 1e-3, "lse": 0.0, "dv": 0.0}, bars) == "ok"
    assert verdict({"out": 0.0, "lse": math.nan, "dv": 5e-3}, bars) == "FAIL lse dv"


ROWS = [
    {"by": "a", "rank": 0, "fwd ms": 1.0, "bwd ms": 2.0},
    {"by": "b", "rank": 0, "fwd ms": 3.0, "bwd ms": None},
    {"by": "a", "rank": 1, "fwd ms": 4.0, "bwd ms": math.nan},
]


def test_the_bars_are_the_rows():
    side = Panel("", Chart(("fwd ms",), ("rank",), ("by",)), ROWS)
    assert side.groups() == {"rank 0": {"a": 1.0, "b": 3.0}, "rank 1": {"a": 4.0}}
    both = Panel("", Chart(("fwd ms", "bwd ms"), ("rank", "by"), stacked=True), ROWS)
    assert (side.unit(), both.unit()) == ("fwd ms", "ms")
    assert Panel("", Chart(("time / causal", "lock step / causal"), ("rank",)), ROWS).unit() == "/ causal"
    assert both.groups() == {
        "rank 0 a": {"fwd ms": 1.0, "bwd ms": 2.0},
        "rank 0 b": {"fwd ms": 3.0},
        "rank 1 a": {"fwd ms": 4.0},
    }
    named = Panel("", Chart(("fwd ms", "bwd ms"), ("rank",), ("by",)), ROWS)
    assert list(named.groups()["rank 0"]) == ["a fwd ms", "a bwd ms", "b fwd ms"]


def test_numbers_beside_the_bars():
    assert [digits(x) for x in (2_567_000.0, 439.4, 1.2345, 0.00123)] == ["2,567,000", "439", "1.23", "0.00123"]


def test_a_report_is_table_json_and_picture(tmp_path, capsys):
    report = Report("bench_thing", ["--fast"], tmp_path / "new", more=1)
    report.add("times", ROWS[:1], Chart(("fwd ms",), ("rank",), ("by",)), "What to see.")
    lone = matplotlib.image.imread(tmp_path / "new" / "thing.png").shape[0]
    report.add("times", ROWS, Chart(("fwd ms",), ("rank",), ("by",)))  # in the place of the first
    report.add("parts", ROWS, Chart(("fwd ms", "bwd ms"), ("rank", "by"), stacked=True))
    found = json.loads((tmp_path / "new" / "thing.json").read_text())
    assert found["command"] == "python examples/bench_thing.py --fast"
    assert {"card", "devices", "host", "jax", "versions", "flags", "date"} < set(found)
    assert {"python", "jaxlib", "platform"} == set(found["versions"])
    assert found["more"] == 1
    assert list(found["results"]) == ["times", "parts"]
    assert found["results"]["times"][1] == ROWS[1]
    assert matplotlib.image.imread(tmp_path / "new" / "thing.png").shape[0] > lone > 100
    printed = capsys.readouterr().out
    assert printed.startswith("    python examples/bench_thing.py --fast\n\ncpu, jax ")
    assert "| rank |" in printed
    assert "\n\nWhat to see.\n" in printed


def test_nothing_that_is_wrong_is_timed(capsys):
    report = Report("bench_thing", [], None)
    row = lambda by, verdict: {"by": by, "verdict": verdict}
    assert report.check("check", [row("a", "ok"), row("b", "ok"), row("b", "ok")]) == ["a", "b"]
    assert report.status == 0
    assert report.check("check", [row("a", "ok"), row("b", "FAIL dk"), row("b", "ok")]) == ["a"]
    assert report.status == 1
    assert "Not timed, for it is wrong: b" in capsys.readouterr().out
    empty = Report("bench_thing", [], None)
    assert empty.check("check", []) == []
    assert empty.status == 1  # nothing could be checked


def test_without_matplotlib_the_numbers_are_kept_and_it_is_said_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    Report("bench_thing", [], tmp_path).add("times", ROWS, Chart(("fwd ms",), ("rank",), ("by",)))
    assert [file.name for file in tmp_path.iterdir()] == ["thing.json"]
    assert "no pictures: matplotlib is not installed" in capsys.readouterr().out
