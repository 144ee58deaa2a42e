"""The hops fly above the kernels: read off the schedule that XLA makes for H100s, compiled without any.

XLA knows no cost for a kernel and may one day drop the hint that lets four permutes fly at once (ring.py), so this is a
property to test, not to believe; the rules are in overlap.py. A model's layers: train/test_step_schedule.py.
"""

import contextlib

import jax
import jax.numpy as jnp
import pytest
from h100 import h100s, on
from hollow import hollow_kernels
from jax import lax
from jax.sharding import PartitionSpec as P
from overlap import check, copied, flown
from read_schedule import attention

import zigzag_jax.ring
from zigzag_jax.cost import LatentSizes
from zigzag_jax.hlo import Program
from zigzag_jax.mla import latent_attention

pytestmark = pytest.mark.aot

VALUES = 2 * 4 * 128  # a token of Qwen3-30B-A3B's k and v


@pytest.mark.parametrize(
    ("cp", "length", "kernels"),
    [
        pytest.param(4, 8192, contextlib.nullcontext, id="cp4-straight-8k"),
        pytest.param(4, 32768, hollow_kernels, id="cp4-straight-32k", marks=pytest.mark.slow),
        pytest.param(8, 8192, contextlib.nullcontext, id="cp8-loop-8k", marks=pytest.mark.slow),
        pytest.param(8, 32768, hollow_kernels, id="cp8-loop-32k", marks=pytest.mark.slow),
    ],
)
def test_every_hop_has_a_kernel_above_it(cp: int, length: int, kernels):
    with kernels():
        program = attention(cp, length)
    check(program, cp, length, VALUES)
    assert copied(program, length, 4 * 128, 32 * 128) == {}
    assert [times for _, times in program.launched() if times > 1] == ([] if cp < 6 else [3, 2])


@pytest.mark.slow
def test_three_arrays_and_their_gradients_fly_above_one_kernel():
    """DeepSeek-V2-Lite's expanded keys: k in two parts, and v. The backward alone lays k out whole."""
    cp, length = 4, 8192
    mesh, spec, row, rows = h100s(cp), P(None, "cp", None, None), P(None, "cp", None), (1, length * cp)
    array = lambda place, *sizes, dtype=jnp.bfloat16: on(mesh, sizes, dtype, place)

    def loss(q, latent, k_pe, kv_b, w):
        y = latent_attention(q, latent, k_pe, kv_b, mesh=mesh, spec=spec, payload="expanded", implementation="mosaic")
        return jnp.sum(jnp.square((y.reshape(*rows, -1) @ w).astype(jnp.float32)))

    args = [array(spec, *rows, 16, 192), array(row, *rows, 512), array(row, *rows, 64)]
    args += [array(P(), 512, 16, 256, dtype=jnp.float32), array(P(), 16 * 128, 2048)]
    with hollow_kernels():
        program = Program(jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(*args).compile().as_text() or "")
    sizes = LatentSizes(latent=512, rope=64, heads=16, dim=192, out_dim=128)
    check(program, cp, length, sizes.payloads["expanded"], arrays=3)
    assert copied(program, length, 64, 16 * 64, 16 * 128, 16 * 192) == {
        "bf16[1,8192,16,192]": cp,
        "f32[1,8192,16,128]": 1,  # the gradient that is home, cut off
    }


# ------------------------------------------------------------------------------------------- what XLA needs to be told
# From here on the kernel is the reference's, a loop over tiles of keys, which takes less time to compile. Straight-line
# code over four ranks.
def alone(length: int, gradient: bool, **options) -> float:
    """Share of the permuted bytes that fly above no kernel."""
    program = attention(4, length, gradient=gradient, implementation="reference", options=options)
    found = flown(program, ("while", "matmul"))
    payload = 2 * VALUES * length  # bytes; its gradient has twice as many
    assert sum(found.values()) == payload * (3 * 4 if gradient else 3)
    return found.get("nothing", 0.0) / sum(found.values())


def without_attribute(monkeypatch) -> None:
    monkeypatch.setattr(zigzag_jax.ring, "set_xla_metadata", lambda **_: contextlib.nullcontext())


def without_barriers(monkeypatch) -> None:
    monkeypatch.setattr(zigzag_jax.ring.lax, "optimization_barrier", lambda x: x)


def plain_loop(monkeypatch) -> None:
    """One hop an iteration."""

    def loop(hop, first, count, x):
        if count == 1:  # the backward's last: nothing follows
            return hop(first, x)
        return lax.fori_loop(0, count, lambda i, x: hop(first._replace(step=first.step + i), x), x)

    monkeypatch.setattr(zigzag_jax.ring, "_run_equal", loop)


def test_without_barriers_a_third_of_the_bytes_flies_alone(monkeypatch):
    assert alone(32768, False) == 0
    without_barriers(monkeypatch)
    assert alone(32768, False) == pytest.approx(1 / 3)


@pytest.mark.slow
def test_the_rules_refuse_a_ring_as_one_would_write_it(monkeypatch):
    """A plain loop: no barriers, no attribute, and more than half of the bytes fly alone."""
    without_barriers(monkeypatch)
    without_attribute(monkeypatch)
    plain_loop(monkeypatch)
    with hollow_kernels():
        program = attention(8, 8192)
    found = flown(program)
    assert found["nothing"] == pytest.approx(29 / 54 * sum(found.values()))
    with pytest.raises(AssertionError):
        check(program, 8, 8192, VALUES)


@pytest.mark.slow
def test_a_loop_of_one_hop_an_iteration_copies_the_payload(monkeypatch):
    plain_loop(monkeypatch)
    program = attention(8, 8192, gradient=False, implementation="reference")
    assert copied(program, 8192, 4 * 128) == {"bf16[1,8192,4,128]": 2 * 6}  # k and v at each of six hops


@pytest.mark.slow
def test_without_the_attribute_half_of_the_bytes_fly_alone(monkeypatch):
    assert alone(32768, True) == 0
    without_attribute(monkeypatch)
    assert alone(32768, True) == 0.5
    assert alone(8192, True) == pytest.approx(1 / 3)


@pytest.mark.slow
def test_one_flag_of_xla_would_do_in_the_attributes_place(monkeypatch):
    without_attribute(monkeypatch)
    assert alone(32768, True, xla_gpu_collective_permute_combine_threshold_bytes=2**30) == 0


@pytest.mark.slow
def test_the_scheduler_that_hides_latency_is_needed():
    assert alone(8192, True, xla_gpu_enable_latency_hiding_scheduler=False) == pytest.approx(7 / 12)


@pytest.mark.slow
def test_the_program_does_not_grow_with_cp():
    sizes = {cp: len(attention(cp, 2048, implementation="reference")) for cp in (8, 64)}
    assert sizes[64] == pytest.approx(sizes[8], rel=0.03)
