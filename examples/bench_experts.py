"""How fast the experts' grouped matmul is, and that it is right.

    python examples/bench_experts.py                      the experts of Qwen3-30B-A3B and DeepSeek-V2-Lite
    python examples/bench_experts.py --shapes qwen-gate   one of them

Groups are uneven (multinomial over Dirichlet(4) shares), as a router makes them. Before any time is taken y, dx and dw
are compared with float32; who is off is not timed, and the exit status is 1. Times are medians of 5 samples of 10
calls, what is compared in turn (clock.py). Everything is inside the jit, the kernels' schedule of row tiles too; `both`
is a forward whose result is used, and the gradients of x and w. --out DIR writes experts.json and experts.png.

FLOPs count the rows there are: 2 M k n forward, three times that for both. `dense` is what one matrix for all rows
would cost, `% of matmul` the rate against a large square matmul in the same turns. torch's grouped_mm, where torch is
installed beside the GPU, runs in a process of its own right after.
"""

import argparse
import functools
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from bench import Report, ceiling, flags, jax_clock, verdict
from bench_inputs import relative
from bench_picture import Chart
from clock import Clock

from zigzag_jax.kernels import GROUPED, grouped_implementation, grouped_matmul

TIMES = Chart(("TF/s",), ("pass",), ("by",))
BARS = {"float32": 3e-6, "bfloat16": 3e-3, "float16": 5e-4}  # relative L2: the rounding of the result


class Shape(NamedTuple):
    """Sizes of one matmul of a layer of experts: rows [M, k] times [G, k, n]."""

    rows: int
    groups: int
    k: int
    n: int

    def smaller(self) -> "Shape":
        """Few enough for a CPU."""
        return Shape(self.rows // 128, self.groups // 16, self.k // 16, self.n // 16)

    def sizes(self) -> np.ndarray:
        """Uneven group sizes."""
        rng = np.random.default_rng(0)
        return rng.multinomial(self.rows, rng.dirichlet(np.full(self.groups, 4.0))).astype(np.int32)

    def flops(self, which: str) -> int:
        """Of a forward, or of both passes."""
        return 2 * self.rows * self.k * self.n * (3 if which == "both" else 1)

    def bytes(self, which: str, itemsize: int = 2) -> int:
        """What must come from memory or go there once: forward x, w, y; backward dy, w, dx and x, dy, dw."""
        x, w, y = self.rows * self.k, self.groups * self.k * self.n, self.rows * self.n
        return itemsize * (x + w + y) * (3 if which == "both" else 1)


SHAPES = {
    "qwen-gate": Shape(65536, 128, 2048, 768),
    "qwen-down": Shape(65536, 128, 768, 2048),
    "deepseek": Shape(49152, 64, 2048, 1408),
}


class Inputs(NamedTuple):
    """x [M, k], w [G, k, n], dy [M, n], group_sizes int32 [G]."""

    x: jax.Array
    w: jax.Array
    dy: jax.Array
    sizes: jax.Array

    @classmethod
    def draw(cls, shape: Shape, dtype) -> "Inputs":
        """Normal numbers; w such that y is as large as x."""
        seeds = jax.random.split(jax.random.key(0), 3)
        wide = (shape.rows, shape.k), (shape.groups, shape.k, shape.n), (shape.rows, shape.n)
        x, w, dy = (jax.random.normal(seed, size, dtype) for seed, size in zip(seeds, wide, strict=True))
        return cls(x, w * shape.k**-0.5, dy, jnp.asarray(shape.sizes()))


@functools.partial(jax.jit, static_argnames="name")
def forward(x, w, sizes, name: str):
    """The product alone."""
    return grouped_matmul(x, w, sizes, implementation=name)


@functools.partial(jax.jit, static_argnames="name")
def both(x, w, dy, sizes, name: str):
    """y, dx, dw: returned, or XLA would drop what nobody reads."""
    y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation=name), x, w)
    return y, *vjp(dy)


@jax.jit
def dense(x, w):
    """One matrix for all rows."""
    return x @ w


@jax.jit
def dense_both(x, w, dy):
    """The three matmuls of its forward and backward."""
    return x @ w, dy @ w.T, x.T @ dy


