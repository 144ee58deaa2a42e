"""Where the time of traced steps went, by the models' named scopes.

A trace names each launch by its instruction (the statistic `hlo_op`), and the program's text says where in the source
an instruction comes from:

    jit(step)/transpose(jvp())/while/body/checkpoint/rematted_computation/mlp/shard_map/experts/dot_general
              ^ the backward                         ^ recomputed in it   ^             ^ scopes: mlp/experts

What moves data between devices stands in a row of its own, since on GPUs it runs beside the rest, and so does what the
text does not name (a CUDA graph may be one launch). On CPUs a launch that others share a core with takes longer.

The rows are times of launches, and shares are of their sum: where launches run beside each other, that sum is more than
the time of a step. How long a step is, and how much of it transfers stand alone: timeline.py.
"""

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from zigzag_jax.hlo import Instruction, Program

SCOPES = ("embedding", "attention", "mlp", "router", "experts", "loss", "optimizer")
PASSES = ("forward", "recomputed", "backward")
MOVES, UNKNOWN, OTHER = "between devices", "not named", "other"
_HOLDS_OTHERS = ("while", "conditional", "call")  # whose launches are in the trace beside them


class Launch(NamedTuple):
    """One launch of a trace."""

    module: str
    """The program's name."""
    instruction: str
    """Its hlo_op."""
    seconds: float
    """How long it ran."""
    start: float = 0.0
    """When it began, in seconds of the trace's clock."""
    device: str = ""
    """Where, by a name that tells the devices of a trace apart."""


def where(source: str) -> tuple[str, str]:
    """(scope, pass) of an instruction's path (Instruction.source).

    >>> where("jit(step)/transpose(jvp())/while/body/checkpoint/rematted_computation/mlp/shard_map/experts/dot_general")
    ('mlp/experts', 'recomputed')
    >>> where("jit(step)/transpose(jvp(embedding))/shard_map/scatter-add"), where("jit(step)/optimizer/add")
    (('embedding', 'backward'), ('optimizer', 'forward'))
    """
    inside = re.sub(r"\bjit\([^()]*\)", "", source)  # a function's name is no scope
    scopes = [part for part in re.split(r"[/()]+", inside) if part in SCOPES]
    at = 1 if "rematted_computation" in source else 2 if "transpose(" in source else 0
    return "/".join(dict.fromkeys(scopes)) or OTHER, PASSES[at]


def launches(folder: Path) -> list[Launch]:
    """Every launch of the newest trace below a folder that jax.profiler wrote."""
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    with warnings.catch_warnings():  # Python 3.12 deprecates how jaxlib makes the type of a statistic
        warnings.filterwarnings("ignore", "builtin type event_stats", DeprecationWarning)
        planes = jax.profiler.ProfileData.from_file(str(newest)).planes
        return [launch for plane in planes for line in plane.lines for launch in _launches(plane.name, line)]


def _launches(plane: str, line: Any) -> Iterator[Launch]:
    if plane.startswith("/device:") and not line.name.startswith("Stream"):
        return  # the same time under other names
    for event in line.events:
        stats = dict(event.stats)
        if "hlo_op" in stats:
            device = f"{plane} {stats.get('device_ordinal', '')}"  # the CPU's devices are one plane
            module, instruction = str(stats.get("hlo_module")), str(stats["hlo_op"])
            yield Launch(module, instruction, event.duration_ns * 1e-9, event.start_ns * 1e-9, device)


def by_scope(program: Program, found: Iterable[Launch]) -> dict[tuple[str, str], float]:
    """Seconds by (scope, pass), of all devices together; of launches of other programs nothing."""
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    for launch, row in launched(program, found):
        seconds[row] += launch.seconds
    return dict(seconds)


def launched(program: Program, found: Iterable[Launch]) -> Iterator[tuple[Launch, tuple[str, str]]]:
    """The launches of a program with their (scope, pass), but for those that hold others."""
    known = {x.name: x for name, _ in program.launched() for x in program.computations[name]}
    for launch in found:
        x = known.get(launch.instruction)
        if launch.module == program.name and (x is None or x.opcode not in _HOLDS_OTHERS):
            yield launch, _row(program, x)


def _row(program: Program, x: Instruction | None) -> tuple[str, str]:
    if x is None:
        return UNKNOWN, PASSES[0]
    scope, which = where(x.source)
    return (MOVES if program.moves(x) else scope), which


def table(seconds: Mapping[tuple[str, str], float], devices: int, steps: int) -> list[str]:
    """Lines: milliseconds of launches, of a step on one device on average, a scope a line, those that took most time
    first; the last column is the scope's share of all launches' time.
    """
    total = sum(seconds.values())
    if not total:
        return ["the trace names no launch of the step"]
    scale = 1e3 / devices / steps
    scopes: dict[str, float] = defaultdict(float)
    for (scope, _), time in seconds.items():
        scopes[scope] += time
    width = max(map(len, scopes))
    cells = lambda *row: "".join(f"{cell:>12}" for cell in row)
    lines = [f"{'ms a step and device':{width}}" + cells(*PASSES, "of launches")]
    for scope in sorted(scopes, key=lambda scope: -scopes[scope]):
        times = [f"{seconds[scope, name] * scale:.3f}" if (scope, name) in seconds else "" for name in PASSES]
        lines.append(f"{scope:{width}}" + cells(*times, f"{scopes[scope] / total:.1%}"))
    return lines
