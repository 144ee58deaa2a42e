"""How fast the attention kernels are on the steps of a ring, and that they are right.

    python examples/bench_attention.py                    the step shapes of every rank: diagonal, front, back
    python examples/bench_attention.py --ring             every rank's whole ring: zigzag, naive, all-gather
    python examples/bench_attention.py --masks            documents and windows, against the pairs that they leave
    python examples/bench_attention.py --deterministic    what a fixed order of sums costs the backward

Before any time is taken each implementation is compared with float32; one that falls short is not timed, and the exit
status is 1. Times are medians of 5 samples of 10 calls, what is compared in turn (clock.py). The ceiling, a large
matmul, is one of the turns, and so is cuDNN: itself, on K and Q already cut. Whole rings: bench_rings.py. --out DIR
writes the numbers as JSON and their bars as PNG, named by the parts: attention, attention-ring, ..

FLOPs count the visible pairs of a query and a key: 2 (D + E) a pair and head forward, 2 (3 D + 2 E) backward. `fwd`
writes q's dtype, `carry` continues the float32 softmax of an earlier step, `bwd` includes delta and the casts of dq, dk
and dv, as FlashAttention's backward does.
"""

import argparse
import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import NamedTuple

import bench_ring_tables as tables
import jax
from bench import Report, ceiling, flags, jax_clock
from bench_calls import PEERS, backward, calls, check, forward, usable
from bench_inputs import MODELS, Heads, Inputs, flops, masks, pairs, shapes, step_range, tile_area
from bench_picture import Chart
from bench_rings import STRATEGIES, Case, Rings
from clock import Clock

from zigzag_jax.cost import H100
from zigzag_jax.kernels import FLASH, flash_implementation
from zigzag_jax.kernels.flash.contract import Settings
from zigzag_jax.ranges import KeyRange

STEPS = Chart(("TF/s",), ("rank", "step"), ("by", "pass"))
MASKS = Chart(("time / area",), ("mask",), ("by", "pass"))
ORDERS = Chart(("ms", "fixed order ms"), ("step",), ("by",))


class Bench(NamedTuple):
    """One model's heads on one rank's tokens."""

    heads: Heads
    x: Inputs
    names: list[str]
    """Implementations and peers."""
    cp: int
    clock: Clock
    ceiling: tuple[Callable, int]
    """The large matmul, and its FLOPs."""
    link: float
    """Bytes a second between neighbours, one way."""

    @property
    def length(self) -> int:
        """Tokens of a rank."""
        return self.x.q.shape[1]

    @property
    def rings(self) -> Rings:
        """Its whole rings."""
        return Rings(self.heads, self.x, self.kernels, self.cp, self.clock)

    @property
    def kernels(self) -> list[str]:
        """The implementations that take any ranges."""
        return [name for name in self.names if name not in PEERS]

    def range(self, rank: int, source: int) -> KeyRange:
        """What `rank` sees of `source`."""
        return step_range(rank, source, self.cp, self.length)

    def kinds(self) -> dict[str, KeyRange]:
        """The ranges of each kind of step; every rank's are the same."""
        found = {step: (rank, source) for rank in range(self.cp) for step, source in shapes(rank, self.cp).items()}
        return {step: self.range(*who) for step, who in found.items()}

    def check(self) -> list[dict]:
        """The errors of every implementation, and which are over the bars."""
        return [row for name in self.names if name in FLASH for row in check(name, self.x, self.kinds(), "step")]

    def steps(self) -> list[dict]:
        """Every step shape of every rank."""
        rows = []
        matmul, operations = self.ceiling
        for rank in range(self.cp):
            for step, source in shapes(rank, self.cp).items():
                keys = self.range(rank, source)
                runs = {key: call for name in self.names for key, call in calls(name, self.x, keys).items()}
                ms = self.clock.in_turn({"matmul": matmul, **runs})
                most = operations / ms.pop("matmul")
                for (name, which), t in ms.items():
                    rate = flops(self.heads, pairs(keys), which) / t
                    peer = ms.get(("cudnn", "bwd" if which == "bwd" else "fwd"))
                    rows.append({
                        "step": step, "rank": rank, "pass": which, "by": name, "ms": t, "TF/s": rate / 1e9,
                        "% of matmul": rate / most, "time / cudnn": peer and t / peer,
                    })  # fmt: skip
        return rows

    def masks(self) -> list[dict]:
        """Documents and windows, one call on a rank's tokens, beside plain causal, their measure: the share of its
        pairs, of the pairs in tiles that hold one, and of its time.
        """
        keys = {title: step_range(0, 0, 1, self.length, "zigzag", *mask) for title, mask in masks(self.length).items()}
        area = {title: pairs(ranges) / pairs(keys["causal"]) for title, ranges in keys.items()}
        tiles = {title: tile_area(ranges) / tile_area(keys["causal"]) for title, ranges in keys.items()}
        runs = {}
        for name in self.names:
            for title, ranges in keys.items():
                runs |= {(title, *key): call for key, call in calls(name, self.x, ranges).items()}
        ms, rows = self.clock.in_turn(runs), []
        for (title, name, which), t in ms.items():
            causal = ms.get(("causal", name, which))
            rows.append({
                "mask": title, "by": name, "pass": which, "ms": t, "time / causal": causal and t / causal,
                "area / causal": area[title], "tiles / causal": tiles[title],
                "time / area": causal and t / causal / area[title],
                "time / tiles": causal and t / causal / tiles[title],
            })  # fmt: skip
        return rows

    def deterministic(self) -> list[dict]:
        """The backward with a fixed order of sums, beside the one without."""
        rows = []
        for name in self.kernels:
            for step, keys in self.kinds().items():
                static = {"scale": self.x.scale, "name": name}

                def build(keys=keys, static=static) -> dict:
                    out, lse = forward(*self.x[:3], keys, **static)
                    run = functools.partial(backward, *self.x[:3], out, lse, self.x.dout, keys, **static)
                    return {("any order",): run, ("fixed order",): functools.partial(run, deterministic=True)}

                ms = self.clock.in_turn(usable(name, build))
                if len(ms) == 2:
                    free, fixed = ms.values()
                    rows.append({"step": step, "by": name, "ms": free, "fixed order ms": fixed, "ratio": fixed / free})
        return rows


