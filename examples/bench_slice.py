"""A slice of a real model on one GPU: some layers, embedding and head, one long sequence; tokens/s, MFU and memory.

    python examples/bench_slice.py                            4 layers of Qwen3-30B-A3B, 32k tokens
    python examples/bench_slice.py --model deepseek-v2-lite
    python examples/bench_slice.py --peer                     beside `transformers`, where it is installed
    python examples/bench_slice.py --quick                    does it run at all? (no GPU needed)

`gradient` is forward and backward, `step` is that and AdamW's update; parameters, gradients and moments are float32,
the arithmetic is bfloat16, layers are rematerialised (--remat). Before any time is taken the first tokens' loss and
gradient are compared with float32 arithmetic and plain XLA's kernels; where they are wrong nothing is timed and the
exit status is 1. Time is the median of 7 steps on random tokens (clock.py). MFU counts what the model means
(models/flops.py), so recomputation does not count. The peak of `step` is that of all that ran before: --only step for
its own. --profile says which kernels a step's time goes to. --out DIR writes slice-MODEL.json and .png.
"""

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from bench import Report, flags, verdict
from bench_picture import Chart
from clock import Clock
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from trace_events import read
from trace_hops import busiest

from zigzag_jax.models.flops import H100_FLOPS, training_flops
from zigzag_jax.models.options import KernelOptions
from zigzag_jax.models.presets import PRESETS
from zigzag_jax.models.registry import ModelConfig, model_of
from zigzag_jax.models.sharding import Sharding, abstract_state, init_state
from zigzag_jax.models.stack import REMAT
from zigzag_jax.train.step import TrainState, make_step, state_shardings
from zigzag_jax.train.task import Task

AXES = ("dp", "fsdp", "cp")
CHECKED = 1024  # tokens of the check: float32 arithmetic in plain XLA is slow
# Relative differences. Rounding to bfloat16 also sends a token to another expert here and there, which changes the
# experts' and the routers' gradients by a tenth; a gradient that is missing or counted twice is off by 1.
BARS = {"loss": 2e-3, "worst gradient": 0.4}
SPEED = Chart(("tokens/s",), ("pass",), ("by",))


class Slice(NamedTuple):
    """The model that is timed."""

    config: ModelConfig
    sharding: Sharding
    remat: str

    @classmethod
    def of(cls, name: str, layers: int, remat: str) -> "Slice":
        """So many layers of a preset, on the first device."""
        mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES)
        return cls(dataclasses.replace(PRESETS[name], num_hidden_layers=layers), Sharding(mesh), remat)

    def make(self, rngs: nnx.Rngs, dtype: Any = jnp.bfloat16, implementation: str | None = None) -> nnx.Module:
        """The model itself."""
        model, options = model_of(self.config), KernelOptions(implementation=implementation)
        return model(self.config, self.sharding, dtype=dtype, remat=self.remat, options=options, rngs=rngs)

    def task(self, dtype: Any = jnp.bfloat16, implementation: str | None = None) -> Task:
        """What it is trained for, in arithmetic of `dtype`."""
        graphdef = abstract_state(lambda rngs: self.make(rngs, dtype, implementation))[0]
        return Task(graphdef, self.sharding, dtype, self.config.aux_loss, self.config.aux_coefficient)

    def batch(self, length: int) -> dict[str, jax.Array]:
        """One document of random tokens; the order of random tokens does not matter."""
        tokens = np.random.default_rng(0).integers(0, self.config.vocab_size, (1, length + 1), dtype=np.int32)
        arrays = {
            "tokens": tokens[:, :-1],
            "labels": tokens[:, 1:],
            "positions": np.arange(length, dtype=np.int32)[None],
            "real": np.ones((1, length), bool),
        }
        return jax.device_put(arrays, NamedSharding(self.sharding.mesh, P(("dp", "fsdp"), "cp")))

    def check(self, params: nnx.State, length: int) -> list[dict]:
        """Loss and gradient of `length` tokens against float32: the loss, and the parameter whose gradient is worst."""
        batch = self.batch(length)

        def gradient(task: Task) -> tuple[float, dict[str, np.ndarray]]:
            """On the host: two gradients at once would be the peak of the card's memory that is told later."""
            (_, losses), found = jax.jit(jax.value_and_grad(task.objective, has_aux=True))(params, batch)
            leaves = jax.tree.leaves_with_path(jax.device_get(found))
            return float(losses.loss), {jax.tree_util.keystr(path): leaf.ravel() for path, leaf in leaves}

        (got, mine), (want, exact) = gradient(self.task()), gradient(self.task(jnp.float32, "reference"))
        off = {name: float(np.linalg.norm(mine[name] - x) / np.linalg.norm(x)) for name, x in exact.items()}
        where = max(off, key=lambda name: math.inf if math.isnan(off[name]) else off[name])
        errors = {"loss": abs(got / want - 1), "worst gradient": off[where]}
        figures = {name: f"{error:.1e}" for name, error in errors.items()}
        return [{"by": "zigzag_jax", **figures, "of": where, "verdict": verdict(errors, BARS)}]


