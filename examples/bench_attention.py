"""How fast the attention kernels are on the steps of a ring, and that they are right.

    python examples/bench_attention.py                    the step shapes of every rank: diagonal, front, back
    python examples/bench_attention.py --ring             a rank's whole ring, and the naive layout's last rank
    python examples/bench_attention.py --masks            documents and a window, against what their tiles predict
    python examples/bench_attention.py --deterministic    what a fixed order of sums costs the backward

Before any time is taken each implementation is compared with float32: exit status 1 where one falls short. Times are
medians of 5 samples of 10 calls; what is compared runs in turn, 0.3 s of rest before each sample, for a card that is
kept busy slows down. The ceiling, a large matmul, is one of the turns, and so is cuDNN: itself, on K and Q already cut.

FLOPs count the visible pairs of a query and a key: 2 (D + E) a pair and head forward, 2 (3 D + 2 E) backward. `fwd`
writes q's dtype, `carry` continues the float32 softmax of an earlier step, `bwd` includes delta and the casts of dq, dk
and dv, as FlashAttention's backward does.
"""

import argparse
import functools
import importlib.util
import json
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from bench_calls import PEERS, backward, calls, errors, forward, refusal, ring_backward, ring_forward, usable
from bench_common import (
    MODELS,
    Clock,
    Heads,
    Inputs,
    documents,
    facts,
    flops,
    pairs,
    shapes,
    spread,
    step_range,
    table,
    tile_area,
    verdict,
)

from zigzag_jax.kernels import FLASH, flash_implementation
from zigzag_jax.kernels.flash.contract import Settings
from zigzag_jax.layout import Layout
from zigzag_jax.ranges import KeyRange


