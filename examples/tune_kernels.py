"""Variants of the Hopper kernels beside those in use: that they are right, then how fast they are. Under 6 minutes.

    python examples/tune_kernels.py                  both families
    python examples/tune_kernels.py --only experts

    experts      SwiGLU on the way out of a grouped matmul (kernels/grouped/mosaic_swiglu.py) and passes of XLA,
                 a layer of Qwen3-30B-A3B at 32768 tokens
    attention    items that two blocks share (kernels/flash/mosaic_cuts.py), the same items drawn whole, and fixed
                 shares: the steps of a ring

A kernel with a mistake in its barriers never ends. So each family runs in processes of its own, which are killed after
their time: a small size first, both families at once, and only where that ended well the size of a model, alone.

`today` is what the models run. It is compared with float32 (at the small size), the variants with it; one that is off
is not timed, and the exit status is 1. Times are medians of 3 samples of 10 calls, the variants of a row in turn.
"""

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from bench import facts, table
from bench_inputs import MODELS, shapes, step_range
from clock import Clock

from zigzag_jax.kernels import flash_fwd, grouped_swiglu
from zigzag_jax.kernels.flash import mosaic as flash
from zigzag_jax.kernels.flash import mosaic_tuning
from zigzag_jax.kernels.flash.contract import Carry, Settings
from zigzag_jax.kernels.grouped import mosaic as grouped
from zigzag_jax.kernels.grouped import swiglu
from zigzag_jax.kernels.grouped.mosaic_pipeline import GroupedTuning

TODAY = "today"
SECONDS = {"small": 120, "experts": 120, "attention": 90}  # after which a process is killed


class Work(NamedTuple):
    """What a family runs, by (what, variant); `today` is the first variant of each `what`."""

    calls: dict[tuple[str, str], Callable[[], Any]]
    truth: dict[str, Callable[[], Any]]
    """By what: the same in float32, plain XLA."""

    bar: float
    """Relative L2 that a variant may be from `today`."""


def experts(small: bool) -> Work:
    """Both ways through SwiGLU, then forward and gradients of the MLP, recomputed as a model's layers are."""
    rows, groups, d, f = (8192, 24, 512, 768) if small else (262144, 128, 2048, 768)
    rng = np.random.default_rng(0)
    sizes = jnp.asarray(rng.multinomial(rows, rng.dirichlet(np.full(groups, 4.0))), jnp.int32)
    seeds = iter(jax.random.split(jax.random.key(0), 6))
    normal = lambda *size, dtype=jnp.bfloat16: jax.random.normal(next(seeds), size, dtype)
    x, dy, hidden = normal(rows, d), normal(rows, d), normal(rows, 2 * f)
    gate_up, down = normal(groups, d, 2 * f) * d**-0.5, normal(groups, f, d) * f**-0.5
    scale = normal(rows, dtype=jnp.float32)

    plain = swiglu.unfused(grouped.IMPLEMENTATION)
    inward, outward = {TODAY: plain.inward}, {TODAY: plain.outward}
    for name, drawn in (("fused, fixed shares", False), ("fused, drawn", True)):
        tuning = GroupedTuning(drawn=drawn)
        inward[name] = functools.partial(grouped.inward, tuning=tuning)
        outward[name] = functools.partial(grouped.outward, tuning=tuning)

    def layer(x, gate_up, down, scale, sizes, dy, fused=False, implementation="mosaic"):
        mlp = functools.partial(grouped_swiglu, group_sizes=sizes, fused=fused, implementation=implementation)
        y, vjp = jax.vjp(jax.checkpoint(mlp), x, gate_up, down, scale)
        return y, *vjp(dy)

    calls, inputs, whole = {}, (x, gate_up, scale, sizes), "forward, recomputed, and gradients"
    for what, keep in (("x to inner", False), ("x to inner, hidden kept", True)):
        for name, run in inward.items():
            calls[what, name] = functools.partial(jax.jit(functools.partial(run, keep=keep)), *inputs)
    for name, run in outward.items():
        calls["dy to dhidden", name] = functools.partial(jax.jit(run), dy, down, hidden, scale, sizes)
    for name, fused in ((TODAY, False), ("fused", True)):
        run = jax.jit(functools.partial(layer, fused=fused))
        calls[whole, name] = functools.partial(run, x, gate_up, down, scale, sizes, dy)

    def truth():
        wide = (a.astype(jnp.float32) for a in (x, gate_up, down, scale))
        return jax.jit(functools.partial(layer, implementation="reference"))(*wide, sizes, dy.astype(jnp.float32))

    return Work(calls, {whole: truth}, 5e-3)


