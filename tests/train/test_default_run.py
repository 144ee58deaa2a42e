"""What `make train` promises a newcomer: its model learns, and in the end more than which word follows which."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("steps", "below_unigram", "below_bigram"),
    [
        pytest.param(70, 0.25, None, marks=pytest.mark.slow),  # measured: 0.4 (two cores, 2026-11-30)
        pytest.param(400, 1.5, 0.1, marks=pytest.mark.byhand),  # the default: 2.1 and 0.26 (docs/benchmarks.md)
    ],
)
def test_the_default_run_learns(tmp_path: Path, steps: int, below_unigram: float, below_bigram: float | None):
    command = [sys.executable, "-m", "zigzag_jax.train", "--out", str(tmp_path), "--steps", str(steps)]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # it mostly computes
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1400, env=env)
    found = re.search(r"held-out loss ([\d.]+) .*unigram model ([\d.]+), bigram model ([\d.]+)", done.stdout)
    assert found
    held_out, unigram, bigram = map(float, found.groups())
    assert held_out < unigram - below_unigram
    assert below_bigram is None or held_out < bigram - below_bigram
