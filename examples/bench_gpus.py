"""A ring on several GPUs, as bench_multigpu.py tells of it: against one GPU, its times, and its trace."""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from bench import verdict
from bench_inputs import Heads, Inputs, documents, relative
from bench_layer import Attention, compile_all
from clock import Clock
from trace_events import Event, read

BARS = {"out": 3e-3, "dq": 5e-3, "dk": 5e-3, "dv": 5e-3}  # relative L2 between two bfloat16 results of float32 sums
NAMES = tuple(BARS)
TRACED = 3  # forwards and backwards

Case = tuple[Attention, int]
"""What is timed: an attention layer and the tokens of its sequence."""


class Bench(NamedTuple):
    """The parts."""

    devices: int
    tokens: int
    """Of the whole sequence on all GPUs."""
    check_tokens: int
    models: dict[str, Heads]
    clock: Clock
    out: Path | None
    quick: bool = False
    balanced: bool = False
    """Whether the slices' experts all have the same work."""
    remat: str = "attention"
    """What the slices' layers keep."""
    ep: int = 1
    """GPUs that share the slices' experts out among themselves: 1 or all."""

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
        largest = ("window", "contiguous", "allgather")  # of which the largest ring says enough
        for model in self.models:
            for form, options in forms.items():
                for cp in [1] * (form in alone) + (rings[-1:] if form in largest else rings):
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

    def timed(self, cases: dict[str, Case]) -> dict[tuple[str, str], float]:
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

    def times(self) -> dict[Case, tuple[float, float]]:
        """Milliseconds forward and backward of all that `layouts` and `scaling` tell of, each timed once."""
        cases = {case: None for case in [*self.layout_cases().values(), *self.scaling_cases().values()]}
        ms = self.timed({str(i): case for i, case in enumerate(cases)})
        return {case: (ms[str(i), "fwd"], ms[str(i), "bwd"]) for i, case in enumerate(cases)}

    def layout_cases(self) -> dict[str, Case]:
        """The naive ring, zigzag and all-gather."""
        cp = self.devices
        attentions = {
            "naive ring": Attention(cp, layout="contiguous"),
            "zigzag ring": Attention(cp),
            "zigzag all-gather": Attention(cp, strategy="allgather"),
        }
        return {name: (attention, self.tokens) for name, attention in attentions.items()}

    def scaling_cases(self) -> dict[str, Case]:
        """Zigzag at fixed tokens a GPU, and at a fixed sequence."""
        rings = [cp for cp in (1, 2, 4, 8) if cp <= self.devices]
        local = self.tokens // self.devices
        cases = {f"{local} tokens a GPU, cp {cp}": (Attention(cp), local * cp) for cp in rings}
        return cases | {f"{self.tokens} tokens, cp {cp}": (Attention(cp), self.tokens) for cp in rings}

    def layouts(self, times: dict[Case, tuple[float, float]]) -> list[dict]:
        """The rows of `layout_cases`."""
        cases = self.layout_cases()
        naive, rows = times[cases["naive ring"]], []
        for name, case in cases.items():
            fwd, bwd = times[case]
            rows.append({
                "layout": name, "cp": self.devices, "fwd ms": fwd, "bwd ms": bwd, "both ms": fwd + bwd,
                "naive / fwd": naive[0] / fwd, "naive / bwd": naive[1] / bwd, "naive / both": sum(naive) / (fwd + bwd),
            })  # fmt: skip
        return rows

    def scaling(self, times: dict[Case, tuple[float, float]]) -> list[dict]:
        """The rows of `scaling_cases`."""
        cases, rows = self.scaling_cases(), []
        first = {length: sum(times[case]) for case in cases.values() if case[0].cp == 1 for length in [case[1]]}
        local = self.tokens // self.devices
        for name, case in cases.items():
            (attention, length), t = case, sum(times[case])
            # work grows with the square of the sequence: cp times the tokens on cp GPUs take cp times as long
            fixed = name.startswith(f"{self.tokens} tokens, ")
            ideal = first[self.tokens] / attention.cp if fixed else first[local] * attention.cp
            rows.append({"case": name, "both ms": t, "tokens/s": length / t * 1e3, "% of ideal": ideal / t})
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
