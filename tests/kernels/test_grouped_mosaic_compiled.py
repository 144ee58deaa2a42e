"""The Hopper kernels of the grouped matmul, compiled by ptxas for an H100 that is not there.

As in test_flash_mosaic_compiled.py: no warning (of wgmmas that run one after the other, of registers spilled) but a
harmless one, no stack but SwiGLU's, and as many waits for wgmma as the kernel asks for.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from h100 import h100s, on

from zigzag_jax.kernels import grouped_matmul, grouped_swiglu
from zigzag_jax.kernels.grouped import mosaic
from zigzag_jax.kernels.grouped.mosaic_pipeline import GroupedTuning

pytestmark = pytest.mark.aot

SHAPES = {  # rows, groups, k, n: the experts of Qwen3-30B-A3B and DeepSeek-V2-Lite, and one where nothing fits
    "qwen-gate": (65536, 128, 2048, 768),
    "qwen-down": (65536, 128, 768, 2048),
    "deepseek": (49152, 64, 2048, 1408),
    "odd": (1537, 24, 128, 320),
    "one-tile": (8, 2, 64, 64),
}
# SwiGLU's backward: numbers of an item, each stored and loaded once, outside the matmul's loop
STACK = {"outward": 56}
HARMLESS = {"C7519"}  # "warpgroup.arrive is injected": it says how zeros in registers get to the first wgmma


def array(*shape, dtype=jnp.bfloat16):
    return on(h100s(1), shape, dtype)


def calls(shape: str, which: str, dtype, out_dtype):
    """A function and its arguments."""
    rows, groups, k, n = SHAPES[shape]
    x, dy, w = (array(*size, dtype=dtype) for size in ((rows, k), (rows, n), (groups, k, n)))
    sizes = array(groups, dtype=jnp.int32)
    if which == "dw":
        return lambda x, dy, sizes: mosaic.outer(x, dy, sizes, out_dtype=out_dtype), x, dy, sizes
    dx = which == "dx"
    product = lambda rows, w, sizes: mosaic.product(rows, w, sizes, transposed=dx, out_dtype=out_dtype)
    return product, dy if dx else x, w, sizes


def cases() -> list:
    """Every shape, matmul and dtype of the result in bfloat16; a model's own are quick, the rest slow."""
    dtypes = [(jnp.bfloat16, jnp.bfloat16), (jnp.bfloat16, jnp.float32)]
    return [
        pytest.param(
            *case,
            id="-".join([*case[:2], *(jnp.dtype(d).name for d in case[2:])]),
            marks=() if case[0] == "qwen-gate" and case[2:] == (jnp.bfloat16,) * 2 else pytest.mark.slow,
        )
        for case in [
            *((shape, which, *d) for shape in SHAPES for which in ("y", "dx", "dw") for d in dtypes),
            *(("odd", which, jnp.float16, jnp.float16) for which in ("y", "dx", "dw")),
        ]
    ]


def swiglu_call(shape: str, which: str, drawn: bool, dtype):
    """A function and its arguments: a part of the experts' MLP."""
    rows, groups, d, f = SHAPES[shape]
    tuning, scale, sizes = GroupedTuning(drawn=drawn), array(rows, dtype=jnp.float32), array(groups, dtype=jnp.int32)
    part = functools.partial(array, dtype=dtype)
    if which == "outward":
        outward = functools.partial(mosaic.outward, tuning=tuning)
        return outward, part(rows, d), part(groups, f, d), part(rows, 2 * f), scale, sizes
    inward = functools.partial(mosaic.inward, keep=which == "kept", tuning=tuning)
    return inward, part(rows, d), part(groups, d, 2 * f), scale, sizes


def swiglu_cases() -> list:
    """Every part by its default for a model and where all is one tile; the other way in float16 where nothing fits."""
    default = {"inward": False, "kept": True, "outward": True}  # drawn: mosaic_tuning.py
    cases = [(shape, which, default[which], jnp.bfloat16) for shape in ("qwen-gate", "one-tile") for which in default]
    cases += [("odd", which, not drawn, jnp.float16) for which, drawn in default.items()]
    return [
        pytest.param(
            *case,
            id="-".join([*case[:2], "drawn" if case[2] else "fixed", jnp.dtype(case[3]).name]),
            marks=() if case[:2] in (("qwen-gate", "inward"), ("qwen-gate", "outward")) else pytest.mark.slow,
        )
        for case in cases
    ]