def attention(small: bool) -> Work:
    """The forward of each step of a ring of four, with a result in bfloat16 and with a carry in place."""
    length, calls, truth = 2560 if small else 8192, {}, {}  # both cut items, the small one in two of its six steps
    for model in ("qwen", "mla"):
        heads = MODELS[model]
        seeds = iter(jax.random.split(jax.random.key(0), 4))
        normal = lambda h, d, dtype=jnp.bfloat16, seeds=seeds: jax.random.normal(next(seeds), (1, length, h, d), dtype)
        q, k = normal(heads.heads, heads.dim), normal(heads.kv_heads, heads.dim)
        v, out = normal(heads.kv_heads, heads.out_dim), normal(heads.heads, heads.out_dim, jnp.float32)
        table, settings = mosaic_tuning.HOPPER[heads.dim, heads.out_dim].forward, Settings(heads.dim**-0.5, None)
        whole, fixed = (dataclasses.replace(table, shares=shares) for shares in ("drawn", "fixed"))
        for name, tuning in ((TODAY, table), ("drawn whole", whole), ("fixed shares", fixed)):

            def run(carry, q, k, v, keys, tuning=tuning, settings=settings):
                dtype = jnp.dtype(q.dtype if carry is None else jnp.float32)
                return flash.flash_fwd(q, k, v, keys, settings, carry, dtype, tuning=tuning)

            plain, carried = jax.jit(run), jax.jit(run, donate_argnums=0)
            for step, source in shapes(1, 4).items():
                keys = step_range(1, source, 4, length)
                calls[f"{model} {step}", name] = functools.partial(plain, None, q, k, v, keys)
                calls[f"{model} {step}, carry", name] = in_place(carried, out, q, k, v, keys)
                truth[f"{model} {step}"] = functools.partial(exact, q, k, v, keys, scale=settings.scale)
    order = sorted(calls, key=lambda key: list(dict.fromkeys(what for what, _ in calls)).index(key[0]))
    return Work({key: calls[key] for key in order}, truth, 2e-3)  # P rounded at another maximum


@functools.partial(jax.jit, static_argnames="scale")
def exact(q, k, v, keys, *, scale):
    """The attention in float32."""
    q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
    return flash_fwd(q, k, v, keys, scale=scale, implementation="reference")


def in_place(step, out, *inputs) -> Callable[[], Any]:
    """A call that continues its own last result, from `out` [1, S, H, E] on."""
    state = []

    def call():
        start = state or [Carry(out.copy(), jnp.zeros((1, out.shape[2], out.shape[1]), jnp.float32))]
        state[:] = [Carry(*step(start[0], *inputs))]
        return state[0]

    return call


FAMILIES = {"experts": experts, "attention": attention}


@jax.jit
def apart(got, want) -> jax.Array:
    """The largest relative L2 of the arrays of two results; nan where one has what is not finite and the other not."""

    def one(a, b):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        size = jnp.linalg.norm(jnp.where(jnp.isinf(b), 0.0, b).ravel())
        return jnp.linalg.norm(jnp.where(a == b, 0.0, a - b).ravel()) / jnp.maximum(size, 1e-30)

    return jnp.stack([one(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)]).max()