# --------------------------------------------------------------------------------------------------------------- parts
def tell_steps(report: Report, model: str, bench: Bench) -> None:
    """Every step shape of every rank."""
    report.add(f"{model} steps", bench.steps(), STEPS)


def tell_ring(report: Report, model: str, bench: Bench) -> None:
    """Whole rings of every rank, zigzag, naive and all-gather, and the modelled wire."""
    rings, link = bench.rings, bench.link
    last = {strategy: Case(strategy, bench.cp - 1) for strategy in STRATEGIES}
    rings = rings._replace(names=report.check(f"{model} ring check", rings.check(last)))
    rows = tables.ranks(rings)
    report.add(f"{model} ring", rows, tables.RANKS, tables.balance(rows))
    note = f"The path is measured, the wire modelled at {link / 1e9:g} GB/s: nothing travelled."
    report.add(f"{model} ring path", tables.paths(rings, rows, link), tables.PATHS, note)


def tell_masks(report: Report, model: str, bench: Bench) -> None:
    """Documents and windows: one call, and the slowest rank's whole ring, against the pairs that they leave."""
    report.add(f"{model} masks", bench.masks(), MASKS)
    cases = bench.rings.slowest()
    some = {title: cases[title] for title in ("8 documents", list(cases)[-1])}
    rings = bench.rings._replace(names=report.check(f"{model} masks ring check", bench.rings.check(some)))
    report.add(f"{model} masks ring", tables.masks(rings), tables.AREAS)


def tell_deterministic(report: Report, model: str, bench: Bench) -> None:
    """The backward with a fixed order of sums, beside the one without."""
    report.add(f"{model} deterministic", bench.deterministic(), ORDERS)


PARTS = {"steps": tell_steps, "ring": tell_ring, "masks": tell_masks, "deterministic": tell_deterministic}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: text.split(",")
    parser.add_argument(
        "--implementations", type=names, help="a,b,..; default: what the device picks; on a GPU cudnn too"
    )
    parser.add_argument("--models", type=names, default=["qwen", "mla"], help=f"of {', '.join(MODELS)}")
    parser.add_argument("--tokens", type=int, help="of the whole sequence (32768; with --quick 1024)")
    parser.add_argument("--cp", type=int, default=4, help="ranks of the ring; each holds tokens / cp")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    for part, tell in list(PARTS.items())[1:]:
        parser.add_argument(f"--{part}", action="store_true", help=f"instead of the steps: {tell.__doc__}")
    parser.add_argument("--peers", action="store_true", help="tokamax too, where it is installed")
    parser.add_argument(
        "--link", type=float, default=H100.link, help="with --ring: bytes a second between neighbours, one way"
    )
    flags(parser)
    args = parser.parse_args(argv)
    args.tokens = args.tokens or (1024 if args.quick else 32768)
    for option, allowed in (("implementations", FLASH), ("models", MODELS)):
        if unknown := [name for name in getattr(args, option) or [] if name not in allowed]:
            parser.error(f"--{option} must be of {', '.join(allowed)}, got {', '.join(unknown)}")
    if args.cp < 1:
        parser.error(f"--cp must be at least 1, got {args.cp}")
    if not args.link > 0:
        parser.error(f"--link must be > 0 bytes a second, got {args.link}")
    unit = 128 if args.masks else 2
    if args.tokens < 1 or args.tokens % (unit * args.cp):
        parser.error(f"--tokens must be a multiple of {unit} * cp, got {args.tokens} with --cp {args.cp}")
    return args


def contestants(args, x: Inputs) -> list[str]:
    """What is asked for, or what the device picks for these heads; cuDNN, the measure, wherever there is a GPU."""
    names = list(args.implementations or [flash_implementation(*x[:3], Settings(x.scale, None))])
    if jax.default_backend() == "gpu" and "cudnn" not in names:
        names.append("cudnn")
    if args.peers and importlib.util.find_spec("tokamax"):
        names.append("tokamax")
    return names


def main(argv: list[str] | None = None) -> int:
    """Check, time, print; 1 where a result falls short of the bars or nothing could be checked."""
    args = parse(argv)
    local = args.tokens // args.cp
    parts = [part for part in PARTS if part != "steps" and getattr(args, part)]
    report = Report("bench_attention", argv, args.out, name="-".join(["attention", *parts]))
    print(f"{local} tokens a rank, {args.dtype}")
    clock = jax_clock(args.quick)
    for model in args.models:
        heads = MODELS[model].smaller() if args.quick else MODELS[model]
        x = Inputs.draw(heads, local, args.dtype)
        bench = Bench(heads, x, contestants(args, x), args.cp, clock, ceiling(args.quick, args.dtype), args.link)
        print(f"\n{model}: H = {heads.heads}, K = {heads.kv_heads}, D = {heads.dim}, E = {heads.out_dim}")
        right = report.check(f"{model} check", bench.check())
        bench = bench._replace(names=[name for name in bench.names if name in right or name not in FLASH])
        if bench.kernels:
            for part in parts or ["steps"]:
                PARTS[part](report, model, bench)
    return report.status


if __name__ == "__main__":
    sys.exit(main())
