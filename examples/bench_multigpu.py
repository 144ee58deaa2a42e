"""The ring on the GPUs of one host: that it is right, what zigzag wins, what the hops cost, how it scales.

    python examples/bench_multigpu.py                          all of it, under ten minutes on four GPUs
    python examples/bench_multigpu.py --only layouts,trace     a part
    python examples/bench_multigpu.py --quick --cpu-devices 4  does it run at all? (no GPU needed)

    check      the ring on every cp that fits, over NCCL, against the same kernels on one GPU: causal, packed documents,
               a window whose middle hops are dead, under jax.checkpoint; exit status 1 where one falls short
    layouts    Qwen3-30B-A3B's attention, 32k tokens on all GPUs: contiguous shards (the naive ring), zigzag, all-gather
    scaling    tokens/s at fixed tokens a GPU and at a fixed sequence, beside cp = 1
    trace      one forward and backward under the profiler: communication with and without a kernel beside it

Times are medians over samples that run in turn, with rests; a call ends when the slowest GPU has finished. Flags of XLA
and NCCL are the environment's: run it again under others and compare.
"""

import argparse
import concurrent.futures
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import read_trace
from bench_common import MODELS, Clock, Heads, Inputs, documents, facts, relative, table
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from zigzag_jax import from_zigzag, to_zigzag, zigzag_attention
from zigzag_jax.layout import Layout
from zigzag_jax.ring import Strategy

BARS = {"out": 3e-3, "dq": 5e-3, "dk": 5e-3, "dv": 5e-3}  # relative L2 between two bfloat16 results of float32 sums
NAMES = tuple(BARS)


class Attention(NamedTuple):
    """One attention layer on some of the GPUs."""

    cp: int
    layout: Layout = "zigzag"
    strategy: Strategy = "ring"
    window: int | None = None
    remat: bool = False

    @property
    def mesh(self) -> Mesh:
        """The first cp devices."""
        return Mesh(np.array(jax.devices()[: self.cp]), ("cp",))

    def put(self, x, order: bool = True):
        """An array in natural order, sharded over the ring."""
        x = to_zigzag(np.asarray(x), self.cp) if order and self.layout == "zigzag" else x
        return jax.device_put(x, NamedSharding(self.mesh, P(None, "cp", *[None] * (np.ndim(x) - 2))))

    def natural(self, x) -> np.ndarray:
        """A result in natural order on the host, float32."""
        x = np.asarray(x.astype(jnp.float32))
        return from_zigzag(x, self.cp) if self.layout == "zigzag" else x

    @property
    def function(self) -> Callable:
        """(q, k, v[, positions]) -> out."""

        def attend(q, k, v, positions=None):
            return zigzag_attention(
                q, k, v, positions=positions, window=self.window, mesh=self.mesh, spec=P(None, "cp", None, None),
                layout=self.layout, strategy=self.strategy,
            )  # fmt: skip

        return jax.checkpoint(attend) if self.remat else attend

    def results(self, q, k, v, dout, positions):
        """Out and the gradients."""
        out, pull = jax.vjp(lambda *qkv: self.function(*qkv, positions), q, k, v)
        return out, *pull(dout)


def compile_all(jobs: dict[Any, tuple[Callable, tuple]]) -> dict[Any, Callable]:
    """Every function compiled for its arguments, in parallel: a compiler thread for each."""
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        compiled = {key: pool.submit(lambda f, a: jax.jit(f).lower(*a).compile(), f, a) for key, (f, a) in jobs.items()}
        return {key: job.result() for key, job in compiled.items()}