class Bench(NamedTuple):
    """The tables of one model's heads."""

    heads: Heads
    x: Inputs
    names: list[str]
    """Implementations and peers."""
    cp: int
    clock: Clock

    @property
    def length(self) -> int:
        """Tokens of a rank."""
        return self.x.q.shape[1]

    @property
    def kernels(self) -> list[str]:
        """The implementations that take any ranges."""
        return [name for name in self.names if name not in PEERS]

    def range(self, rank: int, source: int, layout: Layout = "zigzag") -> KeyRange:
        """What `rank` sees of `source`."""
        return step_range(rank, source, self.cp, self.length, layout)

    def kinds(self) -> dict[str, KeyRange]:
        """The ranges of each kind of step; every rank's are the same."""
        found = {step: (rank, source) for rank in range(self.cp) for step, source in shapes(rank, self.cp).items()}
        return {step: self.range(*who) for step, who in found.items()}

    def check(self) -> list[dict]:
        """The errors of every implementation, and which are over the bars."""
        rows = []
        for name in (name for name in self.names if name in FLASH):
            for step, keys in self.kinds().items():
                with refusal(name, step):
                    found = errors(name, self.x, keys)
                    figures = {key: f"{error:.1e}" for key, error in found.items()}
                    rows.append({"step": step, "by": name, **figures, "verdict": verdict(found)})
        return rows

    def steps(self) -> list[dict]:
        """Every step shape of every rank."""
        rows = []
        matmul, operations = self.clock.ceiling(self.x.q.dtype)
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

    def ring(self) -> list[dict]:
        """A whole ring of each zigzag rank and of the naive layout's last, without communication."""
        ks, vs = (jnp.stack([jnp.roll(y, 37 * at, 1) for at in range(self.cp)]) for y in (self.x.k, self.x.v))
        ranks: list[tuple[Layout, int]] = [("zigzag", rank) for rank in range(self.cp)]
        ranks.append(("contiguous", self.cp - 1))
        keys, count = {}, {}
        for layout, rank in ranks:
            steps = [self.range(rank, (rank - s) % self.cp, layout) for s in range(self.cp)]
            keys[layout, rank] = ring = KeyRange(*(jnp.stack(y) for y in zip(*steps, strict=True)))
            count[layout, rank] = sum(flops(self.heads, pairs(ring), which) for which in ("fwd", "bwd"))

        def build(name: str) -> dict:
            static, runs = {"scale": self.x.scale, "name": name}, {}
            for who, ring in keys.items():
                runs[*who, "fwd"] = fwd = functools.partial(ring_forward, self.x.q, ks, vs, ring, **static)
                saved = *fwd(), self.x.dout, ring
                runs[*who, "bwd"] = functools.partial(ring_backward, self.x.q, ks, vs, *saved, **static)
            return runs

        rows = []
        for name in self.kernels:
            ms = self.clock.in_turn(usable(name, functools.partial(build, name)))
            if len(ms) < 2 * len(ranks):
                continue
            both = {who: ms[*who, "fwd"] + ms[*who, "bwd"] for who in ranks}
            zigzag = [both[who] for who in ranks[:-1]]
            for who, t in both.items():
                rows.append({
                    "layout": who[0], "rank": who[1], "by": name, "fwd ms": ms[*who, "fwd"], "bwd ms": ms[*who, "bwd"],
                    "both ms": t, "TF/s": count[who] / t / 1e9, "/ slowest zigzag": t / max(zigzag),
                })  # fmt: skip
        return rows

    def masks(self) -> list[dict]:
        """Documents and a window on one rank's tokens, beside the plain causal step that is their measure."""
        window = min(4096, self.length // 2)
        one = functools.partial(step_range, 0, 0, 1, self.length)
        packed = one(positions=documents(8, self.length))
        masks = {"causal": one(), "8 documents": packed, f"window {window}": one(window=window)}
        area = {mask: tile_area(keys) for mask, keys in masks.items()}
        runs = {}
        for name in self.names:
            for mask, keys in masks.items():
                runs |= {(mask, *key): call for key, call in calls(name, self.x, keys).items()}
        ms, rows = self.clock.in_turn(runs), []
        for (mask, name, which), t in ms.items():
            causal = ms.get(("causal", name, which))
            rows.append({
                "mask": mask, "by": name, "pass": which, "ms": t, "tiles / scores": area[mask] / pairs(masks[mask]),
                "time / predicted": causal and t / (causal * area[mask] / area["causal"]),
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


PARTS = {"ring": Bench.ring, "masks": Bench.masks, "deterministic": Bench.deterministic}


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
    for part, table_of in PARTS.items():
        parser.add_argument(f"--{part}", action="store_true", help=f"instead of the steps: {table_of.__doc__}")
    parser.add_argument("--peers", action="store_true", help="tokamax too, where it is installed")
    parser.add_argument("--quick", action="store_true", help="few tokens and heads, one sample: does it run at all?")
    parser.add_argument("--json", type=Path, help="a file for all the numbers")
    args = parser.parse_args(argv)
    args.tokens = args.tokens or (1024 if args.quick else 32768)
    for option, allowed in (("implementations", FLASH), ("models", MODELS)):
        if unknown := [name for name in getattr(args, option) or [] if name not in allowed]:
            parser.error(f"--{option} must be of {', '.join(allowed)}, got {', '.join(unknown)}")
    if args.cp < 1:
        parser.error(f"--cp must be at least 1, got {args.cp}")
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
    run = facts("bench_attention.py", argv)
    local = args.tokens // args.cp
    print(f"    {run['command']}\n")
    print(f"{run['card']}, jax {jax.__version__}, {run['date']}; {local} tokens a rank, {args.dtype}.")
    clock = Clock(1, 1, 0.0, 256) if args.quick else Clock(5, 10, 0.3, 8192)
    results, failed = {}, False
    for model in args.models:
        heads = MODELS[model].smaller() if args.quick else MODELS[model]
        x = Inputs.draw(heads, local, args.dtype)
        bench = Bench(heads, x, contestants(args, x), args.cp, clock)
        tables = {"check": Bench.check}
        tables |= {part: PARTS[part] for part in PARTS if getattr(args, part)} or {"steps": Bench.steps}
        for part, make in tables.items():
            results[f"{model} {part}"] = rows = make(bench)
            print(f"\n{model}, {part}: H = {heads.heads}, K = {heads.kv_heads}, D = {heads.dim}, E = {heads.out_dim}\n")
            print(table(rows) if rows else "Nothing here can run it.", flush=True)
            if part == "ring" and rows:
                print(f"\n{spread(rows)}", flush=True)
        checked = results[f"{model} check"]
        failed |= not checked or any(row["verdict"] != "ok" for row in checked)
    if args.json:
        args.json.write_text(json.dumps({**run, "results": results}, indent=1))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
