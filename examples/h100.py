"""H100s that are not there: what the compiler must know of one to compile for it on a CPU host (.venv-aot)."""

import functools

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@functools.cache  # two descriptions of one machine are two machines to jit
def h100s(count: int, axis_name: str = "cp") -> Mesh:
    """A mesh of H100s in one host."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=f"h100x{count}", target_config=H100, topology=f"1x1x{count}"
    )
    return topologies.make_mesh(topology, (count,), (axis_name,))


def on(mesh: Mesh, shape, dtype, spec: P = P()) -> jax.ShapeDtypeStruct:  # noqa: B008 (immutable)
    """An array on them that is only described."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
