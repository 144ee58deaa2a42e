"""The hops fly above the kernels: read off the schedule that XLA makes for H100s, compiled without any.

XLA knows no cost for a kernel and may one day drop the hint that lets four permutes fly at once (ring.py), so this is a
property to test, not to believe; the rules are in overlap.py. A model's layers: train/test_step_schedule.py.
"""

import contextlib

import pytest
from overlap import check, copied, flown
from read_schedule import attention
from scheduled_hlo import Program

import zigzag_jax.ring

pytestmark = pytest.mark.aot

VALUES = 2 * 4 * 128  # a token of Qwen3-30B-A3B's k and v


@pytest.mark.parametrize(
    ("cp", "length"),
    [
        pytest.param(4, 8192, id="cp4-straight-8k"),
        pytest.param(4, 32768, id="cp4-straight-32k", marks=pytest.mark.slow),
        pytest.param(8, 8192, id="cp8-loop-8k", marks=pytest.mark.slow),
        pytest.param(8, 32768, id="cp8-loop-32k", marks=pytest.mark.slow),
    ],
)
def test_every_hop_has_a_kernel_above_it(cp: int, length: int):
    program = attention(cp, length)
    check(program, cp, length, VALUES)
    assert not copied(program, length, (4, 128), (32, 128))
    assert [times for _, times in program.launched() if times > 1] == ([] if cp < 6 else [3, 2])


# ------------------------------------------------------------------------------------------- what XLA needs to be told
# From here on the kernel is the reference's, a loop over tiles of keys, which takes less time to compile.
PAYLOAD = 2 * VALUES * 32768  # bytes of a hop that XLA does not put into one permute (it merges up to 30 MiB)


def alone(program: Program) -> float:
    """Share of the permuted bytes that fly above no kernel."""
    found = flown(program, ("while",))
    return found.get("nothing", 0.0) / sum(found.values())


@pytest.fixture(scope="module")
def forward():
    """A function that compiles the forward over four H100s, 32768 tokens each."""
    return lambda **options: attention(4, 32768, gradient=False, implementation="reference", options=options)


def test_without_barriers_the_check_fails(forward, monkeypatch):
    assert flown(forward(), ("while",)) == {"while": 3 * PAYLOAD}
    monkeypatch.setattr(zigzag_jax.ring.lax, "optimization_barrier", lambda x: x)
    assert alone(forward()) > 0


@pytest.mark.slow
def test_the_attribute_is_needed_where_k_and_v_do_not_fit_one_permute(forward, monkeypatch):
    monkeypatch.setattr(zigzag_jax.ring, "set_xla_metadata", lambda **_: contextlib.nullcontext())
    assert alone(forward()) == 0.5  # k or v of every hop


@pytest.mark.slow
def test_the_scheduler_is_needed_and_is_on(forward):
    assert alone(forward(xla_gpu_enable_latency_hiding_scheduler=True)) == 0
    assert alone(forward(xla_gpu_enable_latency_hiding_scheduler=False)) == 1


@pytest.mark.slow
def test_the_program_does_not_grow_with_cp():
    sizes = {cp: len(attention(cp, 2048, implementation="reference")) for cp in (8, 64)}
    assert sizes[64] == pytest.approx(sizes[8], rel=0.03)