def calls(name: str, x: Inputs) -> dict:
    """What is timed of an implementation, or of the dense matmul."""
    if name == "dense":
        w = x.w[0]
        return {
            (name, "forward"): functools.partial(dense, x.x, w),
            (name, "both"): functools.partial(dense_both, x.x, w, x.dy),
        }
    return {
        (name, "forward"): functools.partial(forward, x.x, x.w, x.sizes, name),
        (name, "both"): functools.partial(both, *x, name),
    }


def errors(name: str, x: Inputs) -> dict[str, float]:
    """Relative L2 of y, dx, dw against float32 on the same numbers."""
    wide = (a.astype(jnp.float32) for a in x[:3])
    want = both(*wide, x.sizes, "reference")
    return {what: relative(a, b) for what, a, b in zip(("y", "dx", "dw"), both(*x, name), want, strict=True)}


def beside_torch(script: str, job: dict, clock: Clock) -> dict[str, float]:
    """What a script of torch prints for a job; {} where there is no torch or no GPU, or it fails (and says why)."""
    if jax.default_backend() != "gpu" or not importlib.util.find_spec("torch"):
        return {}
    text = json.dumps(job | {"samples": clock.samples, "repeats": clock.repeats, "idle": clock.idle})
    command = [sys.executable, str(Path(__file__).with_name(f"{script}.py"))]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"torch: {done.stderr.strip().splitlines()[-1]}", flush=True)
        return {}
    return json.loads(done.stdout)


def check(names: list[str], x: Inputs, bar: float) -> list[dict]:
    """The errors of every implementation, and which are over the bar."""
    rows = []
    for name in names:
        found = errors(name, x)
        figures = {what: f"{error:.1e}" for what, error in found.items()}
        rows.append({"by": name, **figures, "verdict": verdict(found, dict.fromkeys(found, bar))})
    return rows


def times(names: list[str], shape: Shape, x: Inputs, clock: Clock, most: tuple[Callable, int]) -> list[dict]:
    """Every implementation, beside the dense matmul and torch. most: the large matmul, and its FLOPs."""
    runs = {key: call for name in [*names, "dense"] for key, call in calls(name, x).items()}
    matmul, operations = most
    ms = clock.in_turn({"matmul": matmul, **runs})
    rate = operations / ms.pop("matmul")
    job = {"rows": shape.rows, "k": shape.k, "n": shape.n, "sizes": shape.sizes().tolist()}
    peer = beside_torch("bench_torch", job | {"dtype": jnp.dtype(x.x.dtype).name}, clock)
    ms |= {("torch", which): peer[which] for which in ("forward", "both") if which in peer}
    return [
        {
            "pass": which, "by": name, "ms": t, "TF/s": shape.flops(which) / t / 1e9,
            "GB/s": shape.bytes(which, x.x.dtype.itemsize) / t / 1e6, "% of matmul": shape.flops(which) / t / rate,
            "time / dense": t / ms["dense", which], "time / torch": peer.get(which) and t / peer[which],
        }
        for (name, which), t in ms.items()
    ]  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: text.split(",")
    parser.add_argument("--implementations", type=names, help="a,b,..; default: what the device picks")
    parser.add_argument("--shapes", type=names, default=list(SHAPES), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--dtype", default="bfloat16", choices=list(BARS))
    flags(parser)
    args = parser.parse_args(argv)
    for option, allowed in (("implementations", GROUPED), ("shapes", SHAPES)):
        if unknown := [name for name in getattr(args, option) or [] if name not in allowed]:
            parser.error(f"--{option} must be of {', '.join(allowed)}, got {', '.join(unknown)}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Check, time, print; 1 where a result falls short of the bar or an implementation cannot."""
    args = parse(argv)
    report = Report("bench_experts", argv, args.out)
    print(args.dtype)
    clock, most = jax_clock(args.quick), ceiling(args.quick, args.dtype)
    for title in args.shapes:
        shape = SHAPES[title].smaller() if args.quick else SHAPES[title]
        x = Inputs.draw(shape, args.dtype)
        names = []
        for name in args.implementations or [None]:
            try:
                names.append(grouped_implementation(x.x, x.w, name))
            except NotImplementedError as error:
                print(f"\n{title}: {error}", flush=True)
                report.status = 1
        print(f"\n{title}: {shape.rows} rows, {shape.groups} groups, {shape.k} -> {shape.n}")
        if right := report.check(f"{title} check", check(names, x, BARS[args.dtype])):
            report.add(f"{title} times", times(right, shape, x, clock, most), TIMES)
    return report.status


if __name__ == "__main__":
    sys.exit(main())
