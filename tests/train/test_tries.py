"""Starts that lead nowhere are stopped, by the command and in the templates that use it."""

import errno
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from votes import alone

from zigzag_jax.train.errors import MachineError, UserError
from zigzag_jax.train.lock import sole_run
from zigzag_jax.train.tries import FILE, TriesConfig, check_start, main

ROOT = Path(__file__).parents[2]


def save(out: Path, step: int) -> None:
    (out / "checkpoints" / str(step)).mkdir(parents=True)


def start(out: Path, restart: int, most: int = 2) -> str:
    return check_start(TriesConfig(out, restart, most), pauses=())


def test_starts_are_counted_until_a_newer_checkpoint(tmp_path: Path):
    assert start(tmp_path / "run", 0) == "start 1 of this job: there is no checkpoint yet"
    out = tmp_path / "run"
    assert start(out, 1) == "start 2 of this job: there is no checkpoint yet, as 1 starts before"
    save(out, 5)
    assert start(out, 2) == "start 3 of this job: the newest checkpoint is of step 5"
    assert start(out, 3).endswith("of step 5, as 1 starts before")
    (out / "checkpoints" / "5").rename(out / "checkpoints" / "5.corrupt")
    save(out, 4)  # what was damaged is no progress
    rule = r"^out: must hold a newer checkpoint after 2 starts \(the newest checkpoint is of step 4\): .*, got .*/run$"
    for restart in (4, 5):
        with pytest.raises(UserError, match=rule):
            start(out, restart)
    assert len((out / FILE).read_text().splitlines()) == 4
    assert start(out, 0) == "start 1 of this job: the newest checkpoint is of step 4"  # a person begins anew
    assert len((out / FILE).read_text().splitlines()) == 1


def test_the_starts_of_a_run_are_kept_while_it_has_its_folder(tmp_path: Path):
    start(tmp_path, 0)
    start(tmp_path, 1)
    before = (tmp_path / FILE).read_bytes()
    with sole_run(tmp_path, alone(), print):
        assert re.fullmatch(
            rf"{tmp_path} is in use by process \d+ of .*, whose starts are counted on", start(tmp_path, 0)
        )
        assert (tmp_path / FILE).read_bytes() == before
        assert start(tmp_path, 2, 3).startswith("start 3 of this job")
    assert start(tmp_path, 0).startswith("start 1 of this job")


def test_a_run_that_is_about_to_end_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = ["process 3 of a", "process 3 of a", None]
    monkeypatch.setattr("zigzag_jax.train.tries.user_of", lambda folder: found.pop(0))
    assert check_start(TriesConfig(tmp_path), pauses=(0, 0, 0)).startswith("start 1 of this job")
    assert found == []


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        (TriesConfig(Path("x"), restart=-1), r"^restart: must be >= 0, got -1"),
        (TriesConfig(Path("x"), most=0), r"^most: must be >= 1, got 0"),
        (
            TriesConfig(Path("/proc/zigzag")),
            r"^out: must be a folder that can be written \(No such file or directory\)",
        ),
    ],
)
def test_mistakes(config: TriesConfig, rule: str):
    with pytest.raises(UserError, match=rule):
        check_start(config)


def test_a_file_that_somebody_wrote_in(tmp_path: Path):
    (tmp_path / FILE).write_text("x\n")
    with pytest.raises(
        UserError, match=r'^out: starts.jsonl must have an object with a "step" a line; delete it, got '
    ):
        start(tmp_path, 1)


def test_storage_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    failing, replace = [OSError(errno.ESTALE, "Stale file handle")] * 2, os.replace

    def act(part: Path, path: Path) -> None:
        if failing:
            raise failing.pop()
        replace(part, path)

    monkeypatch.setattr(os, "replace", act)
    assert check_start(TriesConfig(tmp_path), pauses=(0.0, 0.0)).startswith("start 1")
    failing += [OSError(errno.ESTALE, "Stale file handle")] * 3
    with pytest.raises(MachineError, match=r": Stale file handle, tried for 0 s$"):
        check_start(TriesConfig(tmp_path), pauses=(0.0, 0.0))


def test_the_command_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "start 1 of this job: there is no checkpoint yet\n"
    assert main(["--out", str(tmp_path), "--restart", "1", "--most", "1"]) == 2
    assert capsys.readouterr().err.startswith("error: out: must hold a newer checkpoint after 1 starts")


