"""The ring's hops fly above its kernels: read off the schedule that XLA makes for H100s, compiled without any.

XLA knows no cost for a kernel and may one day drop the hint that lets four permutes fly at once (ring.py), so this is a
property to test, not to believe: in the scheduled HLO every permute is asynchronous *and has an attention kernel
between its start and its done*; nothing gathers K or V. Here the kernel is the reference's, a `while` over key tiles.
"""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from h100 import h100s, on
from jax.sharding import PartitionSpec as P

from zigzag_jax import zigzag_attention

pytestmark = pytest.mark.aot


def scheduled(cp: int, gradient: bool) -> str:
    """Scheduled HLO of attention over cp ranks of 32768 tokens with Qwen3-30B-A3B's heads."""
    mesh, spec = h100s(cp), P(None, "cp", None, None)
    attend = lambda q, k, v: zigzag_attention(q, k, v, mesh=mesh, spec=spec, implementation="reference")

    def with_gradient(q, k, v, dout):
        out, vjp = jax.vjp(attend, q, k, v)
        return out, vjp(dout)

    array = lambda heads: on(mesh, (1, 32768 * cp, heads, 128), jnp.bfloat16, spec)
    args = (array(32), array(4), array(4))
    lowered = jax.jit(with_gradient).lower(*args, array(32)) if gradient else jax.jit(attend).lower(*args)
    return lowered.compile().as_text() or ""


def computations(text: str) -> list[list[str]]:
    """The instructions of each computation, in the order they are launched."""
    return [block.splitlines() for block in re.split(r"\n}\n", text)]


class Hop(NamedTuple):
    """One permute instruction; XLA puts small arrays of one hop into one."""

    arrays: list[str]
    """Their dtypes."""
    asynchronous: bool
    kernel_above: bool
    """Whether an attention kernel runs between its start and its done."""


def hops(text: str) -> list[Hop]:
    """Every permute of the program."""
    found = []
    for lines in computations(text):
        for at, line in enumerate(lines):
            if start := re.match(r"\s*%?([\w.-]+) = \(\((.*?)\), .* collective-permute-start\(", line):
                name = re.escape(start[1])
                done = next(n for n in range(at, len(lines)) if re.search(rf"-done\(.*%{name}\)", lines[n]))
                kernel = any(re.search(r" while\(", between) for between in lines[at:done])
                found.append(Hop(re.findall(r"\b(\w+)\[", start[2]), '"is_sync":true' not in line, kernel))
    return found


@pytest.mark.parametrize(
    ("cp", "gradient", "payloads", "travellers"),
    [
        # payload: 3 forward, 3 backward, but the first of each is the same and one program makes it once; gradient: 3
        pytest.param(4, True, 5, 3, id="cp4-straight"),
        # 7 forward: the first, and 2 in the body of a loop of 3 trips
        pytest.param(8, False, 3, 0, id="cp8-loop"),
    ],
)
def test_every_hop_has_a_kernel_above_it(cp: int, gradient: bool, payloads: int, travellers: int):
    text = scheduled(cp, gradient)
    found = hops(text)
    arrays = [dtype for hop in found for dtype in hop.arrays]
    assert arrays.count("bf16") == 2 * payloads  # k, v
    assert arrays.count("f32") == 2 * travellers  # dk, dv
    assert all(hop.asynchronous for hop in found)
    assert all(hop.kernel_above for hop in found)
    assert "all-gather" not in text
    assert not re.search(r"\bcollective-permute\(", text)  # no synchronous form
