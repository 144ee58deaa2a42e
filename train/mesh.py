"""The devices of a run: how many, of which kind, and the mesh (dp, fsdp, cp) they make.

Rows of a batch are cut over (dp, fsdp), each sequence over cp; parameters over (fsdp, cp), and with ep the experts over
cp, fsdp or both, as whole experts. On a machine without a GPU the CPU poses as as many devices as the mesh asks for, so
that every mesh can be tried on a laptop.
"""

import math
import os

import jax
from jax.sharding import AxisType, Mesh

from zigzag_jax.models.devices import on_cpu
from zigzag_jax.models.registry import ModelConfig
from zigzag_jax.models.sharding import Sharding, expert_rules
from zigzag_jax.train.config import Config, HostsConfig, MeshConfig, expert_axes
from zigzag_jax.train.errors import UserError
from zigzag_jax.train.hosts.discover import local_devices
from zigzag_jax.train.hosts.link import patience

AXES = ("dp", "fsdp", "cp")
ROWS = ("dp", "fsdp")  # mesh axes that cut the rows of a batch
CPU_DEFAULT = MeshConfig(dp=2, cp=2)


def mesh_shape(config: MeshConfig, devices: int | None = None) -> tuple[int, int, int]:
    """Sizes of (dp, fsdp, cp). An axis that is not given is 1; with none given, `devices` all go to cp (None: the
    CPU's default).
    """
    if config.dp is config.fsdp is config.cp is None:
        config = CPU_DEFAULT if devices is None else MeshConfig(cp=devices)
    return config.dp or 1, config.fsdp or 1, config.cp or 1


def start_devices(config: Config) -> None:
    """Make the CPU pose as enough devices. Before any JAX computation, and before `join`."""
    hosts = config.hosts
    if on_cpu():
        size = math.prod(mesh_shape(config.mesh))
        if size % hosts.num_processes:
            raise UserError("hosts.num-processes", f"must divide the mesh's {size} devices", hosts.num_processes)
        jax.config.update("jax_num_cpu_devices", config.cpu_devices or size // hosts.num_processes)
    elif config.cpu_devices is not None:
        raise UserError("cpu-devices", "needs a run on the CPU (JAX_PLATFORMS=cpu)", config.cpu_devices)


def join(hosts: HostsConfig) -> None:
    """Make the devices of all processes one set; the wire (link.py) already stands, so all are there."""
    if on_cpu():
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # its notices come from a thread, at no common step
    jax.distributed.initialize(
        hosts.coordinator, hosts.num_processes, hosts.process_id, local_devices(os.environ),
        cluster_detection_method="deactivate", initialization_timeout=hosts.timeout,
        # the wire notices first and says it better; this is for what it cannot see
        heartbeat_timeout_seconds=int(100 + patience(hosts.timeout)), shutdown_timeout_seconds=hosts.timeout,
    )  # fmt: skip


def make_mesh(config: Config) -> Mesh:
    """The mesh over the first dp * fsdp * cp devices. UserError where there are too few or --batch does not fit."""
    if not on_cpu() and jax.default_backend() == "cpu":
        rule = "must be cpu where JAX cannot use the GPU (or install zigzag_jax[cuda12] or [cuda13])"
        raise UserError("JAX_PLATFORMS", rule, os.environ.get("JAX_PLATFORMS"))
    shape = mesh_shape(config.mesh, None if on_cpu() else jax.device_count())
    size, there = math.prod(shape), jax.device_count()
    text = " * ".join(AXES)
    if size > there:
        raise UserError("mesh", f"{text} must be at most the {there} devices there are", f"{size} = {shape}")
    if size < there and jax.process_count() > 1:
        raise UserError("mesh", f"{text} must be the {there} devices of all processes", f"{size} = {shape}")
    check_batch(config.batch, config.accumulate, shape)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=jax.devices()[:size])


def make_sharding(config: Config, sizes: ModelConfig, mesh: Mesh) -> Sharding:
    """Where the model's arrays live. UserError for an ep that does not fit the mesh or the model."""
    ep, shape = config.mesh.ep or 1, mesh.shape
    axes = expert_axes(MeshConfig(fsdp=shape["fsdp"], cp=shape["cp"], ep=ep))
    if ep > 1 and not any(sizes.sparse_layers):
        raise UserError("mesh.ep", "must be 1 for a model without experts", ep)
    if sizes.expert_count % ep:
        raise UserError("mesh.ep", f"must divide the model's {sizes.expert_count} experts", ep)
    return Sharding(mesh, expert_rules(axes))


def check_batch(batch: int, accumulate: int, shape: tuple[int, int, int]) -> None:
    """UserError where the rows of a step cannot be cut into micro-batches and those over (dp, fsdp, ..)."""
    rows, rule = shape[0] * shape[1], "dp * fsdp"
    if accumulate > 1:
        rule = f"accumulate * dp * fsdp = {accumulate} * {shape[0]} * {shape[1]}"
        rows *= accumulate
    if batch < 1:
        raise UserError("batch", "must be >= 1", batch)
    if batch % rows:
        raise UserError("batch", f"must be divisible by {rule} = {rows}", batch)
