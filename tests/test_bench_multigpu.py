"""Benchmarks of rings on several devices and of slices: that they run, count right and notice what is wrong."""

import json

import bench_layer
import bench_multigpu
import bench_slice
import jax
import jax.numpy as jnp
import pytest
from bench import Report
from bench_gpus import TRACED, Bench
from bench_inputs import Heads
from bench_model import Slice
from clock import Clock
from test_read_trace import RING, plane, write
from trace_events import read

from zigzag_jax.kernels import FLASH
from zigzag_jax.models import moe
from zigzag_jax.models.sharding import abstract_state, init_state

pytestmark = pytest.mark.source
QUICK = ["--quick", "--devices", "2"]
SMALL = Bench(2, 128, 128, {"qwen": Heads(2, 1, 16, 16)}, Clock(1, 1, 0.0, jax.block_until_ready), None)


@pytest.mark.slow
def test_a_quick_run_writes_its_numbers(tmp_path, capsys):
    assert bench_multigpu.main([*QUICK, "--only", "times", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "multigpu.json").read_text())
    assert {(row["model"], row["form"]) for row in found["results"]["check"]} == {
        ("qwen", form) for form in ("plain", "window", "remat", "contiguous", "allgather")
    }  # the heads that are timed
    assert {row["layout"] for row in found["results"]["layouts"]} == {"naive ring", "zigzag ring", "zigzag all-gather"}
    rows = {row["case"]: row for row in found["results"]["scaling"]}
    assert rows["64 tokens a GPU, cp 1"]["% of ideal"] == 1.0
    assert rows["128 tokens, cp 2"]["both ms"] == rows["64 tokens a GPU, cp 2"]["both ms"]
    assert "2 devices" in capsys.readouterr().out
    assert (tmp_path / "multigpu.png").stat().st_size > 10_000


@pytest.mark.slow
def test_nothing_is_timed_where_a_ring_is_wrong(monkeypatch, capsys):
    real = bench_layer.zigzag_attention
    spoilt = lambda *args, **rest: real(*args, **rest) * (1.01 if rest["mesh"].size > 1 else 1.0)
    monkeypatch.setattr(bench_layer, "zigzag_attention", spoilt)
    monkeypatch.setattr(bench_multigpu, "MODELS", {"qwen": Heads(8, 8, 16, 16), "mla": Heads(8, 8, 16, 16)})
    monkeypatch.setattr(Bench, "timed", lambda self, cases: pytest.fail("timed"))
    assert bench_multigpu.main([*QUICK, "--only", "times"]) == 1
    assert "Not timed, for it is wrong: qwen" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "speed"], "--only must be of"),
        (["--devices", "1"], ""),
        (["--devices", "4", "--ep", "2"], "--ep: must be 1 or the GPUs of the ring = 4, got 2"),
    ],
)
def test_mistakes(arguments, message, capsys):
    try:
        status = bench_multigpu.main(arguments)
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert (message or f"must be 2 to {len(jax.devices())}") in capsys.readouterr().err


def test_the_trace_is_told_by_hops_and_steps(tmp_path, monkeypatch, capsys):
    late = [plane("/device:GPU:0", RING), plane("/device:GPU:1", RING, 5.0)]
    gpus = read(write(tmp_path / "trace", "\n".join(late)))
    monkeypatch.setattr(Bench, "trace", lambda self: gpus)
    report = Report("bench_multigpu", [], tmp_path)
    bench_multigpu.tell_trace(report, SMALL)
    rows = {row["GPU"]: row for row in report.results["trace"]}
    assert (rows["GPU:1"]["transfers"], rows["GPU:1"]["flights"]) == (3, 2)
    assert rows["GPU:0"]["exposed us a hop"] == pytest.approx(60 / (TRACED * 3))
    assert rows["GPU:0"]["exposed %"] == pytest.approx(60 / 1720)
    assert [row["steps"] for row in report.results["trace steps"]] == [2, 2]
    assert (tmp_path / "trace.png").stat().st_size > 5000
    assert "exposed us a hop" in capsys.readouterr().out


