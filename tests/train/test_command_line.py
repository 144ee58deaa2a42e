"""The trainer as a process: it learns, a kill -9 costs nothing, a mistake gets one line and exit code 2."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from programs import shared_programs

from zigzag_jax.models.hf.files import Folder
from zigzag_jax.models.hf.run_folder import Parameters
from zigzag_jax.models.hf.saved import export_model
from zigzag_jax.train.hosts.together import Together
from zigzag_jax.train.lock import sole_run

FLAGS = ["--dtype", "float32", "--seq-len", "64", "--batch", "4", "--save-every", "3", "--seed", "7", "--steps", "9"]
FLAGS += ["--mesh.cp", "2", "--mesh.dp", "2"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    lines = (f"Line {n}: a ring is a line that comes home after {n % 7} hops.\n" for n in range(3000))
    (folder / "a.txt").write_text("".join(lines))
    return folder


def command(out: Path, corpus: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "zigzag_jax.train", "--out", str(out), "--data", str(corpus), *FLAGS, *more]


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory):
    """Of tokens, and of the programs that one process after the other compiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZIGZAG_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name, value in shared_programs(tmp_path_factory.mktemp("programs")).items():
            patch.setenv(name, value)
        yield


def run(out: Path, corpus: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(out, corpus, *more), capture_output=True, text=True, timeout=400, check=False)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines(out) if "loss" in line}


