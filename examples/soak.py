"""Train while something kills the run again and again, and compare with a run that nobody touched.

    python examples/soak.py                                 # some 30 minutes on two CPU cores, a kill every 20 to 60 s
    python examples/soak.py --steps 10 --kill-after .3 1.5  # a minute or two: what `make check` does
    python examples/soak.py -- --model tiny-deepseek-v2 --mesh.fsdp 2 --mesh.cp 2 --dtype bfloat16   # any flags

The same command is started until it finishes. Each start is killed after a random number of seconds: by SIGKILL, or
every third by SIGTERM, after which it must save and end with exit code 75. It may be hit before its first step; then
the next start is let come to a step, so that a slow machine gets to the end too. Every loss must be the one of the calm
run, bit for bit: also those of steps that were trained twice.

Exit code 0: they are the same. 1: a loss differs, a start failed, or nothing was ever killed.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

FLAGS = ["--seq-len", "256", "--batch", "4", "--mesh.cp", "2", "--save-every", "5", "--eval-every", "1000000"]
PREEMPTED = 75  # docs/hosts.md


def losses(out: Path) -> Iterator[tuple[int, float]]:
    """(step, loss) of every training line, those of steps that were trained again included."""
    path = out / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.endswith("}") and "loss" in (values := json.loads(line)):
            yield values["step"], values["loss"]


def saved(out: Path) -> list[int]:
    """Steps of the checkpoints that are whole."""
    return sorted(int(path.name) for path in (out / "checkpoints").glob("*") if path.name.isdigit())


def newest(out: Path) -> int:
    """The newest step that was trained."""
    return max(dict(losses(out)), default=0)


def start(out: Path, steps: int, flags: list[str]) -> subprocess.Popen:
    """Start or resume the run."""
    command = [sys.executable, "-m", "zigzag_jax.train", "--out", str(out), "--steps", str(steps), *FLAGS, *flags]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=(out.parent / f"{out.name}.err").open("a"))


def main() -> int:
    """Both runs; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=5000, help="optimiser steps of each run")
    parser.add_argument("--kill-after", type=float, nargs=2, default=(20, 60), metavar=("FROM", "TO"), help="seconds")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--out", type=Path, help="folder of both runs, empty or new; default: a temporary one")
    parser.add_argument("flags", nargs="*", help="after --: flags of python -m zigzag_jax.train")
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp(prefix="soak-"))
    out.mkdir(parents=True, exist_ok=True)
    calm, hit, draw = out / "calm", out / "hit", random.Random(args.seed)
    print(f"both runs lie in {out}\ncalm run of {args.steps} steps ..", flush=True)
    begin = time.monotonic()
    if code := start(calm, args.steps, args.flags).wait():
        print((out / "calm.err").read_text()[-2000:], f"\nthe calm run ended with exit code {code}")
        return 1
    print(f"calm run: {time.monotonic() - begin:.0f} s, loss {dict(losses(calm))[args.steps]:.4f}", flush=True)
    begin, kills, code, spare = time.monotonic(), 0, -1, False
    while code:
        wait, how = draw.uniform(*args.kill_after), signal.SIGTERM if kills % 3 == 2 else signal.SIGKILL
        before, run = newest(hit), start(hit, args.steps, args.flags)
        while spare and run.poll() is None and newest(hit) == before:
            time.sleep(0.1)
        try:
            code = run.wait(wait)
        except subprocess.TimeoutExpired:
            run.send_signal(how)
            code, kills = run.wait(), kills + 1
            spare = newest(hit) == before
            training = before < newest(hit) < args.steps  # after the last step all is saved and it writes its report
            if how == signal.SIGTERM and training and code and (code != PREEMPTED or saved(hit)[-1] != newest(hit)):
                print(f"SIGTERM after step {newest(hit)}: exit code {code}, checkpoints {saved(hit)}")
                print("in the middle of training it must save the newest step and end with exit code 75")
                return 1
            print(
                f"{time.monotonic() - begin:6.0f} s  {how.name} at step {newest(hit)}: exit code {code}, "
                f"checkpoints {saved(hit)}",
                flush=True,
            )
            code = PREEMPTED if code == -how else code  # before its first step and after its end nothing is heeded
        if code not in (0, PREEMPTED):
            print((out / "hit.err").read_text()[-2000:], f"\na start ended with exit code {code}")
            return 1
    want, got = dict(losses(calm)), list(losses(hit))
    wrong = [(step, loss) for step, loss in got if loss != want.get(step)]
    missing = want.keys() - dict(got).keys()
    print(
        f"{kills} kills in {time.monotonic() - begin:.0f} s; {len(got)} steps trained for {len(want)}; "
        f"{len(wrong)} losses differ, {len(missing)} are missing"
    )
    for step, loss in wrong[:5]:
        print(f"step {step}: {loss!r}, undisturbed {want.get(step)!r}")
    return int(bool(wrong or missing or not kills))


if __name__ == "__main__":
    sys.exit(main())
