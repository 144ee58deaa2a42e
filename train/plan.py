"""`python -m zigzag_jax.train.plan`: what fits on GPUs, said on a CPU host before any is asked for.

It takes the trainer's flags and which GPUs, compiles the trainer's own step for them, of shapes alone, and reads what
the program needs off the compiled program. Exit code 0 where the run fits and 1 where it does not: both are answers,
and `plan .. && sbatch ..` acts on them; 2 for a user's mistake.

It cannot see time, nor what lies outside of JAX's pool: the CUDA context, NCCL's buffers, loaded kernels.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import tyro
from rich.console import Console

from zigzag_jax.kernels import HOPPER
from zigzag_jax.models.stack import REMAT
from zigzag_jax.train.config import Config, check
from zigzag_jax.train.errors import DONE, FAILED, RunError, UserError, exit_code
from zigzag_jax.train.flags import command_line
from zigzag_jax.train.memory import traffic
from zigzag_jax.train.memory.footprint import Footprint, known_parts, measure
from zigzag_jax.train.memory.longest import MOST, longest
from zigzag_jax.train.memory.pool import DEFAULT, LARGE, Pool, start_with
from zigzag_jax.train.memory.topology import GPUS, GpuName, check_compiler, described_mesh
from zigzag_jax.train.mesh import AXES, check_batch, mesh_shape
from zigzag_jax.train.models import model_config
from zigzag_jax.train.program import Program, make_program

TILE = 128  # tokens: the attention kernels are fastest on chunks of whole tiles
GIB = 2**30

Say = Callable[[str], None]


@dataclass(frozen=True)
class PlanConfig(Config):
    """Say whether a training run fits on GPUs that are not here, what takes the memory, and how long rows may be."""

    gpu: GpuName = "h100"
    """Which card, in its SXM form."""
    gpus: int | None = None
    """How many; default: as many as the mesh has. Without a mesh cp goes over all of them."""
    memory_fraction: float = LARGE
    """Part of a card's memory that JAX takes: what XLA_PYTHON_CLIENT_MEM_FRACTION will be in the run (JAX's default is
    0.75). CUDA's context, NCCL and loaded kernels live in the rest."""
    longest: bool = True
    """Look for the longest seq-len that fits, too: two compiles more, mostly."""
    compare_remat: bool = False
    """Compile for every --remat and compare them, and nothing else."""


def plan(config: PlanConfig, say: Say) -> int:
    """Say what fits; returns the exit code. UserError for what a person can mend."""
    shape = checked_mesh(config)
    check_compiler()
    sizes, gpu = model_config(config), GPUS[config.gpu]
    mesh = described_mesh(config.gpu, shape, AXES, config.memory_fraction)
    build = lambda config: make_program(config, sizes, mesh, HOPPER)
    program = build(config)
    count = sum(x.size for x in jax.tree.leaves(program.parameters))
    cut = " * ".join(f"{axis} {size}" for axis, size in zip(AXES, shape, strict=True))
    say(f"{config.model}: {count / 1e9:.3f} billion parameters on {math.prod(shape)} x {gpu.name}, {cut}")
    say(f"{config.batch} rows of {config.seq_len} tokens a step, {config.dtype}, remat {config.remat}")
    pool = Pool(int(gpu.memory * config.memory_fraction))

    def compiled(**changes) -> Footprint:
        return _timed(dataclasses.replace(config, **changes), build, say)

    if config.compare_remat:
        return compare(compiled, pool, say)
    first = compiled()
    breakdown(first, known_parts(config, sizes, program), say)
    fits = verdict(config, first, gpu.memory, say)
    if config.longest:
        peak = lambda length: (first if length == config.seq_len else compiled(seq_len=length)).peak
        say_longest(config, first, peak, pool.room(first.state), shape[2], say)
    return DONE if fits else FAILED


def checked_mesh(config: PlanConfig) -> tuple[int, int, int]:
    """Sizes of (dp, fsdp, cp). UserError for what no run can have, and for a mesh that is not these GPUs."""
    check(config)
    if config.gpus is not None and config.gpus < 1:
        raise UserError("gpus", "must be >= 1", config.gpus)
    if not 0 < config.memory_fraction <= 1:
        raise UserError("memory-fraction", "must be > 0 and <= 1", config.memory_fraction)
    if config.mesh.dp is config.mesh.fsdp is config.mesh.cp is None and config.gpus is None:
        raise UserError("gpus", "must be given, or a mesh", None)
    shape = mesh_shape(config.mesh, config.gpus)
    if config.gpus not in (None, size := math.prod(shape)):
        rule = f"must be {' * '.join(AXES)} = {' * '.join(map(str, shape))} = {size}"
        raise UserError("gpus", rule, config.gpus)
    check_batch(config.batch, config.accumulate, shape)
    return shape


