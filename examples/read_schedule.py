"""The schedule of a ring as a picture: which permutes fly above which kernels, as XLA's compiler has decided.

    JAX_PLATFORMS=cpu python examples/read_schedule.py --cp 4 --seq-len 32768            attention, forward and backward
    JAX_PLATFORMS=cpu python examples/read_schedule.py --cp 8 --seq-len 65536 --forward
    python examples/read_schedule.py FILE                                                any scheduled HLO text

The first two compile for H100s that are not there (h100.py: the CUDA plugin, no GPU; environment .venv-aot). A FILE is
`jit(f).lower(...).compile().as_text()`, or what XLA_FLAGS=--xla_dump_to=DIR left (*after_optimizations.txt).

A line is a launch, time runs downwards, and a bar is a transfer in flight: `┬` its start, `│` what runs meanwhile, `┴`
its done. Bodies of loops stand indented under their loop, with its trips; launches that are not named are counted.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from h100 import h100s, on
from hlo_copies import copies
from jax.sharding import PartitionSpec as P

from zigzag_jax import zigzag_attention
from zigzag_jax.hlo import Flight, Instruction, Program

SMALL = 1 << 20  # bytes under which a copy or a transfer is not drawn
LANES = 6  # transfers in flight at once that there is room for


def attention(
    cp: int, length: int, heads: tuple[int, int, int, int] = (32, 4, 128, 128), *, gradient: bool = True,
    implementation: str = "mosaic", options: dict[str, Any] | None = None, **arguments,
) -> Program:  # fmt: skip
    """The schedule of zigzag_attention over cp H100s with `length` tokens each, compiled on this host.

    heads: (query heads, kv heads, D, E); default: Qwen3-30B-A3B's. With `gradient` it stands below an output projection
    whose squares are the loss: in a model too a matmul makes dout. options: XLA's, by name. arguments: more of
    zigzag_attention's.
    """
    count, kv_count, dim, out_dim = heads
    mesh, spec = h100s(cp), P(None, "cp", None, None)
    array = lambda *sizes: on(mesh, (1, length * cp, *sizes), jnp.bfloat16, spec)

    def attend(q, k, v):
        return zigzag_attention(q, k, v, mesh=mesh, spec=spec, implementation=implementation, **arguments)

    def loss(q, k, v, w):
        y = attend(q, k, v).reshape(1, length * cp, -1) @ w
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    args = [array(count, dim), array(kv_count, dim), array(kv_count, out_dim)]
    if gradient:
        args.append(on(mesh, (count * out_dim, 2048), jnp.bfloat16))
    run = jax.grad(loss, argnums=(0, 1, 2)) if gradient else attend
    compiled = jax.jit(run).lower(*args).compile(options)
    return Program(compiled.as_text() or "")


def draw(program: Program, name: str = "", indent: str = "") -> Iterator[str]:
    """The lines of the picture of one computation (default: the entry) and of the loops in it."""
    name = name or program.entry
    flights = {flight.name: flight for flight in program.flights_of(name, 1) if flight.size >= SMALL}
    lanes: list[str | None] = [None] * LANES
    small = 0

    def line(text: str, marked: int | None = None, mark: str = "") -> str:
        bars = (mark if at == marked else "│" if lane else " " for at, lane in enumerate(lanes))
        return f"{indent}{''.join(bars)}  {text}".rstrip()

    for x in program.computations[name]:
        flight, lane = flights.get(x.name), next((at for at, own in enumerate(lanes) if own in _ended(x)), None)
        text = _launch(program, x)
        if flight is None and lane is None and not text:
            small += bool(program.work(x))
            continue
        if small:
            yield line(f"({small} small)")
            small = 0
        if flight is not None:
            free = lanes.index(None) if flight.asynchronous and None in lanes else None
            yield line(_what(flight), free, "┬")
            if free is not None:
                lanes[free] = x.name
        elif lane is not None:
            yield line("", lane, "┴")
            lanes[lane] = None
        else:
            yield line(text)
        if x.opcode == "while":
            yield from draw(program, x.calls[-1], line("").ljust(len(indent) + LANES) + "    ")
    if small:
        yield line(f"({small} small)")


def _ended(x: Instruction) -> tuple[str, ...]:
    """The transfers that an instruction waits for."""
    return x.operands if x.opcode.endswith("-done") else ()


def _launch(program: Program, x: Instruction) -> str:
    """What an instruction launches, where that is worth a line."""
    if x.opcode == "while":
        return f"loop {x.calls[-1]}, {x.trips:g} trips"
    work = [what for what in program.work(x) if what != "fusion"]
    if work == ["copy"] and sum(array.size for array in x.arrays) < SMALL:
        return ""
    return " ".join(work)


def _what(flight: Flight) -> str:
    way = "" if flight.asynchronous else ", and nothing meanwhile"
    return f"{flight.kind} {' '.join(map(str, flight.sent))}, {flight.size / 2**20:.1f} MiB{way}"


def summary(program: Program) -> Iterator[str]:
    """What was drawn, in numbers: kernels and transfers, weighted by the trips of their loops."""
    kernels = ", ".join(f"{name} {times:g}" for name, times in sorted(program.kernels().items()))
    yield f"kernels run: {kernels or 'none but those of XLA'}"
    flights = program.flights()
    for kind in dict.fromkeys(flight.kind for flight in flights):
        own = [flight for flight in flights if flight.kind == kind]
        runs, size = sum(f.times for f in own), sum(f.times * f.size for f in own)
        sync, bare = sum(not f.asynchronous for f in own), sum(not set(f.under) - {"copy"} for f in own)
        yield f"{kind}: {runs:g} transfers, {size / 2**20:.1f} MiB a device"
        yield f"    of {len(own)} in the text {sync} are synchronous, {bare} have nothing to fly above"
    copied = sum(copy.array.size * copy.times for copy in copies(program, SMALL))
    yield f"copies of {SMALL >> 20} MiB or more, in fusions too: {copied / 2**20:.1f} MiB"
    yield f"{len(program)} instructions in all"


def main(argv: list[str] | None = None) -> int:
    """Print the picture and the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE")
    parser.add_argument("--cp", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=32768, help="tokens of all ranks together")
    parser.add_argument("--heads", type=int, nargs=4, default=(32, 4, 128, 128), metavar=("H", "K", "D", "E"))
    parser.add_argument("--forward", action="store_true", help="without the backward")
    parser.add_argument("--strategy", choices=("ring", "allgather"), default="ring")
    parser.add_argument("--window", type=int)
    parser.add_argument("--implementation", default="mosaic", help="reference: plain XLA, a loop in a kernel's place")
    parser.add_argument(
        "--option", action="append", default=[], metavar="XLA_NAME=VALUE", help="a flag for this compile"
    )
    args = parser.parse_args(argv)
    if args.file is None and (args.cp < 1 or args.seq_len % (2 * args.cp)):
        parser.error(f"--seq-len must be divisible by 2 * cp = {2 * args.cp}, got {args.seq_len}")
    if wrong := [option for option in args.option if "=" not in option]:
        parser.error(f"--option must be NAME=VALUE, got {wrong[0]!r}")
    try:
        if args.file is not None:
            program = Program(args.file.read_text())
        else:
            program = attention(
                args.cp, args.seq_len // args.cp, tuple(args.heads), gradient=not args.forward,
                implementation=args.implementation, options=dict(option.split("=", 1) for option in args.option),
                strategy=args.strategy, window=args.window,
            )  # fmt: skip
    except (OSError, ValueError) as mistake:
        parser.error(str(mistake))
    print("\n".join([*draw(program), "", *summary(program)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
