"""A slice of a real model on one GPU, or on the ring of --cp: some layers, embedding and head, one long sequence.

    python examples/bench_slice.py                            4 layers of Qwen3-30B-A3B, 32k tokens
    python examples/bench_slice.py --model deepseek-v2-lite
    python examples/bench_slice.py --cp 4 --tokens 131072
    python examples/bench_slice.py --cp 4 --ep 4 --tokens 131072      tokens travel to the experts
    python examples/bench_slice.py --balanced                 all experts have the same work
    python examples/bench_slice.py --peer                     beside `transformers`, where it is installed
    python examples/bench_slice.py --quick                    does it run at all? (no GPU needed)

`gradient` is forward and backward, `step` is that and AdamW's update; parameters, gradients and moments are float32,
the arithmetic is bfloat16, layers are rematerialised (--remat). Before any time is taken the first tokens' loss and
gradient are compared with float32 arithmetic and plain XLA's kernels; where they are wrong nothing is timed and the
exit status is 1. Time is the median of 7 steps on random tokens (clock.py). MFU counts what the model means
(models/flops.py), so recomputation does not count. The peak of `step` is that of all that ran before: --only step for
its own. --profile says to which named scopes and kernels a step's time goes. --out DIR writes slice-MODEL.json, .png.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
from bench import Report, flags
from bench_model import CHECKED, Slice, Training
from bench_picture import Chart
from clock import Clock
from trace_events import read
from trace_hops import busiest

from zigzag_jax.models.flops import H100_FLOPS, training_flops
from zigzag_jax.models.presets import PRESETS
from zigzag_jax.models.sharding import abstract_state, init_state
from zigzag_jax.models.stack import REMAT
from zigzag_jax.train.logs.scopes import by_scope, launches, table

SPEED = Chart(("tokens/s",), ("pass",), ("by",))


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


def row(name: str, ms: float, loss: jax.Array, args: argparse.Namespace, this: Slice, beside: list[dict]) -> dict:
    """What is said of a pass; beside: the peer's rows."""
    speed = this.speed(args.tokens, ms, args.peak)
    other = next((row["tokens/s"] for row in beside if row["pass"] == name), None)
    return {
        "by": "zigzag_jax", "pass": name, "ms": ms, **speed, "loss": float(loss),
        "tokens/s / peer": other and speed["tokens/s"] / other,
    }  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-30b-a3b", choices=list(PRESETS))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32768, help="of the one sequence")
    parser.add_argument("--remat", default="attention", choices=list(REMAT))
    parser.add_argument("--cp", type=int, default=1, help="GPUs of a ring")
    parser.add_argument("--ep", type=int, default=1, help="GPUs that share the experts out among themselves: 1 or cp")
    parser.add_argument("--payload", choices=["latent", "expanded"], help="what of DeepSeek's keys travels")
    parser.add_argument("--balanced", action="store_true", help="tokens go to all experts in turn, past the router")
    parser.add_argument("--fused", action="store_true", help="SwiGLU inside the experts' matmuls")
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
    if not 1 <= args.cp <= len(jax.devices()):
        parser.error(f"--cp must be 1 to {len(jax.devices())} (what there is), got {args.cp}")
    if args.ep not in (1, args.cp):
        parser.error(f"--ep must be 1 or cp = {args.cp}, got {args.ep}")
    if args.fused and args.ep > 1:
        parser.error(f"--fused is of experts that lie whole on a GPU, got --ep {args.ep}")
    if args.peer and args.cp > 1:
        parser.error(f"--peer is one GPU's, got --cp {args.cp}")
    if args.tokens < 2 or args.tokens % (2 * args.cp):
        parser.error(f"--tokens must be a multiple of 2 * cp = {2 * args.cp} (two chunks a rank), got {args.tokens}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Check, time and print; 1 where the loss or a gradient is wrong."""
    args = parse(argv)
    rows = beside = peer(args) if args.peer else []
    options = {"balanced": args.balanced, "fused": args.fused, "payload": args.payload}
    this = Slice.of(args.model, args.layers, args.remat, args.cp, args.ep, **options)
    shapes = abstract_state(this.make)[1]
    flops, count = training_flops(this.config, args.tokens), sum(x.size for x in jax.tree.leaves(shapes))
    sizes = {"parameters": count, "training TFLOP": flops / 1e12}
    report = Report("bench_slice", argv, args.out, name=f"slice-{args.model}", **sizes)
    print(f"{args.layers} layers of {args.model}: {count / 1e9:.2f} B parameters, {flops / 1e12:.1f} TFLOP a step")
    params = init_state(this.make, this.sharding, jax.random.key(0))[1]
    if not report.check("check", this.check(params, min(args.tokens, CHECKED))):
        return report.status
    clock = Clock(1 if args.quick else 7, 1, 0.0 if args.quick else 0.3, jax.block_until_ready)

    if args.only != "step":
        gradient, batch = jax.jit(this.gradient(this.task())), this.batch(args.tokens)
        losses = jax.block_until_ready(gradient(params, batch))[0][1]  # and no copy of all gradients for the peak
        ms = clock.in_turn({"gradient": lambda: gradient(params, batch)})["gradient"]
        rows = [*rows, row("gradient", ms, losses.loss, args, this, beside)]
        report.add("slice", rows, SPEED)
        del gradient
    if args.only != "gradient":
        training = Training(this, params, args.tokens)
        del params
        losses = jax.block_until_ready(training.once())
        ms = clock.in_turn({"step": training.once})["step"]
        rows = [*rows, row("step", ms, losses.loss, args, this, beside)]
        report.add("slice", rows, SPEED)
        if args.profile:
            with jax.profiler.trace(str(args.profile)):
                jax.block_until_ready(training.once())
            print(f"trace of one step in {args.profile}; its time by named scope, and by kernel:")
            print("\n".join(table(by_scope(training.program(), launches(args.profile)), this.cp, steps=1)))
            print(busiest([e for events in read(args.profile).values() for e in events]))
    return report.status


if __name__ == "__main__":
    sys.exit(main())
