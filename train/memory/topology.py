"""GPUs that are not there: what the compiler must know of one to compile for it on a CPU host.

XLA's CUDA compiler needs a description of the card and of how many stand together, and neither a card nor the CUDA
libraries: the plugin of JAX is enough, with `jax_platforms` set to cpu before JAX starts. Nothing can be timed this
way, but what a program holds and how it is scheduled are the compiler's own doing.
"""

import functools
import math
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Literal

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from zigzag_jax.train.errors import UserError
from zigzag_jax.train.memory.pool import DEFAULT

GpuName = Literal["h100", "h200"]
GPUS_PER_HOST = 8


@dataclass(frozen=True)
class Gpu:
    """A card, and what XLA is told of it."""

    name: str
    """As the driver says it."""
    memory: int
    """Bytes, as CUDA counts them."""
    bandwidth: int
    """Bytes a second of that memory."""
    l2_cache: int
    """Bytes."""

    def target(self, pool: float) -> str:
        """A GpuTargetConfigProto: the SXM form of Hopper's one chip, of which only the memory differs.

        `pool` is the part of the card's memory that JAX takes (XLA_PYTHON_CLIENT_MEM_FRACTION). A program is scheduled
        to stay inside it; without a card XLA takes four fifths of device_memory_size for it.
        """
        return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {self.bandwidth} l2_cache_size: {self.l2_cache}
  clock_rate_ghz: 1.98 device_memory_size: {int(self.memory * pool / 0.8)} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }} registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{self.name}"
"""


GPUS: dict[GpuName, Gpu] = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 84_929_347_584, 3_352_320_000_000, 50 * 2**20),
    # 6144 bits at 3201 MHz, both edges; 139.8 GiB are left of 141 GB
    "h200": Gpu("NVIDIA H200", 150_108_897_280, 4_916_736_000_000, 60 * 2**20),
}


def check_compiler() -> None:
    """UserError where JAX has no CUDA plugin."""
    if not any(plugin.name.startswith("xla_cuda") for plugin in entry_points(group="jax_plugins")):
        names = " ".join(f"jax-cuda13-{part}=={jax.__version__}" for part in ("plugin", "pjrt"))
        raise UserError("gpu", f"must have a compiler: pip install --no-deps {names} (no CUDA, no GPU needed)", None)


@functools.cache  # two descriptions of one machine are two machines to jit
def described_mesh(name: GpuName, shape: tuple[int, ...], axis_names: tuple[str, ...], pool: float = DEFAULT) -> Mesh:
    """A mesh of GPUs that are only described, in hosts of eight where there are more. Compile for it; nothing runs.

    `pool` is the part of a card's memory that JAX takes; its own default is 0.75.
    """
    count = math.prod(shape)
    hosts = count // GPUS_PER_HOST if count % GPUS_PER_HOST == 0 else 1
    described = topologies.get_topology_desc(
        platform="cuda",
        topology_name=f"{name}x{count}",
        target_config=GPUS[name].target(pool),
        topology=f"1x{hosts}x{count // hosts}",
    )
    return topologies.make_mesh(described, shape, axis_names)
