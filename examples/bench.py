"""What all benchmarks share: a result is checked before it is timed, and its rows become table, JSON and picture.

A script opens a `Report`, hands it the rows of its check, times only what the check lets pass, and hands over the rows
of its times. Each table is printed, and with --out DIR kept at once in DIR/NAME.json and DIR/NAME.png: a run that is
cut short leaves what it had. The times are clock.py's.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from bench_picture import Chart, Panel, draw
from clock import Clock


def flags(parser: argparse.ArgumentParser, *, quick: bool = True) -> None:
    """Adds what every benchmark takes: --out, and --quick where it can be small."""
    if quick:
        parser.add_argument("--quick", action="store_true", help="small and one sample: does it run at all?")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a folder for the numbers (JSON) and their picture")


def jax_clock(quick: bool) -> Clock:
    """Five samples of ten calls, 0.3 s of rest before each; or one call."""
    return Clock(1, 1, 0.0, jax.block_until_ready) if quick else Clock(5, 10, 0.3, jax.block_until_ready)


def ceiling(quick: bool, dtype):
    """A large matmul, the call whose rate is the most that this device does in `dtype`, and its FLOPs."""
    size = 256 if quick else 8192
    a = jax.random.normal(jax.random.key(1), (size, size), dtype)
    product = jax.jit(jnp.matmul)
    return lambda: product(a, a), 2 * size**3


def facts(script: str, argv: list[str] | None) -> dict[str, Any]:
    """What a benchmark's numbers are worth nothing without: the command, the hardware, the versions, the day."""
    device = jax.devices()[0]
    return {
        "command": shlex.join(["python", f"examples/{script}.py", *(sys.argv[1:] if argv is None else argv)]),
        "card": device.device_kind,
        "devices": jax.device_count(),
        "host": f"{os.cpu_count()} x {platform.machine()}, {platform.system()} {platform.release()}",
        "jax": jax.__version__,
        "versions": {
            "python": platform.python_version(),
            "jaxlib": importlib.metadata.version("jaxlib"),
            "platform": jax.extend.backend.get_backend().platform_version,
        },
        "flags": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(("XLA_", "NCCL_", "JAX_"))},
        "date": datetime.date.today().isoformat(),
    }


class Report:
    """The tables of one run; `status` is its exit status: 1 where something fell short, or nothing could be checked."""

    def __init__(self, script: str, argv: list[str] | None, out: Path | None, *, name: str = "", **more: Any) -> None:
        """Prints the command and the hardware.

        script: its file's name without .py. out: --out. name: of the files, default the script's without bench_.
        more: further facts, or others in the place of those: card="..." where JAX does not see the one that is timed.
        """
        self.name = name or script.removeprefix("bench_")
        self.out = out
        self.run = facts(script, argv) | more
        self.results: dict[str, list[dict]] = {}
        self.status = 0
        self._panels: dict[str, Panel] = {}
        self.draws = out is not None and importlib.util.find_spec("matplotlib") is not None
        print(f"    {self.run['command']}\n\n{self.run['card']}, jax {self.run['jax']}, {self.run['date']}")
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            if not self.draws:
                print("no pictures: matplotlib is not installed")

    def add(self, title: str, rows: list[dict], chart: Chart | None = None, note: str = "") -> None:
        """A table, its heading, and the sentence that says what to see in it; in the place of one with that title."""
        self.results[title] = rows
        text = [f"\n{title}", table(rows) if rows else "Nothing here can run it.", *([note] if note else [])]
        print("\n\n".join(text), flush=True)
        if chart and rows:
            self._panels[title] = Panel(title, chart, rows)
        if self.out is not None:
            (self.out / f"{self.name}.json").write_text(json.dumps({**self.run, "results": self.results}, indent=1))
            if self.draws:
                head = f"{self.run['command']}\n{self.run['card']}, jax {self.run['jax']}, {self.run['date']}"
                draw(list(self._panels.values()), head, self.out / f"{self.name}.png")

    def check(self, title: str, rows: list[dict], by: str = "by") -> list[str]:
        """The table of a check, and who in its column `by` may be timed: those whose every `verdict` is ok."""
        self.add(title, rows)
        wrong = {row[by] for row in rows if row["verdict"] != "ok"}
        right = [name for name in dict.fromkeys(row[by] for row in rows) if name not in wrong]
        if wrong:
            print(f"\nNot timed, for it is wrong: {', '.join(sorted(wrong))}", flush=True)
        self.status |= int(bool(wrong) or not rows)
        return right


def verdict(errors: dict[str, float], bars: dict[str, float]) -> str:
    """Which of the errors are over their bars (or nan): ok, or FAIL and their names."""
    short = [name for name, bar in bars.items() if not errors[name] <= bar]
    return " ".join(["FAIL", *short]) if short else "ok"


def table(rows: Sequence[dict]) -> str:
    """A Markdown table whose columns line up; a key names a column, `%` in it makes a percentage."""
    names = list(rows[0])

    def text(name, x) -> str:
        if x is None or isinstance(x, (str, int)):
            return "" if x is None else str(x)
        if "%" in name:
            return f"{100 * x:.0f}"
        return f"{x:.0f}" if x > 100 else f"{x:.{3 if name.endswith('ms') else 2}f}"

    lines = [names, *([text(name, row[name]) for name in names] for row in rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(names))]
    left = [isinstance(rows[0][name], str) for name in names]

    def pad(line):
        cells = (x.ljust(w) if l else x.rjust(w) for x, w, l in zip(line, widths, left, strict=True))
        return "| " + " | ".join(cells) + " |"

    rule = ["-" * w if l else "-" * (w - 1) + ":" for w, l in zip(widths, left, strict=True)]
    return "\n".join([pad(names), "| " + " | ".join(rule) + " |", *(pad(line) for line in lines[1:])])