@pytest.fixture(scope="module")
def calm(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that nobody disturbed, and what it printed."""
    out = tmp_path_factory.mktemp("calm")
    done = run(out, corpus)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_a_run_learns_and_reports(calm: tuple[Path, str]):
    out, printed = calm
    assert sorted(losses(out)) == list(range(1, 10))
    assert losses(out)[9] < losses(out)[1]
    assert lines(out)[0] == {"devices": 4, "mesh": {"dp": 2, "fsdp": 1, "cp": 2}, "resumed_from": None}
    for words in ("tokens/s", "held-out loss", "unigram", "bigram", "the model goes on", "resumes from step 9"):
        assert words in printed
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (out / "checkpoints").iterdir() if p.name.isdigit()) == ["3", "6", "9"]
    origin = json.loads((out / "checkpoints" / "9" / "origin" / "metadata").read_text())
    assert origin["seq-len"] == "64"
    assert "--seq-len 64" in origin["command"]
    assert {"git revision", "code of zigzag_jax", "version of jax", "data"} <= origin.keys()


@pytest.mark.slow
def test_an_exported_run_is_trained_further(calm: tuple[Path, str], corpus: Path, tmp_path: Path):
    """Export, read again, train: the tokenizer travels with the weights, which are those of the checkpoint."""
    out, made = calm[0], tmp_path / "hf"
    export_model(out, made)
    values = json.loads((made / "config.json").read_text())
    assert (values["model_type"], values["torch_dtype"]) == ("qwen3_moe", "float32")
    state = Parameters(out / "checkpoints" / "9")
    assert len(list(state)) == len(state) > 0
    want = state["embedding.table"][:]
    np.testing.assert_array_equal(Folder(made)["model.embed_tokens.weight"], want)
    done = run(tmp_path / "on", corpus, "--model", str(made), "--steps", "1", "--optim.warmup", "0")
    assert done.returncode == 0, done.stderr
    # the batch is that of the first run's first step, and the model has seen nine
    assert losses(tmp_path / "on")[1] < losses(out)[9] + 0.5 * (losses(out)[1] - losses(out)[9])


@pytest.mark.slow
def test_killed_and_resumed_is_bit_for_bit_the_undisturbed_run(calm: tuple[Path, str], corpus: Path, tmp_path: Path):
    process = subprocess.Popen(command(tmp_path, corpus), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if (tmp_path / "metrics.jsonl").exists() and '"step": 5' in (tmp_path / "metrics.jsonl").read_text():
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was to be killed before its end"
    done = run(tmp_path, corpus)
    assert done.returncode == 0, done.stderr
    assert lines(tmp_path)[-1]["step"] == 9
    assert [line["resumed_from"] for line in lines(tmp_path) if "resumed_from" in line] in ([None, 3], [None, 6])
    assert losses(tmp_path) == losses(calm[0])


@pytest.mark.slow
def test_muon_in_micro_batches_traced(corpus: Path, tmp_path: Path):
    """One run that uses all of it, and writes every number."""
    flags = ["--optim.name", "muon", "--optim.schedule", "wsd", "--optim.warmup", "0", "--optim.z-loss", "1e-4"]
    flags += ["--optim.groups", "embedding.*=0.5", "*.route=1,0"]
    done = run(tmp_path, corpus, *flags, "--accumulate", "2", "--steps", "2", "--profile", "2")
    assert done.returncode == 0, done.stderr
    assert "aux loss hf counts experts" in done.stdout
    assert f"trace written to {tmp_path / 'profile'}" in done.stdout
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert re.search(r"\nattention +(\d+\.\d{3} +){2,3}", done.stdout)  # its time, forward and backward
    assert re.search(r"\nof a step a device computed for \d+\.\d{3} ms, moved data only for \d", done.stdout)
    numbers = {"step", "loss", "aux_loss", "z_loss", "grad_norm", "learning_rate", "expert_load", "tokens_per_second"}
    numbers |= {"dead_experts"}
    numbers |= {"tokens_per_second_per_device", "time_data", "time_compute", "time_wait"}
    steps = [line for line in lines(tmp_path) if "loss" in line]
    by_layer = {"expert_load_by_layer", "dead_experts_by_layer"}
    # a CPU says neither memory nor what it can do
    assert [line.keys() for line in steps] == [numbers | by_layer, numbers]
    assert max(steps[0]["expert_load_by_layer"].values()) == pytest.approx(steps[0]["expert_load"], abs=1e-4)
    assert losses(tmp_path)[2] < losses(tmp_path)[1]


@pytest.mark.system
def test_sigterm_during_the_report_skips_what_is_left_of_it(calm: tuple[Path, str], corpus: Path):
    out, _ = calm
    with subprocess.Popen(command(out, corpus), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "resumed at step 9: finished" in line:
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stdout.read()
    assert process.returncode == 75, rest
    assert "SIGTERM: the weights are saved after step 9. The same command again writes the report." in rest
    assert "the model goes on" not in rest


CRASH = """
import ctypes, sys
from zigzag_jax.train import __main__ as command

def crash(config):
    ctypes.PyDLL(None).strlen(None)  # no other thread runs meanwhile, so that all stacks can be told

command.run = crash
sys.exit(command.main([]))  # as the scripts in examples/ do
"""


@pytest.mark.system
def test_a_crash_inside_a_library_leaves_stacks():
    done = subprocess.run([sys.executable, "-c", CRASH], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGSEGV, done.stderr
    assert done.stderr.startswith("Fatal Python error: Segmentation fault\n")
    assert "in crash" in done.stderr


@pytest.mark.system
def test_a_finished_run_says_so_and_another_run_is_refused(calm: tuple[Path, str], corpus: Path, tmp_path: Path):
    out, _ = calm
    again = run(out, corpus)
    assert again.returncode == 0
    assert "resumed at step 9: finished" in again.stdout
    assert "held-out loss" in again.stdout
    other = run(out, corpus, "--seq-len", "32")
    assert other.returncode == 2
    assert other.stderr.strip().splitlines()[-1].startswith("error: seq-len: must stay")
    assert "64" in other.stderr
    assert "got 32" in other.stderr
    assert "Traceback" not in other.stderr
    dates = lambda: {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with sole_run(out, Together(), print):  # as a run that is at it
        before, second, after = dates(), run(out, corpus), dates()
    assert second.returncode == 2
    said = f"error: out: must be the folder of one run at a time (it is in use by process {os.getpid()} of "
    assert second.stderr.strip().splitlines()[-1].startswith(said)
    assert after == before
    kept = (out / "tokenizer.json").read_bytes()
    (tmp_path / "other.json").write_bytes(kept.replace(b'"end_of_word_suffix": null', b'"end_of_word_suffix": "x"'))
    assert (tmp_path / "other.json").read_bytes() != kept
    other = run(out, corpus, "--tokenizer", str(tmp_path / "other.json"))
    assert other.returncode == 2
    assert other.stderr.strip().splitlines()[-1].startswith("error: ")
    assert (out / "tokenizer.json").read_bytes() == kept  # a run that is refused writes nothing


MISTAKES = {
    "error: steps: must be >= 1, got -1": ("--steps", "-1"),
    "error: model: must be one of": ("--model", "none"),
    "error: mesh.ep: must be 1, cp, fsdp or fsdp * cp = 1, 2, 1 or 2, got 4": ("--mesh.ep", "4"),
    "error: batch: must be divisible by accumulate * dp * fsdp = 3 * 2 * 1 = 6, got 4": ("--accumulate", "3"),
    "error: optim.groups: must fit a name that no earlier group took, of embedding.": ("--optim.groups", "heads=1"),
    "--no-such-flag": ("--no-such-flag", "1"),
    "error: out: must be a folder that can be written": ("--out", "/proc/zigzag"),
}
ONE_BY_ONE = """
import json, sys
from zigzag_jax.train.__main__ import main

for words in json.loads(sys.argv[1]):
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    print(f"\\nended with {code}", file=sys.stderr, flush=True)
"""


def test_a_mistake_is_one_line_and_exit_code_2(corpus: Path, tmp_path: Path):
    """One process for all, which starts once."""
    words = [command(tmp_path, corpus, *flags)[3:] for flags in MISTAKES.values()]
    started = [sys.executable, "-c", ONE_BY_ONE, json.dumps(words)]
    done = subprocess.run(started, capture_output=True, text=True, timeout=400, check=False)
    *each, rest = done.stderr.split("\nended with 2\n")
    assert (len(each), rest) == (len(MISTAKES), ""), done.stderr
    for said, message in zip(each, MISTAKES, strict=True):
        assert message in said
    assert "Traceback" not in done.stderr


def test_dry_run_builds_nothing(corpus: Path, tmp_path: Path):
    done = run(tmp_path / "out", corpus, "--dry-run", "--model", "qwen3-30b-a3b")
    assert done.returncode == 0, done.stderr
    assert "hops of" in done.stdout
    assert not (tmp_path / "out").exists()
