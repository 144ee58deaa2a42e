"""Every configuration of the Hopper kernels, compiled by ptxas for an H100 that is not there.

Order of statements is part of these kernels: a change of no meaning can make ptxas spill registers or run one wgmma
after the other, which costs more than half the speed and shows nowhere else. So the sizes are those of a ring step
(they decide loops and constants), and ptxas's report must show no warning but one that is harmless, and no stack but
where STACK says so. The waits for wgmma are counted in the PTX: those that the kernel asks for.
"""

import dataclasses
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from h100 import h100s, on

from zigzag_jax.hlo import Program
from zigzag_jax.kernels.flash import mosaic
from zigzag_jax.kernels.flash.contract import Carry, Settings, SplitKeys
from zigzag_jax.kernels.flash.mosaic_tuning import HOPPER
from zigzag_jax.ranges import KeyRange

pytestmark = pytest.mark.aot

F32 = jnp.float32
SEQUENCE = 8192
HEADS = {  # query and kv heads by head dims: Qwen3-30B-A3B, DeepSeek-V2-Lite, and the like
    (64, 64): (32, 8),
    (96, 64): (12, 3),
    (96, 96): (32, 32),
    (128, 128): (32, 4),
    (192, 128): (16, 16),
    (256, 256): (16, 4),
}
FORMS = {  # carry, result, a range for each of two batch rows
    "plain": (False, jnp.bfloat16, False),
    "float32": (False, F32, False),
    "carry": (True, F32, False),
    "carry-batch": (True, F32, True),
    "last": (True, jnp.bfloat16, False),
}
# bytes of stack that are left, by head dim and form: with a softcap, which no model here has
STACK = {("forward", 128, "softcap"): 24, ("backward", 192, "softcap"): 80}
# heads whose keys come in two parts are given whole ones by few: these forms do
WHOLE = ("plain", "carry")
# the models' own runs
QUICK = {(128, 128, 0, "plain"), (128, 128, 0, "carry"), (192, 128, 64, "carry")}
# "warpgroup.arrive is injected": it says how dS in registers gets to dK's wgmma
HARMLESS = {"C7519"}


class Report(NamedTuple):
    """What ptxas said of a kernel, and how often it was told to wait."""

    stack: int
    warnings: set[str]
    waits: int


@pytest.fixture
def compiled(compiler_says):
    """A function that compiles and returns the report."""

    def run(f, *args) -> Report:
        text = compiler_says(f, *args)
        stack = re.findall(r"(\d+) bytes stack frame", text)
        assert stack, "no report of ptxas"
        waits = len(re.findall(r"wgmma\.wait_group", text))
        return Report(max(map(int, stack)), set(re.findall(r"\((C75\d\d)\)", text)) - HARMLESS, waits)

    return run


def array(*shape, dtype=jnp.bfloat16) -> Any:
    return on(h100s(1), shape, dtype)


def check(report: Report, kernel: str, dim: int, kind: str, waits: int) -> None:
    assert not report.warnings
    assert report.stack <= STACK.get((kernel, dim, kind), 0)
    assert report.waits == waits


def cases(*forms: str):
    """Head dims, columns of the shared part of k, form."""
    found = []
    for dims, tuning in HOPPER.items():
        for shared in sorted({0, tuning.shared}):
            for form in forms:
                if shared == tuning.shared or form in WHOLE:
                    name = "-".join([f"D{dims[0]}-E{dims[1]}", *["split"] * bool(shared), form])
                    marks = () if (*dims, shared, form) in QUICK else pytest.mark.slow
                    found.append(pytest.param(*dims, shared, form, id=name, marks=marks))
    return found


def backward_cases(*forms: str):
    """Head dims and form: keys are whole."""
    quick = (128, 128, ""), (192, 128, "")
    marks = lambda case: () if case in quick else pytest.mark.slow
    every = [(*dims, form) for dims in HOPPER for form in forms]
    # late but where it is deterministic, so the form with both is not its; the scale is in P but in float16
    late = [dims for dims, tuning in HOPPER.items() if tuning.backward.schedule == "late"]
    every += [(*dims, form) for dims in late for form in ("batch", "float16")]
    return [pytest.param(*case, id=f"D{case[0]}-E{case[1]}-{case[2]}", marks=marks(case)) for case in every]


def keys_of(batch: int, rows: int, dims: tuple[int, int], shared: int):
    heads, columns = HEADS[dims][1], dims[0] - shared
    own = array(batch, rows, heads, columns)
    return SplitKeys(own, array(batch, rows, shared)) if shared else own


def forward(compiled, dim, out_dim, form, softcap, tuning=None, shared=0) -> None:
    has_carry, out_dtype, batch_ranges = FORMS[form]
    (heads, kv_heads), batch = HEADS[dim, out_dim], 2 if batch_ranges else 1
    q = array(batch, SEQUENCE, heads, dim)
    k, v = keys_of(batch, SEQUENCE, (dim, out_dim), shared), array(batch, SEQUENCE, kv_heads, out_dim)
    bounds = array(batch, SEQUENCE, dtype=jnp.int32)
    carry = (array(batch, SEQUENCE, heads, out_dim, dtype=F32), array(batch, heads, SEQUENCE, dtype=F32))

    def run(q, k, v, start, stop, *carry):
        carry = Carry(*carry) if carry else None
        keys, settings = KeyRange(start, stop), Settings(0.1, softcap)
        return mosaic.flash_fwd(q, k, v, keys, settings, carry, jnp.dtype(out_dtype), tuning=tuning)

    report = compiled(run, q, k, v, bounds, bounds, *(carry if has_carry else ()))
    # S of the first tile; S, then PV, in the masked and in the inner loop; PV of the last tile. More: the branch of the
    # rescaling has grown copies of what follows, so that warps of a warpgroup would issue other wgmmas
    check(report, "forward", dim, "softcap" if softcap else form, waits=6)