def check(text: str, stack: int = 0, wgmmas: tuple[int, int] = (4, 256)) -> None:
    """What ptxas said, and the PTX; `wgmmas` of a step, and their columns."""
    (found,) = map(int, re.findall(r"(\d+) bytes stack frame", text))
    assert found <= stack
    assert set(re.findall(r"\((C75\d\d)\)", text)) <= HARMLESS
    count, columns = wgmmas
    accumulators = 256 // columns
    # one that leaves the newest wgmma running, at the loop's end one for it, and one before the sums are read
    assert sorted(re.findall(r"wgmma\.wait_group\S* (\d)", text)) == ["0"] * (1 + accumulators) + [str(accumulators)]
    # four wgmma of 16 in a step of 64, all of the widest kind
    assert len(re.findall(rf"wgmma\.mma_async\.sync\.aligned\.m64n{columns}k16", text)) == count


@pytest.mark.parametrize(("shape", "which", "dtype", "out_dtype"), cases())
def test_kernel(compiler_says, shape, which, dtype, out_dtype):
    check(compiler_says(*calls(shape, which, dtype, out_dtype)))


@pytest.mark.parametrize(("shape", "which", "drawn", "dtype"), swiglu_cases())
def test_swiglu(compiler_says, shape, which, drawn, dtype):
    # no spill in the forward; gate and up are two accumulators of half the columns
    check(
        compiler_says(*swiglu_call(shape, which, drawn, dtype)),
        STACK.get(which, 0),
        (4, 256) if which == "outward" else (8, 128),
    )


@pytest.mark.slow
def test_a_layer_computes_its_schedule_once():
    """Gate, up and down, forward and backward: XLA merges the schedules of their nine kernels."""
    rows, groups, k, n = SHAPES["qwen-gate"]
    x, gate, down = array(rows, k), array(groups, k, n), array(groups, n, k)
    sizes = array(groups, dtype=jnp.int32)

    def gradients(x, gate, up, down, sizes, dy):
        def layer(x, gate, up, down):
            matmul = lambda x, w: grouped_matmul(x, w, sizes, implementation="mosaic")
            return matmul(jax.nn.silu(matmul(x, gate)) * matmul(x, up), down)

        y, vjp = jax.vjp(layer, x, gate, up, down)
        return y, vjp(dy)

    text = jax.jit(gradients).lower(x, gate, gate, down, sizes, x).compile().as_text() or ""
    assert len(re.findall(r"custom-call\(.*mosaic_gpu", text)) == 9
    table = (rows + (groups + 1) * 134) // 128
    once = jax.jit(lambda x, w, sizes: grouped_matmul(x, w, sizes, implementation="mosaic")).lower(x, gate, sizes)
    made = lambda hlo: len(re.findall(rf"= \(?s32\[{table}\]\S* (?:\S+ )*fusion\(", hlo))
    assert made(text) == made(once.compile().as_text() or "") > 0


@pytest.mark.slow
def test_nothing_passes_over_the_rows_between_the_matmuls_of_a_fused_layer():
    """Forward, recomputed forward and gradients: seven kernels, and XLA writes no [M, f] or [M, 2 f] array itself."""
    rows, groups, d, f = SHAPES["qwen-gate"]
    sizes = array(groups, dtype=jnp.int32)

    def gradients(x, gate_up, down, scale, sizes, dy):
        def layer(x, w):
            return grouped_swiglu(x, *w, group_sizes=sizes, fused=True, implementation="mosaic"), None

        weights = jax.tree.map(lambda a: a[None], (gate_up, down, scale))
        y, vjp = jax.vjp(lambda x, w: jax.lax.scan(jax.checkpoint(layer), x, w)[0], x, weights)
        return y, vjp(dy)

    arguments = array(groups, d, 2 * f), array(groups, f, d), array(rows, dtype=jnp.float32), sizes, array(rows, d)
    text = jax.jit(gradients).lower(array(rows, d), *arguments).compile().as_text() or ""
    assert len(re.findall(r"custom-call\(.*mosaic_gpu", text)) == 7
    assert not re.findall(rf"= \(?\w+\[{rows},(?:{f}|{2 * f})\]\S* (?:\S+ )*(?:fusion|copy)\(", text)
