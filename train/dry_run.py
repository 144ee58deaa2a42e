"""--dry-run: what a run would hold and send, computed from shapes; needs no device and builds nothing."""

import math
from collections.abc import Callable
from typing import cast

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from zigzag_jax.layout import padded
from zigzag_jax.models.devices import on_cpu
from zigzag_jax.models.exchange import SLACK, block_rows, sent_bytes
from zigzag_jax.models.registry import ModelConfig
from zigzag_jax.train.config import Config, MeshConfig
from zigzag_jax.train.errors import UserError
from zigzag_jax.train.mesh import AXES, check_batch, mesh_shape
from zigzag_jax.train.program import make_program

_GIB = 2**30


def bytes_a_device(tree) -> int:
    """Bytes of one device's pieces of all arrays of a tree of shapes with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def describe(config: Config, sizes: ModelConfig, say: Callable[[str], None]) -> None:
    """Say the mesh, the bytes of parameters and optimiser a device, the hops of the ring and what travels to the
    experts. UserError without a mesh.
    """
    if not on_cpu() and config.mesh == MeshConfig():
        raise UserError("mesh", "must be given with --dry-run, which does not ask how many GPUs there are", None)
    shape = mesh_shape(config.mesh)
    check_batch(config.batch, config.accumulate, shape)
    mesh = AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    program = make_program(config, sizes, cast(Mesh, mesh))  # shapes need no devices
    sharding, state = program.task.sharding, program.state
    parameters = sum(x.size for x in jax.tree.leaves(program.parameters))
    dp, fsdp, cp = shape
    say(f"mesh          dp {dp} * fsdp {fsdp} * cp {cp} = {math.prod(shape)} devices")
    say(f"parameters    {parameters / 1e9:.3f} billion, float32")
    for name, tree in (("parameters", state.params), ("optimiser", state.opt_state)):
        say(f"{name:14s}{bytes_a_device(tree) / _GIB:.3f} GiB a device")
    length, rows = padded(config.seq_len, cp) // cp, config.batch // (dp * fsdp * config.accumulate)
    if config.accumulate > 1:
        say(f"accumulate    {config.accumulate} micro-batches a step; what follows is of one; a gradient more is held")
    say(f"tokens        {rows} rows of {length} a device (rows of {config.seq_len}, padded to {length * cp})")
    itemsize = 2 if config.dtype == "bfloat16" else 4
    _describe_ring(config, sizes, (rows, length), cp, itemsize, say)
    if axes := sharding.expert_axes:
        _describe_exchange(config.mesh.ep or 1, axes, sizes, rows * length, itemsize, say)


def _describe_ring(
    config: Config, sizes: ModelConfig, tokens: tuple[int, int], cp: int, itemsize: int, say: Callable[[str], None]
) -> None:
    """What a device with rows of `tokens` = (rows, length) sends to the others of its ring, in each form."""
    sent = "hops" if config.strategy == "ring" else "shards"
    for what, values in sizes.hop_values.items():
        count = math.prod(tokens) * values
        first = f"{cp - 1} {sent} of {count * itemsize / 2**20:.2f} MiB ({what}) a layer forward"
        say(f"{config.strategy:14s}{first}")
        say(f"              {cp - 1} of the same and {cp - 1} of {count * 4 / 2**20:.2f} MiB (their gradient) backward")
    if len(sizes.hop_values) > 1 and cp > 1:
        why = "by the cost rule, --payload overrides it" if config.payload is None else "by --payload"
        form = config.payload or sizes.travels(cp, *tokens, itemsize, config.strategy)
        say(f"payload       {form} ({why})")


def _describe_exchange(
    ep: int, axes: tuple[str, ...], sizes: ModelConfig, tokens: int, itemsize: int, say: Callable[[str], None]
) -> None:
    """What `tokens` a device send to their experts (models/exchange.py)."""
    pairs, layers = tokens * sizes.num_experts_per_tok, sum(sizes.sparse_layers)
    rows, sent = block_rows(pairs, ep), sent_bytes(pairs, sizes.hidden_size, ep, itemsize)
    mib, total = [f"{x / 2**20:.2f} MiB" for x in sent], layers * sum(sent) / _GIB
    say(f"experts       {sizes.expert_count // ep} of {sizes.expert_count} a device (ep {ep} over {', '.join(axes)})")
    say(f"exchange      {pairs} routed rows a device, in rounds of {rows} rows to each of the {ep - 1} others")
    say(
        f"              {mib[0]} leave a device a layer forward (rows there, results back), {mib[1]} backward (rows and"
    )
    say("              their cotangents there, gradients back)")
    say(f"              {total:.3f} GiB a step for {layers} layers where one round does: up to {SLACK} of an even load")
    say(f"              {-(-pairs // rows)} rounds of as many bytes, in the same memory, where all go to one device")
