"""The experts' benchmark: what it counts, that a quick run works on a CPU, and that a wrong result is noticed."""

import json
from pathlib import Path

import bench_experts
import bench_experts_layer
import jax
import jax.numpy as jnp
import pytest
from bench import ceiling
from bench_experts import SHAPES, Inputs, Shape
from clock import Clock

from zigzag_jax.kernels import GROUPED

pytestmark = pytest.mark.source


def run(tmp_path, *arguments) -> tuple[int, dict]:
    """(exit status, results) of one quick run of one shape."""
    status = bench_experts.main(["--quick", "--shapes", "qwen-gate", *arguments, "--out", str(tmp_path)])
    return status, json.loads((tmp_path / "experts.json").read_text())["results"]


def test_what_is_counted():
    gate = SHAPES["qwen-gate"]
    assert gate.flops("forward") == pytest.approx(206e9, rel=0.01)
    assert gate.flops("both") == 3 * gate.flops("forward")
    assert gate.bytes("forward") == pytest.approx(771e6, rel=0.01)
    for shape in SHAPES.values():
        sizes = shape.sizes()
        assert (len(sizes), sizes.sum()) == (shape.groups, shape.rows)
        assert sizes.std() > 0


def test_a_quick_run(tmp_path, capsys):
    status, results = run(tmp_path, "--dtype", "float32")
    assert status == 0
    assert [row["verdict"] for row in results["qwen-gate check"]] == ["ok"]
    rows = results["qwen-gate times"]
    assert [(row["by"], row["pass"]) for row in rows] == [
        ("reference", "forward"), ("reference", "both"), ("dense", "forward"), ("dense", "both"),
    ]  # fmt: skip
    assert all(row["ms"] > 0 and row["TF/s"] > 0 and row["% of matmul"] > 0 for row in rows)
    assert [row["time / dense"] for row in rows[2:]] == [1.0, 1.0]
    assert "512 rows, 8 groups, 128 -> 48" in capsys.readouterr().out


def test_a_result_that_falls_short_is_exit_status_1(tmp_path, monkeypatch):
    right = GROUPED["reference"]
    wrong = lambda *args, **kw: (1 + 2**-6) * right.outer(*args, **kw)
    monkeypatch.setitem(GROUPED, "wrong", right._replace(outer=wrong))
    status, results = run(tmp_path, "--implementations", "wrong")
    assert status == 1
    assert [row["verdict"] for row in results["qwen-gate check"]] == ["FAIL dw"]
    assert "qwen-gate times" not in results


def test_an_implementation_that_cannot_is_said_so(tmp_path, capsys):
    status, results = run(tmp_path, "--implementations", "mosaic")
    assert status == 1
    assert results["qwen-gate check"] == []
    assert "'mosaic' needs k and n that are multiples of 64" in capsys.readouterr().out


def test_torch_is_asked_in_a_process_of_its_own(monkeypatch):
    jobs = []

    def process(command, *, input, **_):
        jobs.append(json.loads(input))
        assert Path(command[1]).name == "bench_torch.py"
        assert Path(command[1]).exists()
        return type("Done", (), {"returncode": 0, "stdout": json.dumps({"forward": 2.0, "both": 4.0})})

    clock, shape = Clock(1, 1, 0.0, jax.block_until_ready), Shape(64, 2, 16, 16)
    x, most = Inputs.draw(shape, jnp.bfloat16), ceiling(True, jnp.bfloat16)
    assert all(row["time / torch"] is None for row in bench_experts.times(["reference"], shape, x, clock, most))
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("subprocess.run", process)
    rows = bench_experts.times(["reference"], shape, x, clock, most)
    assert jobs[0]["sizes"] == shape.sizes().tolist()
    assert [row["time / torch"] for row in rows if row["by"] == "torch"] == [1.0, 1.0]
    assert all(row["time / torch"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "gpt"], "--shapes must be of qwen-gate, qwen-down, deepseek, got gpt"),
        (["--implementations", "magic"], "--implementations must be of mosaic, triton, reference"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        bench_experts.main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_a_quick_run_of_a_whole_layer(tmp_path):
    assert bench_experts_layer.main(["--quick", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "experts_layer.json").read_text())["results"]
    assert [row["verdict"] for row in results["check"]] == ["ok"]
    assert {"y", "x", "gate", "up", "down", "route"} < results["check"][0].keys()
    assert [(row["by"], row["pass"]) for row in results["times"]] == [("zigzag_jax", "forward"), ("zigzag_jax", "both")]
    assert bench_experts_layer.QWEN.flops("both") == 3 * 6 * 65536 * 2048 * 768


def test_a_layer_that_is_wrong_is_not_timed(monkeypatch):
    right = GROUPED["reference"]

    def outer(left, *args, **kw):
        return right.outer(left, *args, **kw) * (1.0 if left.dtype == "float32" else 1.125)

    monkeypatch.setitem(GROUPED, "reference", right._replace(outer=outer))
    monkeypatch.setattr(Clock, "in_turn", lambda self, calls: pytest.fail("timed"))
    assert bench_experts_layer.main(["--quick"]) == 1
