"""A slice of a real model on one GPU: some layers, embedding and head, one long sequence; tokens/s, MFU and memory.

    python examples/bench_slice.py                            4 layers of Qwen3-30B-A3B, 32k tokens
    python examples/bench_slice.py --model deepseek-v2-lite
    python examples/bench_slice.py --quick                    does it run at all? (no GPU needed)

`gradient` is forward and backward, `step` is that and AdamW's update; parameters, gradients and moments are float32,
the arithmetic is bfloat16, layers are rematerialised (--remat). Time is the median of steps on random tokens, a rest
before each. MFU counts what the model means (models/flops.py), so recomputation does not count. The peak of `step` is
that of both: --only step for its own. --profile says which kernels a step's time goes to.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import read_trace
from bench_common import facts
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from zigzag_jax.models.flops import H100_FLOPS, training_flops
from zigzag_jax.models.presets import PRESETS
from zigzag_jax.models.registry import model_of
from zigzag_jax.models.sharding import Sharding, abstract_state, init_state
from zigzag_jax.models.stack import REMAT
from zigzag_jax.train.step import TrainState, make_step, state_shardings
from zigzag_jax.train.task import Task

AXES = ("dp", "fsdp", "cp")


def random_batch(vocab: int, length: int, mesh: Mesh) -> dict[str, jax.Array]:
    """One document of random tokens; the order of random tokens does not matter."""
    tokens = np.random.default_rng(0).integers(0, vocab, (1, length + 1), dtype=np.int32)
    arrays = {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "positions": np.arange(length, dtype=np.int32)[None],
        "real": np.ones((1, length), bool),
    }
    return jax.device_put(arrays, NamedSharding(mesh, P(("dp", "fsdp"), "cp")))


def median_ms(call, samples: int, rest: float) -> float:
    """Of one call, waited for."""
    times = []
    for _ in range(samples):
        time.sleep(rest)
        begin = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e3


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-30b-a3b", choices=list(PRESETS))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32768, help="of the one sequence")
    parser.add_argument("--remat", default="attention", choices=list(REMAT))
    parser.add_argument("--only", choices=["gradient", "step"], help="one of the two")
    parser.add_argument("--peak", type=float, default=H100_FLOPS, help="FLOPs a second that MFU is measured against")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="trace one step into DIR")
    parser.add_argument("--quick", action="store_true", help="a tiny model, 256 tokens, one sample")
    parser.add_argument("--json", type=Path, help="a file for the numbers")
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
    """Time and print; 1 where the loss is not finite."""
    args = parse(argv)
    config = dataclasses.replace(PRESETS[args.model], num_hidden_layers=args.layers)
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES)
    sharding, dtype = Sharding(mesh), jnp.bfloat16
    make = lambda rngs: model_of(config)(config, sharding, dtype=dtype, remat=args.remat, rngs=rngs)
    graphdef, shapes = abstract_state(make)
    task = Task(graphdef, sharding, dtype, config.aux_loss, config.aux_coefficient)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5, weight_decay=0.1))
    batch = random_batch(config.vocab_size, args.tokens, mesh)
    params = init_state(make, sharding, jax.random.key(0))[1]
    flops, count = training_flops(config, args.tokens), sum(x.size for x in jax.tree.leaves(shapes))
    run = facts("bench_slice.py", argv) | {"parameters": count, "training TFLOP": flops / 1e12}
    print(f"    {run['command']}\n\n{run['card']}, jax {run['jax']}, {run['date']}")
    print(f"{args.layers} layers of {args.model}: {count / 1e9:.2f} B parameters, {flops / 1e12:.1f} TFLOP a step")
    samples, rest = (1, 0.0) if args.quick else (7, 0.3)
    results = {}

    def report(name: str, ms: float, loss: jax.Array) -> None:
        memory = jax.devices()[0].memory_stats() or {}
        peak = memory.get("peak_bytes_in_use", 0) / 2**30
        mfu = flops / (ms / 1e3) / args.peak
        results[name] = {
            "ms": ms, "tokens/s": args.tokens / ms * 1e3, "mfu": mfu, "peak GiB": peak, "loss": float(loss),
        }  # fmt: skip
        print(
            f"{name}: {ms:.1f} ms, {args.tokens / ms * 1e3:.0f} tokens/s, MFU {mfu:.3f}, peak {peak:.1f} GiB, "
            f"loss {float(loss):.4f}",
            flush=True,
        )

    if args.only != "step":
        gradient = jax.jit(jax.value_and_grad(task.objective, has_aux=True))
        losses = jax.block_until_ready(gradient(params, batch))[0][1]  # and no copy of all gradients for the peak
        report("gradient", median_ms(lambda: gradient(params, batch), samples, rest), losses.loss)
        del gradient
    if args.only != "gradient":
        where = state_shardings(shapes, tx, sharding)
        state = [TrainState(params, jax.jit(tx.init, out_shardings=where.opt_state)(params))]
        del params
        step = jax.jit(make_step(task, tx), donate_argnums=0, out_shardings=(where, None))

        def once():
            state[0], metrics = step(state[0], batch)
            return metrics

        metrics = jax.block_until_ready(once())
        report("step", median_ms(once, samples, rest), metrics.losses.loss)
        if args.profile:
            with jax.profiler.trace(str(args.profile)):
                jax.block_until_ready(once())
            print(f"trace of one step in {args.profile}; kernels by their time:")
            print(read_trace.busiest([e for events in read_trace.read(args.profile).values() for e in events]))
    if args.json:
        args.json.write_text(json.dumps({**run, "results": results}, indent=1))
    return int(not all(np.isfinite(row["loss"]) for row in results.values()))


if __name__ == "__main__":
    sys.exit(main())
