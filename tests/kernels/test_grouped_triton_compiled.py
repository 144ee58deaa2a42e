"""The grouped matmul's Triton kernels, compiled for cards that are not there: they fit and do not spill."""

import re
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from zigzag_jax.kernels.grouped import triton

pytestmark = [pytest.mark.aot, pytest.mark.slow]

SHARED = {80: 163, 89: 99, 90: 227, 100: 227}  # KiB that a block may have
TENSOR_CORES = {90: "wgmma.mma_async", 100: "tcgen05.mma"}  # the instruction, before Hopper mma.sync


@pytest.mark.parametrize(
    ("k", "n", "dtype"), [(2048, 768, jnp.bfloat16), (192, 1408, jnp.float16)], ids=["whole", "cut-float16"]
)
@pytest.mark.parametrize("card", SHARED)
def test_fits_and_does_not_spill(card, k, n, dtype, monkeypatch, tmp_path):
    compiler, package = (pytest.importorskip(name) for name in ("jax_triton.triton_lib", "triton"))
    monkeypatch.setattr(compiler.triton_kernel_call_lib, "get_compute_capability", lambda device: card)
    monkeypatch.setattr(triton, "tile", lambda: triton.WIDE if card >= 90 else triton.NARROW)
    compiled, compile_one = [], compiler.compile_ttir_inplace
    monkeypatch.setattr(
        compiler, "compile_ttir_inplace", lambda *args: compiled.append(compile_one(*args)) or compiled[-1]
    )
    monkeypatch.setattr(compiler, "_COMPILED_KERNEL_CACHE", {})
    array = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
    arguments = array(4096, k), array(8, k, n), array(4096, n), array(2, 8, dtype=jnp.int32)

    def all_three(x, w, dy, sizes):
        return (
            triton.product(x, w, sizes, transposed=False, out_dtype=dtype),
            triton.product(dy, w, sizes, transposed=True, out_dtype=dtype),
            triton.outer(x, dy, sizes, out_dtype=jnp.float32),
        )

    jax.jit(all_three).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert len(compiled) == 3
    name = "ptxas-blackwell" if card >= 100 else "ptxas"
    ptxas = Path(package.__file__).parent / "backends/nvidia/bin" / name
    for kernel in compiled:
        assert kernel.shared_mem_bytes <= SHARED[card] * 1024
        (file := tmp_path / "kernel.ptx").write_text(kernel.binary)
        arch = re.search(r"\.target (\w+)", kernel.binary)
        assert arch is not None
        command = [ptxas, "-v", f"-arch={arch[1]}", file, "-o", tmp_path / "kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        assert ", 0 bytes spill stores" in said
        assert TENSOR_CORES.get(card, "mma.sync") in kernel.binary