def check(work: Work, exact: bool) -> list[dict]:
    """A row for each call: how far it is from `today`, or `today` from float32 if `exact`."""
    rows, today = [], None
    for (what, variant), call in work.calls.items():
        print(f"  {what}: {variant}", file=sys.stderr, flush=True)  # the last one named is the one that hangs
        got = jax.block_until_ready(call())
        error, bar = 0.0, work.bar
        if variant != TODAY:
            error = float(apart(got, today))
        else:
            today = got
            if exact and what in work.truth:
                error, bar = float(apart(got, work.truth[what]())), 1e-2
        verdict = "ok" if error <= bar else f"FAIL: {error:.1e} from {'float32' if variant == TODAY else TODAY}"
        rows.append({"what": what, "variant": variant, "verdict": verdict})
    return rows


def add_times(rows: list[dict], work: Work, clock: Clock) -> None:
    """Milliseconds into the rows of what is right."""
    for what in dict.fromkeys(row["what"] for row in rows):
        right = {row["variant"]: row for row in rows if row["what"] == what and row["verdict"] == "ok"}
        ms = clock.in_turn({variant: work.calls[what, variant] for variant in right})
        for variant, row in right.items():
            row |= {"ms": ms[variant], f"time / {TODAY}": ms[variant] / ms[TODAY] if TODAY in ms else None}


def child(family: str, size: str) -> int:
    """One family at one size: the rows as JSON, the last line on stdout."""
    card = jax.devices()[0]
    if getattr(card, "compute_capability", None) != "9.0":
        print(f"needs a Hopper GPU, got {card.device_kind}", file=sys.stderr)
        return 2
    work = FAMILIES[family](size == "small")
    rows = check(work, exact=size == "small")
    if size != "small":
        add_times(rows, work, Clock(3, 10, 0.3, jax.block_until_ready))
    print(json.dumps({"facts": facts("tune_kernels", []), "rows": rows}))
    return 0


def start(family: str, size: str) -> subprocess.Popen:
    """The process of one family at one size. Two small ones share the card: neither may take most of its memory."""
    env = os.environ | ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if size == "small" else {})
    command = [sys.executable, __file__, "--child", family, size]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


def finish(process: subprocess.Popen, family: str, size: str, deadline: float) -> dict | None:
    """What it found; None, and a line that says why, where it has not ended by `deadline` (time.monotonic)."""
    try:
        found, _ = process.communicate(timeout=max(deadline - time.monotonic(), 0.0))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        print(f"{family}, {size}: killed, it did not end in time", flush=True)
        return None
    if process.returncode:
        print(f"{family}, {size}: exit status {process.returncode}", flush=True)
        return None
    return json.loads(found.splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    """Check small, check and time large, print; 1 where something is off or did not end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(FAMILIES), help="one family")
    parser.add_argument("--json", type=Path, help="a file for all the numbers")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        return child(*args.child)
    families = [args.only] if args.only else list(FAMILIES)
    deadline = time.monotonic() + SECONDS["small"]
    processes = {family: start(family, "small") for family in families}
    results = {(family, "small"): finish(process, family, "small", deadline) for family, process in processes.items()}
    for family in families:
        small = results[family, "small"]
        if small is None or any(row["verdict"] != "ok" for row in small["rows"]):
            print(f"{family}: not run at a model's size, for the small one is not right", flush=True)
            continue
        deadline = time.monotonic() + SECONDS[family]
        results[family, "large"] = finish(start(family, "large"), family, "large", deadline)
    failed = len(results) < 2 * len(families)
    for (family, size), found in results.items():
        bad = found is None or [row for row in found["rows"] if row["verdict"] != "ok"]
        failed |= bool(bad)
        if found and (size == "large" or bad):
            card, version, date = (found["facts"][key] for key in ("card", "jax", "date"))
            print(f"\n{family}, {size}; {card}, jax {version}, {date}\n\n{table(full(found))}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({", ".join(key): found for key, found in results.items()}, indent=1))
    return int(failed)


def full(found: dict) -> list[dict]:
    """Rows with the same keys, as a table needs them."""
    return [{"what": "", "variant": "", "ms": None, f"time / {TODAY}": None} | row for row in found["rows"]]


if __name__ == "__main__":
    sys.exit(main())