PYTHON = """#!/bin/sh
if [ "$2" = zigzag_jax.train.tries ]; then shift 2; echo "$*" > "$RUN.tries"; exit ${TRIES:-0}; fi
echo "train: $*"; exit $CODE
"""


class Job:
    """Runs what a template runs; its `python` notes the flags of tries, whose exit code it is given."""

    def __init__(self, place: Path, *line: str | Path) -> None:
        self.line, self.noted = line, place / "run.tries"
        (place / "bin").mkdir()
        scripts = {
            "python": PYTHON,
            "srun": '#!/bin/sh\nshift; exec "$@"\n',
            "scontrol": '#!/bin/sh\necho "scontrol: $*"\n',
        }
        for name, text in scripts.items():
            (place / "bin" / name).write_text(text)
            (place / "bin" / name).chmod(0o755)
        self.env = {"PATH": f"{place / 'bin'}:{os.environ['PATH']}", "RUN": str(place / "run")}

    def __call__(self, **env: int) -> tuple[int, list[str]]:
        """(exit code, lines); `env`: CODE of the trainer, TRIES of tries, and what a scheduler sets."""
        self.noted.unlink(missing_ok=True)
        all_ = self.env | {name: str(value) for name, value in env.items()}
        done = subprocess.run(self.line, env=all_, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout.splitlines()

    def tries(self) -> int:
        """The exit code that the flags noted last have in truth."""
        return main(self.noted.read_text().split())


@pytest.mark.source
def test_the_template_for_slurm(tmp_path: Path):
    text = (ROOT / "examples" / "slurm.sbatch").read_text().replace("OUT=/shared/runs/$SLURM_JOB_NAME", 'OUT="$RUN"')
    assert 'OUT="$RUN"' in text
    (tmp_path / "script").write_text(text)
    job, requeued = Job(tmp_path, "bash", tmp_path / "script"), "scontrol: requeue 77"
    for code, again in {0: False, 1: False, 2: False, 130: False, 70: True, 75: True, 137: True}.items():
        got, lines = job(CODE=code, SLURM_JOB_ID=77)
        assert got == code
        assert lines[0].startswith(f"train: -m zigzag_jax.train --out {tmp_path / 'run'} --model ")
        assert lines[1:] == [requeued] * again
    assert job(CODE=70, TRIES=2, SLURM_JOB_ID=77, SLURM_RESTART_COUNT=3) == (2, [])  # ends, and is not queued again
    assert job(CODE=0, TRIES=70, SLURM_JOB_ID=77, SLURM_RESTART_COUNT=3) == (70, [requeued])  # storage was away
    job(CODE=70, SLURM_JOB_ID=77)
    codes = [job.tries()]
    for restart in range(1, 7):
        job(CODE=70, SLURM_JOB_ID=77, SLURM_RESTART_COUNT=restart)
        codes.append(job.tries())
    assert codes == [0] * 5 + [2] * 2


@pytest.mark.source
def test_the_template_for_jobset(tmp_path: Path):
    text = (ROOT / "examples" / "jobset.yaml").read_text().replace("/shared/runs/zigzag", str(tmp_path / "run"))
    replicated = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = replicated["template"]["spec"]["containers"]
    assert {"RESTART", "JAX_NUM_PROCESSES", "JAX_COORDINATOR_ADDRESS"} <= {x["name"] for x in container["env"]}
    pod = Job(tmp_path, *container["command"], *container["args"])
    for index in (0, 1):
        code, (line,) = pod(CODE=70, JOB_COMPLETION_INDEX=index, RESTART=0)
        assert code == 70
        assert line.startswith(f"train: -m zigzag_jax.train --out {tmp_path / 'run'} --model ")
        assert pod.noted.exists() == (index == 0)  # one pod counts for all
    assert pod(CODE=0, TRIES=2, JOB_COMPLETION_INDEX=0, RESTART=1) == (2, [])
    assert replicated["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [1, 2, 130]
    codes = []
    for restart in range(6):
        pod(CODE=70, JOB_COMPLETION_INDEX=0, RESTART=restart)
        codes.append(pod.tries())
    assert codes == [0] * 5 + [2]