class Bench(NamedTuple):
    """The parts."""

    devices: int
    tokens: int
    """Of the whole sequence on all GPUs."""
    check_tokens: int
    models: dict[str, Heads]
    clock: Clock
    out: Path | None

    def check(self) -> list[dict]:
        """Against one GPU, with random cotangents."""
        length, rings = self.check_tokens, [cp for cp in (2, 4, 8) if cp <= self.devices]
        window = length // 16  # shorter than a chunk: the middle hops of a ring of four are dead
        packed = documents(5, length)
        masks = {"causal": jnp.arange(length, dtype=jnp.int32)[None], "documents": packed}
        jobs, data = {}, {name: Inputs.draw(heads, length, jnp.bfloat16) for name, heads in self.models.items()}

        def add(model: str, form: str, attention: Attention) -> None:
            arguments = [attention.put(x) for x in (*data[model], masks["causal"])]
            jobs[model, form, attention.cp] = attention.results, arguments

        forms = {"plain": {}, "remat": {"remat": True}, "window": {"window": window}}
        for model in self.models:
            for form, options in forms.items():
                for cp in [1, *rings]:
                    if form != "remat" or cp > 1:
                        add(model, form, Attention(cp, **options))
        run, rows = compile_all(jobs), []
        for (model, form, cp), call in run.items():
            for mask, positions in masks.items():
                if cp == 1:
                    continue
                one, many = Attention(1), Attention(cp)
                reference = run[model, "plain" if form == "remat" else form, 1]
                x = data[model]
                want = reference(*(one.put(a) for a in (*x, positions)))
                got = call(*(many.put(a) for a in (*x, positions)))
                off = {n: relative(many.natural(a), one.natural(b)) for n, a, b in zip(NAMES, got, want, strict=True)}
                short = [name for name, bar in BARS.items() if not off[name] <= bar]
                figures = {name: f"{error:.1e}" for name, error in off.items()}
                verdict = f"FAIL {' '.join(short)}" if short else "ok"
                rows.append({"model": model, "cp": cp, "form": form, "mask": mask, **figures, "verdict": verdict})
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

    def trace(self) -> list[dict]:
        """What the profiler saw of a zigzag ring, forward and backward."""
        attention, heads = Attention(self.devices), next(iter(self.models.values()))
        x = [attention.put(a, order=False) for a in Inputs.draw(heads, self.tokens, jnp.bfloat16)]
        positions = attention.put(jnp.arange(self.tokens, dtype=jnp.int32)[None])
        run = jax.jit(attention.results)
        for _ in range(3):
            jax.block_until_ready(run(*x, positions))
        folder = (self.out or Path(".")) / "trace"
        with jax.profiler.trace(str(folder)):
            for _ in range(3):
                jax.block_until_ready(run(*x, positions))
        gpus = read_trace.read(folder)
        if self.out and gpus:
            try:
                read_trace.draw(gpus, self.out / "trace.png")
            except ImportError:
                print("no picture of the trace: matplotlib is not installed")
        hops = 3 * 3 * (self.devices - 1)  # of payload forward and backward, and of the gradient; in each of three runs
        rows = []
        for gpu, events in gpus.items():
            row = read_trace.summary(events)
            share = row["exposed ms"] / (row["trace ms"] - row["idle ms"])
            rows.append({"GPU": gpu, **row, "exposed us a hop": row["exposed ms"] / hops * 1e3, "exposed %": share})
        return rows


PARTS = {"check": Bench.check, "layouts": Bench.layouts, "scaling": Bench.scaling, "trace": Bench.trace}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--devices", type=int, help="GPUs of the ring (all)")
    parser.add_argument("--tokens", type=int, help="of the whole sequence (8192 a GPU; with --quick 64)")
    parser.add_argument("--cpu-devices", type=int, help="that many devices on this CPU in the place of GPUs")
    parser.add_argument("--quick", action="store_true", help="few tokens and heads, one sample: does it run at all?")
    parser.add_argument("--out", type=Path, help="a folder for numbers.json, the trace and its picture")
    args = parser.parse_args(argv)
    if unknown := [part for part in args.only if part not in PARTS]:
        parser.error(f"--only must be of {', '.join(PARTS)}, got {', '.join(unknown)}")
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
    run = facts("bench_multigpu.py", argv) | {
        "cards": f"{devices} x {jax.devices()[0].device_kind}",
        "environment": {n: os.environ[n] for n in sorted(os.environ) if n.startswith("NCCL_") or n == "XLA_FLAGS"},
    }
    print(f"    {run['command']}\n\n{run['cards']}, jax {run['jax']}, {run['date']}; {run['environment']}")
    models = {name: MODELS[name].smaller() if args.quick else MODELS[name] for name in ("qwen", "mla")}
    bench = Bench(
        devices,
        args.tokens or (64 if args.quick else 8192) * devices,
        64 * devices if args.quick else 2048 * devices,
        models,
        Clock(1, 1, 0.0, 256) if args.quick else Clock(5, 10, 0.3, 8192),
        args.out,
    )
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    results = {}
    for part in args.only:
        results[part] = rows = PARTS[part](bench)
        print(f"\n{part}: {PARTS[part].__doc__}\n\n{table(rows) if rows else 'Nothing here can run it.'}", flush=True)
        if args.out:
            (args.out / "numbers.json").write_text(json.dumps({**run, "results": results}, indent=1))
    return int(any(row["verdict"] != "ok" for row in results.get("check", [])))


if __name__ == "__main__":
    sys.exit(main())
