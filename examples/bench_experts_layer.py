"""How fast a whole layer of experts is, beside one that torch's grouped_mm and its gathers make.

    python examples/bench_experts_layer.py            Qwen3-30B-A3B's: 8192 tokens, 8 of 128 experts, 2048 -> 2 x 768
    python examples/bench_experts_layer.py --fused    SwiGLU inside the matmuls too

Router, permutation, gate and up, SwiGLU, down, combination: the model's own module (models/moe.py) on one device, with
its weights in the dtype of the arithmetic. `both` is a forward whose result is used, and the gradients of x and of all
weights. Before any time is taken they are compared with float32 in plain XLA, for the same choice of experts. Times are
medians of 5 samples of 10 calls, in turn (clock.py). `% of matmul` is the rate of the experts' FLOPs (6 T k d f
forward) against a large square matmul in the same turns. torch's layer, where torch is beside the GPU, runs in a
process of its own right after. --out DIR writes experts_layer.json and .png.
"""

import argparse
import functools
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from bench import Report, ceiling, flags, jax_clock, verdict
from bench_experts import beside_torch
from bench_inputs import relative
from bench_picture import Chart
from flax import nnx
from jax.sharding import Mesh

from zigzag_jax.models.moe import MoE
from zigzag_jax.models.options import KernelOptions
from zigzag_jax.models.router import SoftmaxTopK
from zigzag_jax.models.sharding import Sharding

TIMES = Chart(("ms",), ("pass",), ("by",))
# relative L2; the routers' gradient is a sum of differences between experts' results, each rounded
BARS = {"y": 1e-2, "x": 1.5e-2, "gate": 1.5e-2, "up": 1.5e-2, "down": 1.5e-2, "route": 5e-2}


class Layer(NamedTuple):
    """Sizes."""

    tokens: int
    experts: int
    top_k: int
    size: int
    inner: int

    def flops(self, which: str) -> int:
        """Of the experts' matmuls, forward or both passes."""
        return 6 * self.tokens * self.top_k * self.size * self.inner * (3 if which == "both" else 1)

    def module(self, dtype, **options) -> nnx.Module:
        """The model's module on one device, its weights in `dtype`."""
        sharding = Sharding(Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("dp", "fsdp", "cp")))

        @nnx.jit
        def make():
            router, std = SoftmaxTopK(self.top_k, renormalise=True), self.size**-0.5
            return MoE(
                self.size, self.inner, self.experts, router, sharding, std=std, options=KernelOptions(**options),
                rngs=nnx.Rngs(0),
            )  # fmt: skip

        graphdef, state = nnx.split(make())
        return nnx.merge(graphdef, jax.tree.map(lambda w: w.astype(dtype), state))


QWEN = Layer(8192, 128, 8, 2048, 768)
SMALL = Layer(64, 4, 2, 64, 64)


class Calls:
    """A module's two passes, of tokens x and cotangents dy [1, T, d]."""

    def __init__(self, module: nnx.Module, x: jax.Array, dy: jax.Array) -> None:
        graphdef, self.weights = nnx.split(module)
        self.x, self.dy, real = x, dy, jnp.ones(x.shape[:2], bool)

        def run(weights, x, routes=None):
            return nnx.merge(graphdef, weights)(x, real, routes)

        @jax.jit
        def both(weights, x, dy, routes=None):
            y, vjp, stats = jax.vjp(functools.partial(run, routes=routes), weights, x, has_aux=True)
            return y, *vjp(dy), stats.routes

        self._forward, self._both = jax.jit(lambda weights, x: run(weights, x)[0]), both

    def forward(self):
        """The result."""
        return self._forward(self.weights, self.x)

    def both(self, routes=None):
        """(result, gradients of the weights, of x, what experts were chosen); `routes` in the place of the router's."""
        return self._both(self.weights, self.x, self.dy, routes)


def errors(calls: Calls, layer: Layer) -> dict[str, float]:
    """Relative L2 of the result and of every gradient, against float32 on the same numbers and the same experts."""
    y, weights, dx, routes = calls.both()
    wide = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float32), tree)
    exact = Calls(layer.module(jnp.float32, implementation="reference"), wide(calls.x), wide(calls.dy))
    exact.weights = wide(calls.weights)
    want_y, want_weights, want_dx, _ = exact.both(routes)
    name = lambda path: str(path[0].key)
    got, want = (dict((name(path), a) for path, a in jax.tree.leaves_with_path(w)) for w in (weights, want_weights))
    return {"y": relative(y, want_y), "x": relative(dx, want_dx)} | {n: relative(got[n], want[n]) for n in got}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fused", action="store_true", help="the layer with SwiGLU inside the matmuls, too")
    flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Check, time, print; 1 where a result falls short of its bar."""
    args = parse(argv)
    report, layer, dtype = Report("bench_experts_layer", argv, args.out), SMALL if args.quick else QWEN, "bfloat16"
    x, dy = (jax.random.normal(jax.random.key(i), (1, layer.tokens, layer.size), dtype) for i in range(2))
    forms = {"zigzag_jax": {}} | ({"zigzag_jax, fused": {"fused": True}} if args.fused else {})
    layers = {name: Calls(layer.module(dtype, **options), x, dy) for name, options in forms.items()}
    rows = []
    for name, calls in layers.items():
        off = errors(calls, layer)
        figures = {what: f"{error:.1e}" for what, error in off.items()}
        rows.append({"by": name, **figures, "verdict": verdict(off, BARS)})
    if right := report.check("check", rows):
        matmul, operations = ceiling(args.quick, dtype)
        turns = {(name, "forward"): layers[name].forward for name in right}
        turns |= {(name, "both"): layers[name].both for name in right}
        clock = jax_clock(args.quick)
        ms = clock.in_turn({"matmul": matmul, **turns})
        rate = operations / ms.pop("matmul")
        peer = beside_torch("bench_torch_layer", layer._asdict() | {"dtype": dtype}, clock)
        ms |= {("torch", which): peer[which] for which in ("forward", "both") if which in peer}
        report.add("times", [
            {
                "pass": which, "by": name, "ms": t, "TF/s": layer.flops(which) / t / 1e9,
                "% of matmul": layer.flops(which) / t / rate, "time / torch": peer.get(which) and t / peer[which],
            }
            for (name, which), t in ms.items()
        ], TIMES)  # fmt: skip
    return report.status


if __name__ == "__main__":
    sys.exit(main())
