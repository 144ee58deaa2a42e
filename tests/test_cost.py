"""The cost model: its waiting is that of small rings worked out by hand, its seconds are those that were measured."""

import itertools
from typing import Literal

import numpy as np
import oracle
import pytest

from zigzag_jax.cost import (
    H100,
    Flight,
    LatentSizes,
    Layer,
    Machine,
    Seconds,
    along_critical_path,
    choose_payload,
    choose_strategy,
    critical_path,
    gather_seconds,
    ring_seconds,
)
from zigzag_jax.ranges import live_steps
from zigzag_jax.work import busiest, lock_step, pairs

QWEN = Layer(heads=32, dim=128, out_dim=128, payload=2 * 4 * 128)
LITE = LatentSizes(latent=512, rope=64, heads=16, dim=192, out_dim=128)
ALONE = H100._replace(link=1e18)  # hops that take no time


@pytest.mark.source
def test_documents_as_the_benchmarks_say():
    from balance import LENGTH, documents

    work = [pairs(4, LENGTH // 4, positions=documents(8, seed)) for seed in range(8)]
    assert np.mean([lock_step(x) for x in work]) == pytest.approx(1.92, abs=0.005)
    paths = [along_critical_path(x, (0, 1, 2, 3)) for x in work]
    assert np.mean(paths) == pytest.approx(1.67, abs=0.005)
    for x, path in zip(work, paths, strict=True):  # who waits for neighbours alone waits less
        assert busiest(x) <= path <= lock_step(x)


def test_the_naive_layout_takes_as_long_as_its_last_rank():
    work = pairs(4, 1024, layout="contiguous")
    assert critical_path(work.astype(float), [[]] * 4) == work[:, -1].sum()


def test_a_rank_waits_for_its_neighbours_beginnings():
    kernels = np.array([[5.0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]])
    short, long = [Flight(0.5, 1)], [Flight(4.0, 1)]
    # rank 0 begins its second step at 5; ranks 1 and 3, which began the first at 0, at 1, and wait at the next for it
    assert critical_path(kernels, [short, short, []]) == 7.0
    assert critical_path(kernels[:, 1:3], [short, short, []]) == 3.0
    assert critical_path(kernels[:, 1:3], [long, short, []]) == 6.0  # the hop is longer than the kernel
    assert critical_path(kernels[:, 1:3], [short, short, []], toll=0.5) == 3.5


def test_two_hops_beside_one_kernel_share_the_link_and_wait_for_the_partners_of_both():
    # rank 0 comes late to the second step, and rank 2 has most to do at the third
    kernels = np.array([[5.0, 1, 1, 1, 1, 1, 1, 1], [1] * 8, [0, 0, 9, 0, 0, 0, 0, 0]])
    second = lambda *flights: critical_path(kernels, [[], list(flights), []])
    assert second(Flight(0.5, 1)) == 1 + 1 + 9  # ranks 1 and 7 wait for rank 0
    assert second(Flight(0.5, 2)) == 5 + 0.5 + 9
    assert second(Flight(0.5, 1), Flight(0.25, 6)) == 5 + 0.75 + 9  # what goes on by 6 of 8 leaves rank 2 for rank 0


def test_a_windowed_ring_worked_out_by_hand():
    """cp 8, live steps 0, 1 and 7: the gradient crosses the gap of six ranks a step after the payload did."""
    layer, length, window = Layer(heads=1, dim=1, out_dim=1, payload=1), 8, 5
    machine = Machine(forward=4, backward=10, link=16, toll=0)  # a pair takes 1 s, a payload 1 s, its gradient 2 s
    assert live_steps(8, length, window) == (0, 1, 7)

    def seconds(*busy):
        """Of a ring in which at each live step one rank has work: (rank, seconds)."""
        work = np.zeros((3, 8), int)
        for step, (rank, amount) in enumerate(busy):
            work[step, rank] = amount
        return ring_seconds(layer, 8, length, work, window=window, machine=machine)

    # backward: step 1 (payload on by 6), step 7 (gradient on by 6), the diagonal (gradient home, by 1)
    assert seconds((2, 30), (0, 20), (0, 0)).backward == 20 + 2 + 30  # 2 gives its gradient to 2 + 6, which is rank 0
    assert seconds((6, 30), (0, 20), (0, 0)).backward == 20 + 2 + 30  # 6 takes its gradient from 6 - 6
    assert seconds((1, 30), (0, 20), (0, 0)).backward == 1 + 2 + 30  # 1 meets 0 at the last hop only, beside its kernel
    # forward: the diagonal (payload on by 1), step 1 (on by 6), step 7
    assert seconds((0, 20), (1, 30), (0, 0)).forward == 1 + 30  # at the first hop all were there
    assert seconds((0, 20), (0, 0), (1, 30)).forward == 1 + 1 + 30
    assert seconds((0, 20), (0, 0), (2, 30)).forward == 20 + 1 + 30


def test_cp_1_is_the_kernel_alone():
    work = pairs(1, 4096)
    got = ring_seconds(QWEN, 1, 4096, work)
    assert got.forward == work.sum() * 4 * 32 * 128 / H100.forward
    assert got.backward == work.sum() * 10 * 32 * 128 / H100.backward
    assert gather_seconds(QWEN, 1, 4096, work) == pytest.approx(got)


@pytest.mark.parametrize(
    ("cp", "layout", "machine", "forward", "backward"),
    [
        pytest.param(4, "zigzag", ALONE, 3.30e-3, 8.65e-3, id="cp4-s32k one H100, without communication"),
        pytest.param(2, "zigzag", H100, 1.762e-3, 4.599e-3, id="two H200"),
        pytest.param(2, "contiguous", H100, 2.522e-3, 6.755e-3, id="two H200, naive"),
        pytest.param(4, "contiguous", ALONE, 5.75e-3, 15.55e-3, id="out of sample: the first one's naive last rank"),
    ],
)
def test_what_was_measured(cp, layout, machine, forward, backward):
    """docs/schedule.md, 8192 tokens a rank. All but the last are runs that the constants come from."""
    work = pairs(cp, 8192, layout=layout)
    got = ring_seconds(QWEN, cp, 8192, work, layout=layout, machine=machine)
    assert got.forward == pytest.approx(forward, rel=0.04)
    assert got.backward == pytest.approx(backward, rel=0.04)


@pytest.mark.parametrize(
    ("layout", "forward", "backward"), [("zigzag", 3.800e-3, 9.785e-3), ("contiguous", 6.157e-3, 16.473e-3)]
)
def test_four_cards_from_constants_of_two(layout, forward, backward):
    """Four H200, out of sample: less than was measured, by no more than 7%."""
    got = ring_seconds(QWEN, 4, 8192, pairs(4, 8192, layout=layout), layout=layout)
    assert 0.93 * forward < got.forward < forward
    assert 0.93 * backward < got.backward < backward


@pytest.mark.parametrize(("length", "both"), [(8192, 3.036e-3), (16384, 11.876e-3)])
def test_one_card_that_the_constants_do_not_come_from(length, both):
    """One H200; the kernels' constants are an H100's."""
    assert ring_seconds(QWEN, 1, length, pairs(1, length)).both == pytest.approx(both, rel=0.03)


@pytest.mark.parametrize(("cp", "forward", "backward"), [(2, 1.749e-3, 5.513e-3), (4, 3.425e-3, 10.897e-3)])
def test_an_all_gather_as_measured(cp, forward, backward):
    got = gather_seconds(QWEN, cp, 8192, pairs(cp, 8192))
    assert got.forward == pytest.approx(forward, rel=0.05)
    assert 0.8 * backward < got.backward < backward  # copies into natural order and back are not counted


def test_a_longer_ring_as_measured():
    got = ring_seconds(QWEN, 2, 16384, pairs(2, 16384))
    assert got.forward == pytest.approx(6.678e-3, rel=0.03)
    assert 0.92 * 18.907e-3 < got.backward < 18.907e-3  # the kernel is slower over so many keys than its constant


def test_strategies():
    work = pairs(8, 8192)
    assert choose_strategy(ring_seconds(QWEN, 8, 8192, work), gather_seconds(QWEN, 8, 8192, work)) == "ring"
    work = pairs(8, 32768, positions=oracle.random_documents(np.random.default_rng(1), 1, 8 * 32768, 32))
    assert choose_strategy(ring_seconds(QWEN, 8, 32768, work), gather_seconds(QWEN, 8, 32768, work)) == "allgather"
    assert choose_strategy(Seconds(1.0, 1.0), Seconds(0.92, 0.92)) == "ring"  # it needs a cp-th of the memory


def test_payloads():
    assert choose_payload(1, 8, 8192, LITE, 2) == "expanded"
    assert choose_payload(4, 1, 8192, LITE, 2) == "latent"  # what it saves of a kernel's time, expanding it costs less
    free = H100._replace(toll=0.0)  # hops cost nothing where they hide
    assert choose_payload(4, 1, 8192, LITE, 2, machine=free) == "expanded"
    assert choose_payload(8, 1, 512, LITE, 2, machine=free) == "latent"  # a short step hides no large hop
    assert choose_payload(4, 1, 8192, LITE, 2, machine=free._replace(link=50e9)) == "latent"


@pytest.mark.parametrize("strategy", ["ring", "allgather"])
@pytest.mark.parametrize("sizes", [LITE, LITE._replace(heads=128)], ids=["lite", "full"])
def test_every_link_between_gpus_carries_the_latent(sizes: LatentSizes, strategy: Literal["ring", "allgather"]):
    """From a port of 200 Gb/s to NVLink: which link it is need not be known."""
    for cp, length, link in itertools.product((2, 8, 64), (512, 8192, 65536), (25e9, 50e9, 200e9, 400e9)):
        machine = H100._replace(link=link)
        assert choose_payload(cp, 1, length, sizes, 2, strategy=strategy, machine=machine) == "latent"


def test_an_all_gather_waits_for_every_byte():
    """Where hops hide the ring need not save them, but an all-gather hides none."""
    free = H100._replace(toll=0.0)
    assert choose_payload(4, 1, 8192, LITE, 2, machine=free) == "expanded"
    assert choose_payload(4, 1, 8192, LITE, 2, strategy="allgather", machine=free) == "latent"


def test_dead_steps_send_nothing():
    slow = H100._replace(link=1e9, toll=0.0)
    long, short = (ring_seconds(QWEN, 8, 2048, pairs(8, 2048, window=w), window=w, machine=slow) for w in (None, 1024))
    hop = 2048 * QWEN.payload / 1e9
    assert short.forward == pytest.approx(2 * 2 * hop, rel=0.02)  # three live steps
    assert long.forward == pytest.approx(7 * 2 * hop, rel=0.02)
    assert short.backward == pytest.approx(2 * hop + 2 * 4 * hop, rel=0.02)