@pytest.mark.slow
def test_a_slice_of_a_model_runs(tmp_path, monkeypatch, capsys):
    beside = [{"by": "transformers", "pass": "gradient", "ms": 1.0, "tokens/s": 2.0, "MFU": 0.5, "peak GiB": 1.0,
               "loss": 1.0, "tokens/s / peer": None}]  # fmt: skip
    monkeypatch.setattr(bench_slice, "peer", lambda args: beside)
    traced = ["--remat", "matmuls", "--profile", str(tmp_path / "trace")]
    assert bench_slice.main(["--quick", "--peer", "--out", str(tmp_path), *traced]) == 0
    scopes = {line.split()[0] for line in capsys.readouterr().out.partition("by named scope")[2].splitlines() if line}
    assert scopes >= {"attention", "mlp/experts", "mlp/router", "loss", "optimizer"}
    results = json.loads((tmp_path / "slice-tiny-qwen3-moe.json").read_text())["results"]
    assert [(row["by"], row["verdict"]) for row in results["check"]] == [("zigzag_jax", "ok")]
    peer, gradient, step = results["slice"]
    assert peer["by"] == "transformers"
    assert [gradient["pass"], step["pass"]] == ["gradient", "step"]
    assert gradient["tokens/s / peer"] == gradient["tokens/s"] / 2.0
    assert step["tokens/s / peer"] is None
    assert step["peak GiB"] is None  # of a CPU nothing is known
    assert gradient["loss"] == pytest.approx(step["loss"], rel=1e-5)


def test_slices_of_several_gpus():
    slices = bench_multigpu.sliced(SMALL._replace(quick=True, remat="matmuls", ep=2))
    assert {title: this.options.payload for title, this in slices.items()} == {
        "2 layers of tiny-qwen3-moe": None,
        "2 layers of tiny-deepseek-v2, latent": "latent",
        "2 layers of tiny-deepseek-v2, expanded": "expanded",
    }
    assert {(this.cp, this.remat, this.sharding.expert_axes) for this in slices.values()} == {(2, "matmuls", ("cp",))}


@pytest.mark.slow
def test_a_slice_whose_experts_are_shared_out_trains(capsys):
    assert bench_slice.main(["--quick", "--cp", "2", "--ep", "2", "--only", "step"]) == 0
    assert "| step " in capsys.readouterr().out


@pytest.mark.slow
def test_shared_experts_that_are_wrong_are_found(monkeypatch):
    this = Slice.of("tiny-qwen3-moe", 1, "none", 2, 2)
    params = init_state(this.make, this.sharding, jax.random.key(0))[1]
    assert this.sharding.expert_axes == ("cp",)
    real = moe.exchanged_experts
    monkeypatch.setattr(moe, "exchanged_experts", lambda *args: real(*args) * 2.0)
    assert this.check(params, 64)[0]["verdict"].startswith("FAIL worst gradient")


@pytest.mark.slow
def test_a_slice_that_is_wrong_is_not_timed(monkeypatch, capsys):
    real = FLASH["reference"]

    def bwd(*args):
        dq, dk, dv = real.bwd(*args)
        return dq, dk, dv * (2.0 if args[0].dtype != "float32" else 1.0)

    monkeypatch.setitem(FLASH, "reference", real._replace(bwd=bwd))
    monkeypatch.setattr(Clock, "in_turn", lambda self, calls: pytest.fail("timed"))
    assert bench_slice.main(["--quick", "--only", "gradient", "--remat", "none"]) == 1
    assert "FAIL worst gradient" in capsys.readouterr().out


@pytest.mark.parametrize("balanced", [False, True])
def test_a_balanced_slice_gives_all_experts_the_same_work(balanced):
    """A router of zeros has no reason to."""
    this = Slice.of("tiny-qwen3-moe", 2, "none", 4, balanced=balanced)
    task = this.task(jnp.float32)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract_state(this.make)[1])
    load = jax.jit(task.load, compiler_options={"xla_backend_optimization_level": 0})(params, this.batch(64))
    assert load.shape == (2, this.config.expert_count)
    level = 64 * this.config.num_experts_per_tok / this.config.expert_count
    assert bool((load == level).all()) == balanced


def test_a_peer_that_cannot_run_is_said_so(capsys):
    args = bench_slice.parse(["--peer", "--tokens", "4096"])
    assert bench_slice.peer(args) == []
    assert "transformers is not beside it: bench_transformers.py: error: needs " in capsys.readouterr().out


def test_mistakes_of_a_slice(capsys):
    for arguments, message in (
        (["--layers", "49"], "--layers must be 1 to 48"),
        (["--tokens", "3"], "--tokens must be a multiple of 2 * cp = 2"),
        (["--cp", "2", "--tokens", "258"], "--tokens must be a multiple of 2 * cp = 4"),
        (["--cp", "0"], "--cp must be 1 to"),
        (["--profile", "x", "--only", "gradient"], "--profile is of a step"),
        (["--cp", "4", "--ep", "2"], "--ep must be 1 or cp = 4, got 2"),
        (["--cp", "2", "--ep", "2", "--fused"], "--fused is of experts that lie whole on a GPU, got --ep 2"),
        (["--peer", "--cp", "2"], "--peer is one GPU's, got --cp 2"),
    ):
        with pytest.raises(SystemExit):
            bench_slice.main(arguments)
        assert message in capsys.readouterr().err
