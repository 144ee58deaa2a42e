"""scripts/check_gpu without a GPU: a `python` that only writes down its arguments, and whether they would be taken."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

pytestmark = pytest.mark.source
ROOT = Path(__file__).parent.parent
RECORD = """#!{python} -IS
import json, os, sys
with open(os.environ["ASKED"], "a") as file:
    file.write(json.dumps([*sys.argv[1:], os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")]) + "\\n")
sys.exit(3 if "--ring" in sys.argv else int("-c" in sys.argv and not {several}))
"""


def check_gpu(folder: Path, several: bool, **settings: str) -> tuple[int, str, list[list[str]]]:
    """(exit status, screen, what was asked) of a run on one card, or on several."""
    python, asked = folder / "python", folder / "asked"
    python.write_text(RECORD.format(python=sys.executable, several=several))
    python.chmod(0o755)
    asked.write_text("")
    settings |= {"PYTHON": str(python), "ASKED": str(asked)}
    done = subprocess.run(
        [str(ROOT / "scripts" / "check_gpu"), str(folder / "out")],
        env=os.environ | settings, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, [json.loads(line) for line in asked.read_text().splitlines()]


def test_every_part_is_asked_for_and_would_be_taken(tmp_path, monkeypatch):
    status, screen, (_, *asked) = check_gpu(tmp_path, True)
    assert status == 1
    assert [line.split()[0] for line in screen.splitlines() if "exit 0" not in line] == ["attention-ring"]
    assert len(screen.splitlines()) == len(asked)
    scripts = [Path(words[0]).stem for words in asked if words[0].startswith("examples/")]
    assert scripts[:4] == ["bench_multigpu", "read_trace", "bench_attention", "bench_attention"]
    assert {"bench_slice", "bench_experts", "kernel_times"} < set(scripts)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # kernel_times takes no other
    measure = ("examples/bench_", "examples/kernel_times")
    for script, *flags, _ in (words for words in asked if words[0].startswith(measure)):
        assert importlib.import_module(Path(script).stem).parse(flags).out == tmp_path / "out"
    slices = [words for words in asked if "bench_slice" in words[0]]
    assert [words[-1] for words in slices] == [".95"] * 2
    assert [words[0] for words in check_gpu(tmp_path, False)[2]].count("examples/bench_multigpu.py") == 0


def test_what_there_is_no_time_for_is_said_and_fails(tmp_path):
    status, screen, asked = check_gpu(tmp_path, False, BUDGET="5")
    assert status == 1
    assert all(line.endswith("not run: no time is left") for line in screen.splitlines())
    assert len(asked) == 1  # how many cards there are
