"""A minute of what examples/soak.py does for half an hour."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from programs import shared_programs

pytestmark = [pytest.mark.slow, pytest.mark.source, pytest.mark.timeout(900)]
SCRIPT = Path(__file__).parents[2] / "examples" / "soak.py"


def test_a_run_that_is_killed_again_and_again_is_the_undisturbed_run(tmp_path: Path):
    flags = ["--seq-len", "64", "--batch", "2"]
    command = [sys.executable, str(SCRIPT), "--steps", "10", "--kill-after", "0.3", "1.5", "--out", str(tmp_path), "--"]
    environment = os.environ | shared_programs(tmp_path / "programs")  # more of the minute is training
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=850, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    kills = re.search(r"(\d+) kills", done.stdout)
    assert kills is not None
    assert int(kills[1]) >= 1
    assert "0 losses differ, 0 are missing" in done.stdout
