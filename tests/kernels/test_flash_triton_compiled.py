"""Every row of the triton kernels' tuning table compiles for the card with least shared memory, which is not there.

Ada (like consumer Blackwell) gives a block 99 KiB; what fits it fits A100, Hopper and B200 too. Nothing is run.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from zigzag_jax.kernels import KeyRange
from zigzag_jax.kernels.flash import triton
from zigzag_jax.kernels.flash.contract import Carry, Settings

pytestmark = [
    pytest.mark.aot,
    pytest.mark.slow,
    # jax 0.11.2 plans to drop the lowering that these kernels are written for
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning"),
]

ADA = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 102400
  threads_per_core_limit: 1536 core_count: 58 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 300000000000 l2_cache_size: 50331648
  clock_rate_ghz: 2.04 device_memory_size: 23609475072 shared_memory_per_block_optin: 101376
  cuda_compute_capability { major: 8 minor: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA L4"
"""
HEADS = [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)]


@pytest.mark.parametrize(
    ("form", "dtype"), [("plain", jnp.bfloat16), ("carry-softcap-odd-length", jnp.bfloat16), ("plain", jnp.float32)]
)
@pytest.mark.parametrize(("dim", "out_dim"), HEADS, ids=[f"D{d}-E{e}" for d, e in HEADS])
def test_compiles_for_ada_without_a_copy(form, dim, out_dim, dtype):
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="l4", target_config=ADA, topology="1x1x1"
    )  # fmt: skip
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    array = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))
    plain = form == "plain"
    rows, heads, kv_heads, f32 = (1024, 4, 4, jnp.float32) if plain else (1000, 8, 2, jnp.float32)
    settings = Settings(0.1, None if plain else 30.0)
    q, k, v = (array(1, rows, n, d) for n, d in ((heads, dim), (kv_heads, dim), (kv_heads, out_dim)))
    stats, bound = array(1, heads, rows, dtype=f32), array(1, rows, dtype=jnp.int32)
    keys, dout = KeyRange(bound, bound), array(1, rows, heads, out_dim)  # pyright: ignore[reportArgumentType]
    carry = None if plain else (array(1, rows, heads, out_dim, dtype=f32), stats)
    dq = None if plain else array(1, rows, heads, dim, dtype=f32)

    def forward(q, k, v, keys, carry):
        carry = None if carry is None else Carry(*carry)
        return triton.flash_fwd(q, k, v, keys, settings, carry, jnp.dtype(dtype if plain else f32))

    def backward(q, k, v, lse, delta, dout, keys, dq):
        return triton.flash_bwd(q, k, v, lse, delta, dout, keys, settings, dq, False)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        one = jax.jit(forward, donate_argnums=4).lower(q, k, v, keys, carry).compile()
        two = jax.jit(backward, donate_argnums=7).lower(q, k, v, stats, stats, dout, keys, dq).compile()
    # the carry and dq are continued in place, and the only temporaries are ranges
    for compiled, in_place in ((one, carry), (two, dq)):
        analysis = compiled.memory_analysis()
        assert analysis is not None
        assert analysis.temp_size_in_bytes < 2**16
        assert analysis.alias_size_in_bytes == sum(4 * x.size for x in jax.tree.leaves(in_place))
    text = f"{one.as_text()}{two.as_text()}"
    assert all(f"flash_{kernel}_triton" in text for kernel in ("fwd", "dkv", "dq"))