def peer(args: argparse.Namespace) -> list[dict]:
    """The rows of bench_transformers.py, in a process of its own that ends before JAX takes the card's memory."""
    with tempfile.TemporaryDirectory() as folder:
        script = str(Path(__file__).with_name("bench_transformers.py"))
        sizes = ["--model", args.model, "--layers", str(args.layers), "--tokens", str(args.tokens)]
        command = [sys.executable, script, *sizes, "--peak", str(args.peak), "--out", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"transformers is not beside it: {done.stderr.strip().splitlines()[-1]}", flush=True)
            return []
        return json.loads((Path(folder) / "transformers.json").read_text())["results"]["slice"]


def row(name: str, ms: float, loss: jax.Array, args: argparse.Namespace, flops: float, beside: list[dict]) -> dict:
    """What is said of a pass; beside: the peer's rows."""
    memory = jax.devices()[0].memory_stats()  # a CPU has none
    speed = args.tokens / ms * 1e3
    other = next((row["tokens/s"] for row in beside if row["pass"] == name), None)
    return {
        "by": "zigzag_jax", "pass": name, "ms": ms, "tokens/s": speed, "MFU": flops / (ms / 1e3) / args.peak,
        "peak GiB": memory and memory["peak_bytes_in_use"] / 2**30, "loss": float(loss),
        "tokens/s / peer": other and speed / other,
    }  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-30b-a3b", choices=list(PRESETS))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32768, help="of the one sequence")
    parser.add_argument("--remat", default="attention", choices=list(REMAT))
    parser.add_argument("--only", choices=["gradient", "step"], help="one of the two")
    parser.add_argument("--peer", action="store_true", help="bench_transformers.py first, in a process of its own")
    parser.add_argument("--peak", type=float, default=H100_FLOPS, help="FLOPs a second that MFU is measured against")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="trace one step into DIR")
    flags(parser)
    args = parser.parse_args(argv)
    if args.quick:
        tiny = {"qwen3-30b-a3b": "tiny-qwen3-moe", "deepseek-v2-lite": "tiny-deepseek-v2"}
        args.model = str(tiny.get(args.model, args.model))
        args.tokens, args.layers = 256, 2
    if args.profile and args.only == "gradient":
        parser.error("--profile is of a step, got --only gradient")
    most = PRESETS[str(args.model)].num_hidden_layers
    if not 1 <= args.layers <= most:
        parser.error(f"--layers must be 1 to {most} ({args.model} has no more), got {args.layers}")
    if args.tokens < 2 or args.tokens % 2:
        parser.error(f"--tokens must be a multiple of 2 (two chunks), got {args.tokens}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Check, time and print; 1 where the loss or a gradient is wrong."""
    args = parse(argv)
    rows = beside = peer(args) if args.peer else []
    this = Slice.of(args.model, args.layers, args.remat)
    shapes = abstract_state(this.make)[1]
    flops, count = training_flops(this.config, args.tokens), sum(x.size for x in jax.tree.leaves(shapes))
    sizes = {"parameters": count, "training TFLOP": flops / 1e12}
    report = Report("bench_slice", argv, args.out, name=f"slice-{args.model}", **sizes)
    print(f"{args.layers} layers of {args.model}: {count / 1e9:.2f} B parameters, {flops / 1e12:.1f} TFLOP a step")
    params = init_state(this.make, this.sharding, jax.random.key(0))[1]
    if not report.check("check", this.check(params, min(args.tokens, CHECKED))):
        return report.status
    task, batch = this.task(), this.batch(args.tokens)
    clock = Clock(1 if args.quick else 7, 1, 0.0 if args.quick else 0.3, jax.block_until_ready)

    if args.only != "step":
        gradient = jax.jit(jax.value_and_grad(task.objective, has_aux=True))
        losses = jax.block_until_ready(gradient(params, batch))[0][1]  # and no copy of all gradients for the peak
        ms = clock.in_turn({"gradient": lambda: gradient(params, batch)})["gradient"]
        rows = [*rows, row("gradient", ms, losses.loss, args, flops, beside)]
        report.add("slice", rows, SPEED)
        del gradient
    if args.only != "gradient":
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5, weight_decay=0.1))
        where = state_shardings(shapes, tx, this.sharding)
        state = [TrainState(params, jax.jit(tx.init, out_shardings=where.opt_state)(params))]
        del params
        step = jax.jit(make_step(task, tx), donate_argnums=0, out_shardings=(where, None))

        def once():
            state[0], metrics = step(state[0], batch)
            return metrics

        metrics = jax.block_until_ready(once())
        rows = [*rows, row("step", clock.in_turn({"step": once})["step"], metrics.losses.loss, args, flops, beside)]
        report.add("slice", rows, SPEED)
        if args.profile:
            with jax.profiler.trace(str(args.profile)):
                jax.block_until_ready(once())
            print(f"trace of one step in {args.profile}; kernels by their time:")
            print(busiest([e for events in read(args.profile).values() for e in events]))
    return report.status


if __name__ == "__main__":
    sys.exit(main())
