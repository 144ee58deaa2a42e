"""Every configuration of the Hopper kernels, compiled by ptxas for an H100 that is not there.

Order of statements is part of these kernels: a change of no meaning can make ptxas spill registers or run one wgmma
after the other, which costs more than half the speed and shows nowhere else. Read off ptxas's own report: no spilled
bytes, no warning that wgmma is serialised, and the number of waits for wgmma in the loops.
"""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from h100 import h100s, on

from zigzag_jax.kernels.flash import mosaic
from zigzag_jax.kernels.flash.contract import Carry, Settings
from zigzag_jax.kernels.flash.mosaic_tuning import HOPPER
from zigzag_jax.ranges import KeyRange

pytestmark = pytest.mark.aot

S, F32 = 1024, jnp.float32
# bytes of the stack frames that are left: some addresses, and in MLA's softcap, which no model has, its slope
STACK = {("forward", 192): 16, ("forward", 192, "softcap"): 32, ("forward", 256): 40, ("backward", 192, "softcap"): 64}


class Report(NamedTuple):
    """What ptxas said of a kernel."""

    stack: int
    serialised: list[str]
    waits: int


@pytest.fixture
def compiled(capfd, monkeypatch):
    """A function that compiles and returns ptxas's report."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")

    def run(f, *args) -> Report:
        lowered = jax.jit(f).lower(*args)
        capfd.readouterr()
        lowered.compile()
        text = "".join(capfd.readouterr())
        stack = re.findall(r"(\d+) bytes stack frame", text)
        assert stack, "no report of ptxas"
        return Report(
            max(map(int, stack)), re.findall(r"\(C751[1-4]\).*", text), len(re.findall(r"wgmma\.wait_group", text))
        )

    return run


def array(*shape, dtype=jnp.bfloat16):
    return on(h100s(1), shape, dtype)


HEADS = [pytest.param(*dims, id=f"D{dims[0]}-E{dims[1]}") for dims in HOPPER]
FORMS = {  # carry, result
    "plain": (False, jnp.bfloat16),
    "float32": (False, F32),
    "carry": (True, F32),
    "last": (True, jnp.bfloat16),
}


def check(report: Report, kernel: str, dim: int, softcap, waits: int) -> None:
    assert report.stack <= max(STACK.get((kernel, dim), 0), STACK.get((kernel, dim, "softcap"), 0) if softcap else 0)
    assert not report.serialised
    assert report.waits == waits


@pytest.mark.parametrize("softcap", [None, 30.0], ids=["", "softcap"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dim", "out_dim"), HEADS)
def test_forward(compiled, dim, out_dim, form, softcap):
    has_carry, out_dtype = FORMS[form]
    q, k, v = array(1, S, 8, dim), array(1, S, 2, dim), array(1, S, 2, out_dim)
    bounds = array(2, S, dtype=jnp.int32) if form == "carry" else array(1, S, dtype=jnp.int32)
    carry = (array(1, S, 8, out_dim, dtype=F32), array(1, 8, S, dtype=F32)) if has_carry else None

    def forward(q, k, v, start, stop, carry):
        carry = None if carry is None else Carry(*carry)
        return mosaic.flash_fwd(
            q, k, v, KeyRange(start[:1], stop[:1]), Settings(0.1, softcap), carry, jnp.dtype(out_dtype)
        )

    # S of the first tile; of the masked and the inner loop each S, then PV; PV of the last tile
    check(compiled(forward, q, k, v, bounds, bounds, carry), "forward", dim, softcap, waits=6)


@pytest.mark.parametrize("softcap", [None, 30.0], ids=["", "softcap"])
@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize(("dim", "out_dim"), HEADS)
def test_backward(compiled, dim, out_dim, deterministic, softcap):
    q, k, v = array(2, S, 16, dim), array(2, S, 2, dim), array(2, S, 2, out_dim)
    stats, bounds = array(2, 16, S, dtype=F32), array(2, S, dtype=jnp.int32)

    def backward(q, k, v, lse, delta, dout, start, stop, dq):
        settings = Settings(0.1, softcap)
        return mosaic.flash_bwd(q, k, v, lse, delta, dout, KeyRange(start, stop), settings, dq, deterministic)

    dout, dq = array(2, S, 16, out_dim), array(2, S, 16, dim, dtype=F32)
    # S, dP, then dV, dQ and dK (or dV, dQ, dK and one more); dK and dV at the end
    report = compiled(backward, q, k, v, stats, stats, dout, bounds, bounds, dq)
    check(report, "backward", dim, softcap, waits=7)