@pytest.mark.parametrize(("dim", "out_dim", "shared", "form"), cases(*FORMS))
def test_forward(compiled, dim, out_dim, shared, form):
    forward(compiled, dim, out_dim, form, None, shared=shared)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dim", "out_dim", "shares"), [(128, 128, "fixed"), (128, 128, "drawn"), (64, 64, "fixed"), (64, 64, "drawn")]
)
def test_forward_that_takes_its_items_otherwise(compiled, dim, out_dim, shares):
    table = HOPPER[dim, out_dim].forward
    forward(compiled, dim, out_dim, "carry", None, dataclasses.replace(table, shares=shares))


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "out_dim", "shared", "form"), cases("carry"))
def test_forward_with_softcap(compiled, dim, out_dim, shared, form):
    forward(compiled, dim, out_dim, form, 30.0, shared=shared)


def backward(compiled, dim, out_dim, form, rows=SEQUENCE) -> None:
    (heads, kv_heads), batch = HEADS[dim, out_dim], 2 if "batch" in form else 1
    dtype = jnp.float16 if form == "float16" else jnp.bfloat16
    q, dout = (array(batch, rows, heads, d, dtype=dtype) for d in (dim, out_dim))
    k, v = (array(batch, rows, kv_heads, d, dtype=dtype) for d in (dim, out_dim))
    stats, bounds = array(batch, heads, rows, dtype=F32), array(batch, rows, dtype=jnp.int32)
    softcap = 30.0 if form == "softcap" else None

    def run(q, k, v, lse, delta, dout, start, stop, dq):
        keys, settings = KeyRange(start, stop), Settings(0.1, softcap)
        return mosaic.flash_bwd(q, k, v, lse, delta, dout, keys, settings, dq, "deterministic" in form)

    dq = array(batch, rows, heads, dim, dtype=F32)
    report = compiled(run, q, k, v, stats, stats, dout, bounds, bounds, dq)
    # S, dP, then dV, dQ and dK (or dV, dQ, dK and one more); dK and dV at the end, and before them dQ where it is late
    late = HOPPER[dim, out_dim].backward.schedule == "late" and "deterministic" not in form
    check(report, "backward", dim, "softcap" if softcap else "", waits=8 if late else 7)


@pytest.mark.parametrize(
    ("dim", "out_dim", "form"), backward_cases("", "deterministic", "softcap", "batch-deterministic")
)
def test_backward(compiled, dim, out_dim, form):
    backward(compiled, dim, out_dim, form)


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "out_dim"), HOPPER)
def test_backward_of_few_blocks(compiled, dim, out_dim):
    backward(compiled, dim, out_dim, "", rows=512)


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "out_dim", "rows"), [(96, 96, 98304), (192, 128, 12288)])
def test_backward_of_heads_that_fit_l2_at_other_lengths(compiled, dim, out_dim, rows):
    backward(compiled, dim, out_dim, "", rows)  # one head of 75 MB, four of 69: their walks turn


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "out_dim"), HOPPER)
def test_few_small_kernels_come_before_it(dim, out_dim):
    """Each is some 2 us, and a call may be 100: mosaic_numbers.py."""
    heads, kv_heads = HEADS[dim, out_dim]
    shapes = (heads, dim), (kv_heads, dim), (kv_heads, out_dim), (heads, out_dim)
    q, k, v, dout = (array(1, SEQUENCE, *shape) for shape in shapes)
    stats, bounds = array(1, heads, SEQUENCE, dtype=F32), array(1, SEQUENCE, dtype=jnp.int32)
    settings = Settings(0.1, None)

    def forward(q, k, v, start, stop):
        return mosaic.flash_fwd(q, k, v, KeyRange(start, stop), settings, None, jnp.dtype(F32))

    def backward(q, k, v, lse, delta, dout, start, stop, dq=None):
        return mosaic.flash_bwd(q, k, v, lse, delta, dout, KeyRange(start, stop), settings, dq, deterministic=False)

    def launched(f, *args, **options):
        program = Program(jax.jit(f, **options).lower(*args).compile().as_text() or "")
        return [work for x in program.computations[program.entry] for work in program.work(x)]

    assert launched(forward, q, k, v, bounds, bounds) == ["fusion", "flash_fwd"]
    args = q, k, v, stats, stats, dout, bounds, bounds
    dq = array(1, SEQUENCE, heads, dim, dtype=F32)
    *small, last = launched(backward, *args, dq, donate_argnames="dq")
    assert last == "flash_bwd"
    # the ranges' tiles in two levels, at some heads put together; sums, what is sorted, all numbers; lse, delta
    assert sorted(small)[:-1] in (["fusion"] * 7, ["fusion"] * 8)
    assert sorted(small)[-1] == "sort"
    assert launched(backward, *args) == [*small, "zeros", "flash_bwd"]


def test_every_head_of_the_table_is_compiled():
    assert HEADS.keys() == HOPPER.keys()
