"""The ring on the GPUs of one host: that it is right, what zigzag wins, what the hops cost, how it scales.

    python examples/bench_multigpu.py                          all of it, under ten minutes on four GPUs
    python examples/bench_multigpu.py --only times,trace       a part
    python examples/bench_multigpu.py --quick --cpu-devices 4  does it run at all? (no GPU needed)

    check      the ring on every cp that fits, over NCCL, against the same kernels on one GPU: causal, packed documents,
               a window whose middle hops are dead, under jax.checkpoint, contiguous shards, all-gather
    times      Qwen3-30B-A3B's attention, 32k tokens on all GPUs: contiguous shards (the naive ring), zigzag, all-gather
               and tokens/s at fixed tokens a GPU and at a fixed sequence, beside cp = 1
    slices     4 layers of Qwen3-30B-A3B and of DeepSeek-V2-Lite (latent and expanded keys travel), AdamW, 32k tokens
               a GPU: tokens/s, MFU, peak memory; --ep N: every GPU has its share of the experts
    trace      three forwards and backwards under the profiler: hops, steps, and communication with no kernel beside it

Nothing is timed where a result is wrong, and the exit status is 1; without `check` in --only the heads that are timed
are checked. Times are medians over samples that run in turn, with rests (clock.py); a call ends when the slowest GPU
has finished. Flags of XLA and NCCL are the environment's: run it again under others and compare. --out DIR writes
multigpu.json and .png, and the trace with its picture.
"""

import argparse
import sys

import jax
from bench import Report, flags, jax_clock
from bench_gpus import TRACED, Bench
from bench_inputs import MODELS
from bench_model import CHECKED, Slice, Training
from bench_picture import Chart
from trace_hops import by_kernel, hops, steps, summary
from trace_picture import draw

from zigzag_jax.models.sharding import init_state
from zigzag_jax.models.stack import REMAT

LAYOUTS = Chart(("fwd ms", "bwd ms"), ("layout",), stacked=True)
SCALING = Chart(("tokens/s",), ("case",))
SLICES = Chart(("tokens/s",), ("slice",))
SLICED = {"qwen3-30b-a3b": (None,), "deepseek-v2-lite": ("latent", "expanded")}  # payloads of a ring
TINY = {"tiny-qwen3-moe": (None,), "tiny-deepseek-v2": ("latent", "expanded")}


# --------------------------------------------------------------------------------------------------------------- parts
def tell_times(report: Report, bench: Bench) -> None:
    """Layouts, and scaling."""
    times = bench.times()
    report.add("layouts", bench.layouts(times), LAYOUTS)
    report.add("scaling", bench.scaling(times), SCALING)


def tell_trace(report: Report, bench: Bench) -> None:
    """What the profiler saw of a zigzag ring, forward and backward."""
    gpus, rows, stepped = bench.trace(), [], []
    sent = TRACED * 3 * (bench.devices - 1)  # the payload forward and backward, and the gradient
    for gpu, events in gpus.items():
        row = summary(events)
        share = row["exposed ms"] / (row["trace ms"] - row["idle ms"])
        flights = {"flights": len(hops(events)), "exposed us a hop": row["exposed ms"] / sent * 1e3}
        rows.append({"GPU": gpu, **row, **flights, "exposed %": share})
        stepped += [{"GPU": gpu, **kernel} for kernel in by_kernel(steps(events))]
    report.add("trace", rows)
    report.add("trace steps", stepped)
    if report.out and report.draws and gpus:
        draw(gpus, report.out / "trace.png")


def sliced(bench: Bench) -> dict[str, Slice]:
    """The slices by what tells them apart."""
    layers = 2 if bench.quick else 4
    make = lambda model, payload: Slice.of(
        model, layers, bench.remat, bench.devices, bench.ep, balanced=bench.balanced, payload=payload
    )
    return {
        f"{layers} layers of {model}{', ' if payload else ''}{payload or ''}": make(model, payload)
        for model, payloads in (TINY if bench.quick else SLICED).items()
        for payload in payloads
    }


def tell_slices(report: Report, bench: Bench) -> None:
    """A training step of real layers."""
    rows, checks, length = [], [], (64 if bench.quick else 32768) * bench.devices
    for name, this in sliced(bench).items():
        params = init_state(this.make, this.sharding, jax.random.key(0))[1]
        checks += [{**row, "by": name} for row in this.check(params, min(length, CHECKED))]
        if name in report.check("slices' check", checks):
            training = Training(this, params, length)
            losses = jax.block_until_ready(training.once())
            ms = bench.clock._replace(repeats=1).in_turn({name: training.once})[name]
            rows.append({
                "slice": name, "tokens": length, "step ms": ms, **this.speed(length, ms), "loss": float(losses.loss),
            })  # fmt: skip
            report.add("slices", rows, SLICES, "The peak is that of all that ran before.")
            del training
        del params


PARTS = {"times": tell_times, "trace": tell_trace, "slices": tell_slices}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["check", *PARTS]
    parser.add_argument("--only", type=lambda text: text.split(","), default=parts, help=f"of {', '.join(parts)}")
    parser.add_argument("--devices", type=int, help="GPUs of the ring (all)")
    parser.add_argument("--tokens", type=int, help="of the whole sequence (8192 a GPU; with --quick 64)")
    parser.add_argument("--ep", type=int, default=1, help="GPUs that share the slices' experts out: 1 or all")
    parser.add_argument("--remat", default="attention", choices=list(REMAT), help="what the slices' layers keep")
    parser.add_argument("--balanced", action="store_true", help="the slices' tokens go to all experts in turn")
    parser.add_argument("--cpu-devices", type=int, help="that many devices on this CPU in the place of GPUs")
    flags(parser)
    args = parser.parse_args(argv)
    if unknown := [part for part in args.only if part not in parts]:
        parser.error(f"--only must be of {', '.join(parts)}, got {', '.join(unknown)}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Check, time, print; 1 where a result falls short of the bars."""
    args = parse(argv)
    if args.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.cpu_devices)
    devices = args.devices or len(jax.devices())
    if not 1 < devices <= len(jax.devices()):
        print(f"error: --devices: must be 2 to {len(jax.devices())} (what there is), got {devices}", file=sys.stderr)
        return 2
    if args.ep not in (1, devices):
        print(f"error: --ep: must be 1 or the GPUs of the ring = {devices}, got {args.ep}", file=sys.stderr)
        return 2
    report = Report("bench_multigpu", argv, args.out)
    print(f"{devices} devices; {report.run['flags']}")
    models = {name: MODELS[name].smaller() if args.quick else MODELS[name] for name in ("qwen", "mla")}
    bench = Bench(
        devices,
        args.tokens or (64 if args.quick else 8192) * devices,
        64 * devices if args.quick else 2048 * devices,
        models,
        jax_clock(args.quick),
        args.out,
        args.quick,
        args.balanced,
        args.remat,
        args.ep,
    )
    parts = [part for part in args.only if part != "check"]
    if args.only != ["slices"]:  # whose check is their own
        checked = bench if "check" in args.only else bench._replace(models={"qwen": models["qwen"]})
        if "qwen" not in report.check("check", checked.check(), by="model"):
            return report.status
    for part in parts:
        PARTS[part](report, bench)
    return report.status


if __name__ == "__main__":
    sys.exit(main())
