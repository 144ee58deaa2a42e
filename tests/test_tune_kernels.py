"""The script that times variants of kernels: every call can be traced, what is wrong is noticed, what hangs is killed.

The kernels themselves need a GPU.
"""

import json
import runpy
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

pytestmark = pytest.mark.source
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def script(monkeypatch):
    """The script's names."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return runpy.run_path(str(EXAMPLES / "tune_kernels.py"))


@pytest.mark.parametrize("family", ["experts", "attention"])
def test_every_variant_is_traced_and_gives_what_today_gives(script, family):
    flat = lambda results: {key: [(a.shape, a.dtype) for a in jax.tree.leaves(x)] for key, x in results.items()}

    def run():
        work = script["FAMILIES"][family](True)
        return [{key: call() for key, call in calls.items()} for calls in (work.calls, work.truth)]

    calls, truth = map(flat, jax.eval_shape(run))
    today = {what: found for (what, variant), found in calls.items() if variant == "today"}
    assert len(calls) > 2 * len(truth) > 0
    for (what, _), found in calls.items():
        assert found == today[what]
    for what, found in truth.items():
        assert [shape for shape, _ in found] == [shape for shape, _ in today[what]]


def test_what_is_off_is_said_and_not_timed(script):
    one = jnp.ones((2, 3)).at[0, 0].set(-jnp.inf)  # a row that sees nothing has this lse
    give = lambda x: lambda: (one, x)
    calls = {
        ("a", "today"): give(one), ("a", "same"): give(one), ("a", "off"): give(one * 1.1),
        ("a", "nan"): give(one.at[1, 1].set(jnp.nan)), ("b", "today"): give(one), ("b", "same"): give(one),
    }  # fmt: skip
    work = script["Work"](calls, {"a": give(one), "b": give(one * 2)}, 1e-3)
    verdicts = lambda exact: {(r["what"], r["variant"]): r["verdict"] for r in script["check"](work, exact)}
    assert verdicts(False) == {key: "ok" for key in calls} | {
        ("a", "off"): "FAIL: 1.0e-01 from today",
        ("a", "nan"): "FAIL: nan from today",
    }
    assert verdicts(True)["b", "today"] == "FAIL: 5.0e-01 from float32"
    rows = script["check"](work, False)
    script["add_times"](rows, work, script["Clock"](1, 1, 0.0, jax.block_until_ready))
    assert [row["variant"] for row in rows if "ms" in row] == ["today", "same", "today", "same"]
    assert rows[0]["time / today"] == 1.0
    assert "FAIL: nan from today" in script["table"](script["full"]({"rows": rows}))


def test_what_hangs_is_killed(script, capsys):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"], stdout=subprocess.PIPE, text=True)
    assert script["finish"](process, "experts", "small", time.monotonic() + 0.1) is None
    assert process.returncode < 0
    assert capsys.readouterr().out == "experts, small: killed, it did not end in time\n"


@pytest.mark.parametrize("verdict", ["ok", "FAIL: nan from today"])
def test_a_model_s_size_is_run_where_the_small_one_is_right(script, monkeypatch, capsys, tmp_path, verdict):
    started = []

    def start(family, size):
        started.append((family, size))
        row = {"what": "a", "variant": "today", "verdict": verdict} | ({"ms": 1.0} if size == "large" else {})
        found = {"facts": {"card": "a card", "jax": "0", "date": "today"}, "rows": [row]}
        code = f"print('noise'); print({json.dumps(found)!r})"
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)

    names = script["main"].__globals__
    monkeypatch.setitem(names, "start", start)
    assert script["main"](["--json", str(tmp_path / "numbers.json")]) == int(verdict != "ok")
    small = [("experts", "small"), ("attention", "small")]
    assert started == small + ([("experts", "large"), ("attention", "large")] if verdict == "ok" else [])
    said = capsys.readouterr().out
    assert ("not run at a model's size" in said) == (verdict != "ok")
    assert verdict in said
    assert len(json.loads((tmp_path / "numbers.json").read_text())) == len(started)


def test_without_a_hopper_gpu_it_says_so(script, capsys):
    assert script["main"](["--child", "experts", "small"]) == 2
    assert "needs a Hopper GPU, got cpu" in capsys.readouterr().err
