"""Kernels' own durations: how a trace is told apart into calls, and what the table is made of."""

import contextlib
import json

import bench_calls
import jax.numpy as jnp
import kernel_times
import pytest
from bench_inputs import Heads, Inputs, tile_area
from trace_events import Event

pytestmark = pytest.mark.source
REST = kernel_times.REST * 1e6  # microseconds


def call(start: float, *lengths: float) -> list[Event]:
    """Kernels one behind the other, 2 us apart."""
    events = []
    for length in lengths:
        events.append(Event("kernel", start, start + length))
        start += length + 2
    return events


def test_a_calls_longest_kernel_and_the_sum_of_the_others():
    # the second call's kernels overlap: the rest is counted from where all before it have ended
    events = [
        *call(0, 3, 800, 5),
        Event("a", 2 * REST, 2 * REST + 1.5 * REST),
        *call(2 * REST + 1, 4, 4),
        *call(6 * REST, 90),
    ]
    assert kernel_times.by_call(events, 3) == [(800, 8), (1.5 * REST, 8), (90, 0)]


def test_calls_that_cannot_be_told_apart_are_an_error():
    with pytest.raises(ValueError, match=r"must hold 2 calls with rests of 0\.03 s, got 1"):
        kernel_times.by_call(call(0, 3, 800), 2)


@pytest.mark.parametrize("pauses", [0, 2, 3])
def test_a_pause_of_the_host_inside_a_call_is_traced_anew_twice(pauses, monkeypatch, capsys):
    whole = [*call(0, 3, 800), *call(2 * REST, 3, 802)]
    torn = [*whole[:2], Event("a", REST, REST + 5), *whole[2:]]
    traces = [torn] * pauses + [whole] * 3
    monkeypatch.setattr(kernel_times.time, "sleep", lambda _: None)
    monkeypatch.setattr(kernel_times.jax.profiler, "trace", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(kernel_times, "read", lambda _: {"GPU:0": traces.pop(0)})
    if pauses == 3:
        with pytest.raises(ValueError, match=r"must hold 2 calls .*, got 3"):
            kernel_times.traced({"fwd": lambda: None}, 2)
    else:
        assert kernel_times.traced({"fwd": lambda: None}, 2) == {"fwd": (801, 3)}
    assert capsys.readouterr().err.count("got 3: traced anew") == min(pauses, 2)


def test_the_table_gives_each_call_its_own_kernels(monkeypatch):
    # a trace that is made of the calls as they came: the n-th takes n ms and one kernel of 1 us before it
    length, came, read = 512, [], []
    monkeypatch.setattr(kernel_times.time, "sleep", lambda _: None)
    monkeypatch.setattr(kernel_times.jax.profiler, "trace", lambda _: contextlib.nullcontext())
    real = kernel_times.calls

    def counted(name, x, keys):
        return {key: (lambda run=run: (came.append(0), run())) for key, run in real(name, x, keys).items()}

    def trace(_):
        read_before = sum(read)
        read.append(len(came) - read_before)
        return {"GPU:0": [e for n in range(read_before, len(came)) for e in call(n * 2e6, 1, 1e3 * (n + 1))]}

    monkeypatch.setattr(kernel_times, "calls", counted)
    monkeypatch.setattr(kernel_times, "read", trace)
    ranges = {
        kind: keys for kind, keys in kernel_times.kinds(length).items() if kind in ("causal", "front", "window 128")
    }
    table = kernel_times.rows("reference", Inputs.draw(Heads(2, 1, 16, 16), length, jnp.float32), ranges, 3)
    assert [(row["kind"], row["pass"]) for row in table] == [
        (kind, which) for kind in ("causal", "front", "window 128") for which in ("fwd", "carry", "bwd")
    ]
    # of nine calls a kind, fwd is the first of three, and the median sample the second: calls 4, 13, 22
    assert [row["kernel us"] for row in table if row["pass"] == "fwd"] == [4e3, 13e3, 22e3]
    assert all(row["others us"] == 1 for row in table)
    area = tile_area(ranges["window 128"]) / tile_area(ranges["causal"])
    assert table[0]["time / tiles"] == 1
    assert table[6]["time / tiles"] == pytest.approx(22 / 4 / area)


def test_kinds_begin_with_causal_and_have_a_rings_steps():
    kinds = kernel_times.kinds(512)
    assert list(kinds)[:3] == ["causal", "front", "back"]
    assert len(kinds) == 3 + 7
    assert "window 4096" in kernel_times.kinds(8192)


@pytest.mark.parametrize("wrong", ["causal", "front"])
def test_a_kind_that_is_refused_or_wrong_is_not_timed(wrong, tmp_path, monkeypatch, capsys):
    def errors(name, x, keys):
        kind = next(kind for kind, known in kernel_times.kinds(256).items() if all(map(jnp.array_equal, known, keys)))
        if kind == "back":
            raise NotImplementedError("no such ranges")
        return dict.fromkeys(bench_calls.BARS, 1.0 if kind == wrong else 0.0)

    monkeypatch.setattr(kernel_times.jax, "default_backend", lambda: "gpu")
    monkeypatch.setitem(kernel_times.MODELS, "qwen", Heads(2, 1, 16, 16))
    monkeypatch.setattr(bench_calls, "errors", errors)
    monkeypatch.setattr(kernel_times, "traced", lambda runs, samples: dict.fromkeys(runs, (100.0, 1.0)))
    command = ["--implementation", "reference", "--tokens", "256", "--out", str(tmp_path)]
    assert kernel_times.main(command) == 1
    assert "reference cannot do back: no such ranges" in capsys.readouterr().out
    table = json.loads((tmp_path / "kernel_times.json").read_text())["results"]["qwen, reference"]
    assert {"back", wrong}.isdisjoint(row["kind"] for row in table)
    assert {row["time / tiles"] is None for row in table} == {wrong == "causal"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "llama"], "--models must be of qwen, mla, d64, d96, d256, got llama"),
        (["--tokens", "100"], "--tokens must be a multiple of 256, got 100"),
        (["--samples", "0"], "--samples must be at least 1, got 0"),
        ([], "a GPU must be there, whose trace has its kernels' durations, got cpu"),
    ],
)
def test_a_wrong_command_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        kernel_times.main(arguments)
    assert message in capsys.readouterr().err
