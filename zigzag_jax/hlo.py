"""What XLA will launch, and in which order: the schedule of a compiled program, read from its text.

`jit(f).lower(...).compile().as_text()` is a list of computations, and in a scheduled module the order of the
instructions of each is the order of their launches. A transfer of data is two instructions, a start and a done; what
stands between them runs while the data flies:

    %collective-permute-start.7 = ... collective-permute-start(%k, %v), ...      the transfer begins
    %kernel.65 = ... custom-call(...), custom_call_target="mosaic_gpu_v2"        the GPU computes
    %collective-permute-done.7 = ... collective-permute-done(...)                what follows needs the data

Work hides in other computations too: in the body of a `while` (which runs as often as the loop has trips,
known_trip_count in the text), in the branches of a `conditional`, and in a `fusion`, which is one launch.
"Asynchronous" alone proves nothing: XLA marks a transfer `is_sync` whose done it put right behind the start, and one
that is not marked may have nothing but a scalar between the two.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

BITS = {"pred": 8, "c64": 64, "c128": 128}  # of the types whose name does not tell
MOVES = ("collective-permute", "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-broadcast")
# instructions that launch nothing
SILENT = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id", "replica-id", "after-all",
          "iota", "opt-barrier", "domain", "add-dependency"}  # fmt: skip
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.+?) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


class Array(NamedTuple):
    """The type of one array."""

    dtype: str
    """XLA's name: bf16, f32, s32, pred."""
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        bits = BITS.get(self.dtype) or int(re.findall(r"\d+", self.dtype)[0])
        return math.prod(self.shape) * bits // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def arrays(text: str) -> tuple[Array, ...]:
    """Every array type that a text names, in order."""
    return tuple(Array(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _ARRAY.findall(text))


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    type: str
    """What it results in, as XLA writes it."""
    opcode: str
    rest: str
    """Operands and attributes, as XLA writes them."""

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """What it results in."""
        return arrays(self.type)

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the instructions whose results it takes."""
        return tuple(re.findall(r"%([\w.-]+)", self.rest.split("), ", 1)[0]))

    @functools.cached_property
    def calls(self) -> tuple[str, ...]:
        """Computations that run as part of it: a loop's body, branches, the inside of a fusion."""
        found = re.findall(r"\b(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.-]+)", self.rest)
        for names in re.findall(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}", self.rest):
            found += re.findall(r"%?([\w.-]+)", names)
        return tuple(found)

    @functools.cached_property
    def source(self) -> str:
        """Where it comes from in the JAX program: a path of transformations and primitives, or nothing."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def trips(self) -> float:
        """How often the body of a `while` runs; nan where XLA does not know."""
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', self.rest)
        return int(found[1]) if found else math.nan


class Flight(NamedTuple):
    """One transfer between devices."""

    name: str
    """Of the instruction that begins it."""
    kind: str
    """Of MOVES."""
    computation: str
    times: float
    """How often it runs."""
    sent: tuple[Array, ...]
    """What each device gives; XLA may put several small arrays of one hop into one transfer."""
    got: tuple[Array, ...]
    """What each device has afterwards."""
    asynchronous: bool
    under: tuple[str, ...]
    """What is launched between its start and its done (Program.work)."""
    source: str
    """As Instruction.source."""

    @property
    def size(self) -> int:
        """Bytes that one device gives each time."""
        return sum(x.size for x in self.sent)


class Program:
    """A compiled program."""

    def __init__(self, text: str) -> None:
        """`text` is that of a scheduled module. ValueError where it is not."""
        if "is_scheduled=true" not in text.split("\n", 1)[0]:
            raise ValueError("text must be a scheduled module (HloModule ..., is_scheduled=true), got another")
        self.name = text.split(",", 1)[0].removeprefix("HloModule ")
        self.computations: dict[str, tuple[Instruction, ...]] = {}
        self.entry, name, lines = "", "", []
        for line in text.splitlines():
            if head := _HEAD.match(line):
                name, lines = head[1], []
                self.entry = name if line.startswith("ENTRY") else self.entry
            elif line == "}" and lines:
                self.computations[name] = tuple(lines)
            elif found := _INSTRUCTION.match(line):
                lines.append(Instruction(*found.groups()[1:]))

    def __len__(self) -> int:
        """Instructions in all computations."""
        return sum(map(len, self.computations.values()))

    def launched(self, name: str = "", times: float = 1) -> Iterator[tuple[str, float]]:
        """Computations whose instructions are launched one by one, with how often each runs: the entry, the bodies of
        loops, branches (as if each were taken). Not the insides of fusions: a fusion is one launch.
        """
        name = name or self.entry
        yield name, times
        for x in self.computations[name]:
            if x.opcode in ("while", "conditional", "call"):
                for called in x.calls:
                    yield from self.launched(called, times * (x.trips if x.opcode == "while" else 1))

    def kernels(self) -> Counter[str]:
        """How often each kernel that is not XLA's own runs, those inside fusions too."""
        found: Counter[str] = Counter()
        for name, times in self.launched():
            for x in self.computations[name]:
                if x.opcode not in ("while", "conditional", "call"):
                    for kernel in self._kernels_in(x):
                        found[kernel] += times  # pyright: ignore[reportArgumentType] (nan: a loop without a known end)
        return found

    def work(self, x: Instruction) -> tuple[str, ...]:
        """What an instruction keeps the GPU busy with, by name: kernels (those of a loop once), `matmul`, `copy`, the
        opcode of anything else; nothing where it launches nothing or only moves data between devices.
        """
        if kernels := self._kernels_in(x):
            return kernels
        if x.opcode in SILENT or _moves(x.opcode) or x.opcode.endswith(("-start", "-done")):
            return ()
        if "gemm_fusion" in x.name or x.opcode == "dot" or (x.opcode == "custom-call" and "gemm" in x.rest):
            return ("matmul",)
        if x.opcode in ("call", "conditional"):
            return tuple(what for called in x.calls for y in self.computations[called] for what in self.work(y))
        return (x.opcode,)

    def _kernels_in(self, x: Instruction) -> tuple[str, ...]:
        if x.opcode == "custom-call":
            return (kernel,) if (kernel := _kernel(x)) else ()
        return tuple(kernel for called in x.calls for y in self.computations[called] for kernel in self._kernels_in(y))

    def flights(self) -> list[Flight]:
        """Every transfer, in the order of the starts, computation by computation."""
        return [flight for name, times in self.launched() for flight in self.flights_of(name, times)]

    def flights_of(self, name: str, times: float) -> Iterator[Flight]:
        """The transfers of one computation that runs so often."""
        lines = self.computations[name]
        types = {x.name: x.type for x in lines}
        for at, x in enumerate(lines):
            if (kind := self.moves(x)) is None:
                continue
            end = at
            if x.opcode.endswith("-start"):
                end = next(n for n in range(at, len(lines)) if x.name in lines[n].operands and _ends(lines[n]))
            under = tuple(what for y in lines[at + 1 : end] for what in self.work(y))
            sent = arrays(" ".join(types[operand] for operand in x.operands))
            asynchronous = end > at and '"is_sync":true' not in x.rest
            yield Flight(x.name, kind, name, times, sent, lines[end].arrays, asynchronous, under, x.source)

    def moves(self, x: Instruction) -> str | None:
        """Which of MOVES an instruction begins, or None."""
        if x.opcode == "async-start":
            return next(
                (kind for called in x.calls for y in self.computations[called] if (kind := self.moves(y))), None
            )
        kind = x.opcode.removesuffix("-start")
        return kind if kind in MOVES else None


def _moves(opcode: str) -> bool:
    return opcode.removesuffix("-start").removesuffix("-done") in MOVES


def _ends(x: Instruction) -> bool:
    return x.opcode.endswith("-done")


def _kernel(x: Instruction) -> str:
    """The name of a Mosaic or Triton kernel, as it was given to pallas; nothing for XLA's own custom calls."""
    if not re.search(r'custom_call_target="(mosaic_gpu\w*|__gpu\$xla\.gpu\.triton|triton_kernel_call)"', x.rest):
        return ""
    *_, kernel, _primitive = ["", *x.source.split("/")]
    return kernel or "kernel"