def _timed(config: PlanConfig, build: Callable[[Config], Program], say: Say) -> Footprint:
    say(f"compiling for rows of {config.seq_len} tokens, remat {config.remat} (minutes for a large model) ..")
    begin = time.monotonic()
    footprint = measure(config, build(config))
    took, hops = time.monotonic() - begin, traffic.hops_said(footprint.travels)
    say(f".. peak {footprint.peak / GIB:.2f} GiB a device; {hops} ({took:.0f} s)")
    return footprint


def breakdown(footprint: Footprint, parts: dict[str, int], say: Say) -> None:
    """What takes the memory."""
    line = lambda size, text, indent=0: say(f"{' ' * indent}{size / GIB:10.2f}  {text}")
    say("\nGiB of a device")
    line(footprint.parameters, "parameters, float32")
    line(footprint.optimiser, "optimiser")
    line(footprint.batch, "batch")
    line(footprint.temporary, "temporary; in it, but not all at one time:")
    for name, size in parts.items():
        line(size, name, indent=8)
    kept = footprint.kept.most_common()
    for kind, size in kept[:4]:
        line(size, f"kept by the layers{' ON THE HOST' * kind.on_host}, from each {kind.kind} in all", indent=8)
    if rest := sum(size for _, size in kept[4:]):
        line(rest, f"kept by the layers, {len(kept) - 4} kinds more", indent=8)
    line(footprint.peak, "peak")
    if footprint.host:
        line(footprint.host, "pinned memory of the host, for each device")


def verdict(config: PlanConfig, footprint: Footprint, memory: int, say: Say) -> bool:
    """Whether the run fits into its part of `memory` bytes, how closely, and how it is to be started."""
    pool = Pool(int(memory * config.memory_fraction))
    room = pool.room(footprint.state)
    say(f"{pool.size / GIB:10.2f}  what JAX has of a card's {memory / GIB:.2f}")
    say(f"{room / GIB:10.2f}  what XLA fills of it before it recomputes and stops overlapping")
    if footprint.travels:
        say("\neach device gives to transfers in a step, in the compiled program")
        for line in traffic.table(footprint.travels):
            say(line)
    over = footprint.peak - room
    fits = f"fits, {-over / GIB:.2f} GiB left" if over <= 0 else f"does not fit: {over / GIB:.2f} GiB too much a device"
    say(f"\n{fits} (memory alone: how fast it runs is not known here)")
    part = start_with(footprint.peak, footprint.state, memory, config.memory_fraction)
    if part == DEFAULT:
        say(f"JAX's own {DEFAULT:.0%} of a card will do")
    elif part is not None:
        say(f"it needs more than JAX's own {DEFAULT:.0%} of a card, on every host:")
        say(f"    XLA_PYTHON_CLIENT_MEM_FRACTION={part:g} {command_line(config)}")
    return over <= 0


def say_longest(
    config: PlanConfig, first: Footprint, peak: Callable[[int], int], room: int, cp: int, say: Say
) -> int | None:
    """Look for the longest row that fits and say it."""
    # the gradients of all parameters are there at once: clipping needs their norm
    fixed = first.state + first.parameters
    if fixed > room:
        say(f"no seq-len fits: parameters, optimiser and gradients alone take {fixed / GIB:.2f} GiB")
        return None
    unit = 2 * cp * TILE
    length = longest(peak, room, fixed, config.seq_len, unit)
    more = ", or more" if length is not None and length > MOST * 31 // 32 else ""
    part = f"into {config.memory_fraction:.0%} of a card"
    say(f"no multiple of {unit} fits" if length is None else f"longest seq-len that fits {part}, to 3%: {length}{more}")
    return length


def compare(compiled: Callable[..., Footprint], pool: Pool, say: Say) -> int:
    """A table of all rematerialisation policies; FAILED where none fits."""
    found = {name: compiled(remat=name) for name in REMAT}
    say("\nremat      peak GiB  temporary  kept by layers  on the host  fits")
    fits = {name: x.peak <= pool.room(x.state) for name, x in found.items()}
    for name, x in found.items():
        numbers = f"{x.peak / GIB:8.2f}  {x.temporary / GIB:9.2f}  {sum(x.kept.values()) / GIB:14.2f}"
        say(f"{name:9}  {numbers}  {x.host / GIB:11.2f}  {'yes' if fits[name] else 'no'}")
    return DONE if any(fits.values()) else FAILED


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    # before JAX starts: with the plugin and no GPU it would print a traceback
    jax.config.update("jax_platforms", "cpu")
    config = tyro.cli(PlanConfig, args=arguments, prog="python -m zigzag_jax.train.plan")
    try:
        return plan(config, Console(soft_wrap=True, highlight=False, markup=False).print)
    except (UserError, RunError) as error:
        sys.stderr.write(f"error: {error}\n")
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(main())
