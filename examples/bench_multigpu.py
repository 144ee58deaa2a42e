"""The ring on the GPUs of one host: that it is right, what zigzag wins, what the hops cost, how it scales.

    python examples/bench_multigpu.py                          all of it, under ten minutes on four GPUs
    python examples/bench_multigpu.py --only layouts,trace     a part
    python examples/bench_multigpu.py --quick --cpu-devices 4  does it run at all? (no GPU needed)

    check      the ring on every cp that fits, over NCCL, against the same kernels on one GPU: causal, packed documents,
               a window whose middle hops are dead, under jax.checkpoint, contiguous shards, all-gather
    layouts    Qwen3-30B-A3B's attention, 32k tokens on all GPUs: contiguous shards (the naive ring), zigzag, all-gather
    scaling    tokens/s at fixed tokens a GPU and at a fixed sequence, beside cp = 1
    slices     4 layers of Qwen3-30B-A3B and of DeepSeek-V2-Lite (latent and expanded keys travel), AdamW, 32k tokens
               a GPU: tokens/s, MFU, peak memory
    trace      three forwards and backwards under the profiler: hops, steps, and communication with no kernel beside it

Nothing is timed where a result is wrong, and the exit status is 1; without `check` in --only the heads that are timed
are checked. Times are medians over samples that run in turn, with rests (clock.py); a call ends when the slowest GPU
has finished. Flags of XLA and NCCL are the environment's: run it again under others and compare. --out DIR writes
multigpu.json and .png, and the trace with its picture.
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from bench import Report, flags, jax_clock, verdict
from bench_inputs import MODELS, Heads, Inputs, documents, relative
from bench_layer import Attention, compile_all
from bench_model import CHECKED, Slice, Training
from bench_picture import Chart
from clock import Clock
from trace_events import Event, read
from trace_hops import by_kernel, hops, steps, summary
from trace_picture import draw

from zigzag_jax.models.flops import H100_FLOPS, training_flops
from zigzag_jax.models.sharding import init_state

BARS = {"out": 3e-3, "dq": 5e-3, "dk": 5e-3, "dv": 5e-3}  # relative L2 between two bfloat16 results of float32 sums
NAMES = tuple(BARS)
TRACED = 3  # forwards and backwards
LAYOUTS = Chart(("fwd ms", "bwd ms"), ("layout",), stacked=True)
SCALING = Chart(("tokens/s",), ("case",))
SLICES = Chart(("tokens/s",), ("slice",))
SLICED = {"qwen3-30b-a3b": (None,), "deepseek-v2-lite": ("latent", "expanded")}  # payloads of a ring
TINY = {"tiny-qwen3-moe": (None,), "tiny-deepseek-v2": ("latent", "expanded")}


class Bench(NamedTuple):
    """The parts."""

    devices: int
    tokens: int
    """Of the whole sequence on all GPUs."""
    check_tokens: int
    models: dict[str, Heads]
    clock: Clock
    out: Path | None
    slices: dict[str, Slice]
    slice_tokens: int

    def check(self) -> list[dict]:
        """Against one GPU, with random cotangents."""
        length, rings = self.check_tokens, [cp for cp in range(2, self.devices + 1) if cp in (2, 4, 8, self.devices)]
        window = length // 16  # shorter than a chunk: the middle hops of a ring of four are dead
        packed = documents(5, length)
        masks = {"causal": jnp.arange(length, dtype=jnp.int32)[None], "documents": packed}
        jobs, data = {}, {name: Inputs.draw(heads, length, jnp.bfloat16) for name, heads in self.models.items()}

        def add(model: str, form: str, attention: Attention) -> None:
            arguments = [attention.put(x) for x in (*data[model], masks["causal"])]
            jobs[model, form, attention.cp] = attention.results, arguments

        forms = {
            "plain": {}, "window": {"window": window}, "remat": {"remat": True},
            "contiguous": {"layout": "contiguous"}, "allgather": {"strategy": "allgather"},
        }  # fmt: skip
        alone = ("plain", "window")  # the others are on one GPU what "plain" is
        for model in self.models:
            for form, options in forms.items():
                for cp in [1, *rings] if form in alone else rings:
                    add(model, form, Attention(cp, **options))
        run, rows = compile_all(jobs), []
        for (model, form, cp), call in run.items():
            for mask, positions in masks.items():
                if cp == 1:
                    continue
                one, many = Attention(1), Attention(cp, **forms[form])
                reference = run[model, form if form in alone else "plain", 1]
                x = data[model]
                want = reference(*(one.put(a) for a in (*x, positions)))
                got = call(*(many.put(a) for a in (*x, positions)))
                off = {n: relative(many.natural(a), one.natural(b)) for n, a, b in zip(NAMES, got, want, strict=True)}
                figures = {name: f"{error:.1e}" for name, error in off.items()}
                row = {"model": model, "cp": cp, "form": form, "mask": mask, **figures}
                rows.append(row | {"verdict": verdict(off, BARS)})
        return rows

    def timed(self, cases: dict[str, tuple[Attention, int]]) -> dict[tuple[str, str], float]:
        """Milliseconds of (case, fwd | bwd), in turn."""
        data, jobs, heads = {}, {}, next(iter(self.models.values()))
        for name, (attention, length) in cases.items():
            # the order of random tokens does not matter to the time
            *qkv, dout = (attention.put(x, order=False) for x in Inputs.draw(heads, length, jnp.bfloat16))
            data[name] = qkv, dout
            jobs[name, "fwd"] = attention.function, qkv
            jobs[name, "pull"] = lambda q, k, v, f=attention.function: jax.vjp(f, q, k, v)[1], qkv
        run = compile_all(jobs)
        # collectives must start in one order on all GPUs: only the compiler works in parallel
        pulls = {name: jax.block_until_ready(run[name, "pull"](*qkv)) for name, (qkv, _) in data.items()}
        pull_back = lambda pull, dout: pull(dout)
        run |= compile_all({(name, "bwd"): (pull_back, (pulls[name], dout)) for name, (_, dout) in data.items()})
        turns = {}
        for name, (qkv, dout) in data.items():
            turns[name, "fwd"] = functools.partial(run[name, "fwd"], *qkv)
            turns[name, "bwd"] = functools.partial(run[name, "bwd"], pulls[name], dout)
        return self.clock.in_turn(turns)

    def layouts(self) -> list[dict]:
        """The naive ring, zigzag and all-gather."""
        cp = self.devices
        cases = {
            "naive ring": Attention(cp, layout="contiguous"),
            "zigzag ring": Attention(cp),
            "zigzag all-gather": Attention(cp, strategy="allgather"),
        }
        ms = self.timed({name: (attention, self.tokens) for name, attention in cases.items()})
        both = {name: ms[name, "fwd"] + ms[name, "bwd"] for name in cases}
        return [
            {
                "layout": name, "cp": cp, "fwd ms": ms[name, "fwd"], "bwd ms": ms[name, "bwd"], "both ms": both[name],
                "naive / fwd": ms["naive ring", "fwd"] / ms[name, "fwd"],
                "naive / bwd": ms["naive ring", "bwd"] / ms[name, "bwd"],
                "naive / both": both["naive ring"] / both[name],
            }
            for name in cases
        ]  # fmt: skip

    def scaling(self) -> list[dict]:
        """Zigzag at fixed tokens a GPU, and at a fixed sequence."""
        rings = [cp for cp in (1, 2, 4, 8) if cp <= self.devices]
        local = self.tokens // self.devices
        cases = {f"{local} tokens a GPU, cp {cp}": (Attention(cp), local * cp) for cp in rings}
        cases |= {f"{self.tokens} tokens, cp {cp}": (Attention(cp), self.tokens) for cp in rings[:-1]}
        ms, rows = self.timed(cases), []
        whole = cases | {f"{self.tokens} tokens, cp {rings[-1]}": cases[f"{local} tokens a GPU, cp {rings[-1]}"]}
        time = {name: ms[name, "fwd"] + ms[name, "bwd"] for name in cases}
        # work grows with the square of the sequence: cp times the tokens on cp GPUs take cp times as long
        ideal_local, ideal_whole = time[f"{local} tokens a GPU, cp 1"], time.get(f"{self.tokens} tokens, cp 1")
        for name, (attention, length) in whole.items():
            cp, fixed = attention.cp, name.startswith(f"{self.tokens} tokens, ")
            t = time.get(name) or time[f"{local} tokens a GPU, cp {cp}"]
            ideal = (ideal_whole or t) / cp if fixed else ideal_local * cp
            rows.append({
                "case": name, "both ms": t, "tokens/s": length / t * 1e3, "% of ideal": ideal / t,
            })  # fmt: skip
        return rows

    def trace(self) -> dict[str, list[Event]]:
        """The events of a zigzag ring, forward and backward, a few times; {} where there are no GPUs."""
        attention, heads = Attention(self.devices), next(iter(self.models.values()))
        x = [attention.put(a, order=False) for a in Inputs.draw(heads, self.tokens, jnp.bfloat16)]
        positions = attention.put(jnp.arange(self.tokens, dtype=jnp.int32)[None])
        run = jax.jit(attention.results)
        for _ in range(3):
            jax.block_until_ready(run(*x, positions))
        folder = (self.out or Path(".")) / "trace"
        with jax.profiler.trace(str(folder)):
            for _ in range(TRACED):
                jax.block_until_ready(run(*x, positions))
        return read(folder)


# --------------------------------------------------------------------------------------------------------------- parts
def tell_layouts(report: Report, bench: Bench) -> None:
    """The naive ring, zigzag and all-gather."""
    report.add("layouts", bench.layouts(), LAYOUTS)


def tell_scaling(report: Report, bench: Bench) -> None:
    """Zigzag at fixed tokens a GPU, and at a fixed sequence."""
    report.add("scaling", bench.scaling(), SCALING)


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


def tell_slices(report: Report, bench: Bench) -> None:
    """A training step of real layers."""
    rows, checks, length = [], [], bench.slice_tokens
    for name, this in bench.slices.items():
        params = init_state(this.make, this.sharding, jax.random.key(0))[1]
        checks += [{**row, "by": name} for row in this.check(params, min(length, CHECKED))]
        if name in report.check("slices' check", checks):
            training = Training(this, params, length)
            losses = jax.block_until_ready(training.once())
            ms = bench.clock._replace(repeats=1).in_turn({name: training.once})[name]
            memory, flops = jax.devices()[0].memory_stats(), training_flops(this.config, length)
            rows.append({
                "slice": name, "tokens": length, "step ms": ms, "tokens/s": length / ms * 1e3,
                "MFU": flops / (ms / 1e3) / H100_FLOPS / this.cp,
                "peak GiB": memory and memory["peak_bytes_in_use"] / 2**30, "loss": float(losses.loss),
            })  # fmt: skip
            report.add("slices", rows, SLICES, "The peak is that of all that ran before.")
            del training
        del params


PARTS = {"layouts": tell_layouts, "scaling": tell_scaling, "trace": tell_trace, "slices": tell_slices}


def sliced(devices: int, quick: bool) -> dict[str, Slice]:
    """The slices by what tells them apart."""
    layers = 2 if quick else 4
    return {
        f"{layers} layers of {model}{', ' if payload else ''}{payload or ''}": Slice.of(
            model, layers, "attention", devices, payload=payload
        )
        for model, payloads in (TINY if quick else SLICED).items()
        for payload in payloads
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["check", *PARTS]
    parser.add_argument("--only", type=lambda text: text.split(","), default=parts, help=f"of {', '.join(parts)}")
    parser.add_argument("--devices", type=int, help="GPUs of the ring (all)")
    parser.add_argument("--tokens", type=int, help="of the whole sequence (8192 a GPU; with --quick 64)")
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
        sliced(devices, args.quick) if "slices" in args.only else {},
        (64 if args.quick else 32768) * devices,
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
