"""Benchmarks of rings and of slices, and the trace reader: that they run, count right and notice what is wrong."""

import importlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

pytestmark = pytest.mark.source
EXAMPLES = Path(__file__).parent.parent / "examples"
QUICK = ["--quick", "--devices", "2"]


@pytest.fixture
def example(monkeypatch):
    """A function that imports a file of examples/."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(str(sys.modules[name].__file__)).parent == EXAMPLES:
            del sys.modules[name]


@pytest.mark.slow
def test_a_quick_run_writes_its_numbers(example, tmp_path, capsys):
    bench = example("bench_multigpu")
    assert bench.main([*QUICK, "--only", "layouts,scaling", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "numbers.json").read_text())
    assert {row["layout"] for row in found["results"]["layouts"]} == {"naive ring", "zigzag ring", "zigzag all-gather"}
    rows = {row["case"]: row for row in found["results"]["scaling"]}
    assert rows["64 tokens a GPU, cp 1"]["% of ideal"] == 1.0
    assert rows["128 tokens, cp 2"]["both ms"] == rows["64 tokens a GPU, cp 2"]["both ms"]
    assert "2 x cpu" in capsys.readouterr().out


@pytest.mark.slow
def test_the_check_notices_a_ring_that_is_wrong(example, monkeypatch):
    bench = example("bench_multigpu")
    heads = {"qwen": bench.MODELS["qwen"]._replace(heads=2, kv_heads=1, dim=16, out_dim=16)}
    parts = bench.Bench(2, 128, 128, heads, bench.Clock(1, 1, 0.0, 64), None)
    assert {row["verdict"] for row in parts.check()} == {"ok"}
    real = bench.zigzag_attention
    spoilt = lambda *args, **rest: real(*args, **rest) * (1.01 if rest["mesh"].size > 1 else 1.0)
    monkeypatch.setattr(bench, "zigzag_attention", spoilt)
    assert all(row["verdict"].startswith("FAIL") for row in parts.check())


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--only", "speed"], "--only must be of"), (["--devices", "1"], "")]
)
def test_mistakes(example, arguments, message, capsys):
    bench = example("bench_multigpu")
    try:
        status = bench.main(arguments)
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert (message or f"must be 2 to {len(jax.devices())}") in capsys.readouterr().err


def test_exposed_communication(example):
    trace = example("read_trace")
    events = [
        trace.Event("flash_fwd", 0.0, 100.0),
        trace.Event("ncclDevKernel_SendRecv(args)", 20.0, 130.0),  # 30 us stand alone, 10 of them beside ...
        trace.Event("fusion.3", 120.0, 125.0),  # ... a small kernel of 5
        trace.Event("MemcpyP2P", 150.0, 160.0),
        trace.Event("flash_bwd", 155.0, 200.0),
    ]
    row = trace.summary(events)
    assert row["transfers"] == 2
    expected = {"trace": 0.2, "kernels": 0.15, "communication": 0.12, "exposed": 0.03, "idle": 0.02}
    for name, ms in expected.items():
        assert row[f"{name} ms"] == pytest.approx(ms)
    assert trace.summary([])["trace ms"] == 0.0
    assert not trace.Event("MemcpyD2D", 0.0, 1.0).moves_data  # inside one GPU
    lines = trace.busiest([*events, trace.Event("flash_fwd", 300.0, 350.0)], count=2).splitlines()
    assert [line.split() for line in lines] == [
        ["0.15", "ms", "2", "x", "flash_fwd"],
        ["0.11", "ms", "1", "x", "ncclDevKernel_SendRecv(args)"],
    ]


def test_a_folder_without_a_gpu_trace_is_said_so(example, tmp_path, capsys):
    trace = example("read_trace")
    with pytest.raises(SystemExit):
        trace.main([str(tmp_path)])
    assert "must hold a trace" in capsys.readouterr().err
    with jax.profiler.trace(str(tmp_path)):
        jnp.ones(3).sum().block_until_ready()
    with pytest.raises(SystemExit):
        trace.main([str(tmp_path)])
    assert "trace of a GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_a_slice_of_a_model_runs(example, tmp_path, capsys):
    bench = example("bench_slice")
    assert bench.main(["--quick", "--json", str(tmp_path / "slice.json")]) == 0
    results = json.loads((tmp_path / "slice.json").read_text())["results"]
    assert results["gradient"]["loss"] == pytest.approx(results["step"]["loss"], rel=1e-5)
    with pytest.raises(SystemExit):
        bench.main(["--layers", "49"])
    assert "--layers must be 1 to 48" in capsys.readouterr().err
