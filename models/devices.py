"""The CPU where there is no GPU: what a command line decides before JAX starts."""

import os
from collections.abc import Mapping
from pathlib import Path

import jax
from jax.sharding import AxisType, Mesh


def has_gpu() -> bool:
    """Whether this machine shows an NVIDIA GPU; asks no JAX backend."""
    return Path("/dev/nvidiactl").exists()  # a container that only sees the driver has no GPU to use


def use_cpu_without_gpu() -> None:
    """Choose the CPU where there is no GPU and nobody said otherwise; an installed CUDA plugin would print a
    traceback.
    """
    if not os.environ.get("JAX_PLATFORMS") and not has_gpu():
        jax.config.update("jax_platforms", "cpu")


def on_cpu() -> bool:
    """Whether the run was told to use the CPU."""
    return jax.config.jax_platforms == "cpu"


_COUNTS = ("JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # as train/hosts/discover.py


def check_alone(environment: Mapping[str, str]) -> None:
    """ValueError where this process was started as one of several: each would do the whole by itself."""
    for name in _COUNTS:
        if environment.get(name, "1") != "1":
            rule = "must be 1 or not set, this command runs in one process"
            raise ValueError(f"{name}: {rule}, got {environment[name]}")


def start_ring(cp: int, cpu_devices: int | None) -> None:
    """Have at least `cp` devices, where this is the CPU by letting it pose as them; before any JAX computation.

    ValueError where there are too few, or where this is one of several processes.
    """
    check_alone(os.environ)
    if cp < 1:
        raise ValueError(f"cp: must be >= 1, got {cp}")
    if on_cpu():
        jax.config.update("jax_num_cpu_devices", cpu_devices or cp)
    if cp > jax.device_count():
        raise ValueError(f"cp: must be at most the {jax.device_count()} devices there are, got {cp}")


def ring_mesh(cp: int) -> Mesh:
    """The first `cp` devices as a mesh of one axis."""
    return jax.make_mesh((cp,), ("cp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:cp])
