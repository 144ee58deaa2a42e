"""The cost model: its work is that of the key ranges to the last pair, its waiting is that of small rings worked out by
hand, and its seconds are those that were measured.
"""

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
    busiest,
    choose_payload,
    choose_strategy,
    critical_path,
    gather_seconds,
    lock_step,
    pairs,
    ring_seconds,
)
from zigzag_jax.layout import global_positions
from zigzag_jax.ranges import key_range, live_steps, visible_bounds

QWEN = Layer(heads=32, dim=128, out_dim=128, payload=2 * 4 * 128)
LITE = LatentSizes(latent=512, rope=64, heads=16, dim=192, out_dim=128)
ALONE = H100._replace(link=1e18)  # hops that take no time


def counted(cp, length, layout, positions, window):
    """The work by ranges.py, rank by rank and step by step."""
    work = []
    for step in live_steps(cp, length, window, layout):
        work.append([])
        for rank in range(cp):
            g = global_positions(rank, cp, length, layout)
            own = None if positions is None else positions[:, np.asarray(g)]
            keys = key_range(*visible_bounds(g, own, window), (rank - step) % cp, cp, length, layout)
            work[-1].append(np.maximum(np.asarray(keys.stop) - np.asarray(keys.start), 0).sum())
    return np.array(work)


@pytest.mark.parametrize("window", [None, 1, 7, 40], ids="window-{}".format)
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("cp", [1, 2, 3, 5])
def test_work_is_that_of_the_key_ranges(cp, layout, packed, window):
    positions = oracle.random_documents(np.random.default_rng(cp), 2, 12 * cp, 3) if packed else None
    got = pairs(cp, 12, layout=layout, positions=positions, window=window)
    np.testing.assert_array_equal(got, counted(cp, 12, layout, positions, window))


@pytest.mark.parametrize("cp", [1, 2, 3, 8, 256])
def test_zigzag_balances_a_plain_causal_mask_exactly(cp):
    work = pairs(cp, 64)
    assert (work == work[:, :1]).all()
    assert (work[1:] == 64 * 64 // 2).all()
    assert work.sum() == 64 * cp * (64 * cp + 1) // 2
    assert lock_step(work) == busiest(work) == 1.0


def test_four_million_tokens_over_256_ranks_are_counted_without_rounding():
    length = 2**14
    assert pairs(256, length).sum() == 256 * length * (256 * length + 1) // 2


def test_the_naive_layout_waits_for_its_last_rank():
    work = pairs(4, 1024, layout="contiguous")
    assert lock_step(work) == pytest.approx(1.75, rel=1e-3)
    assert critical_path(work.astype(float), [[]] * 4) == work[:, -1].sum()


def test_a_window_leaves_the_steps_that_it_reaches():
    assert pairs(8, 2048, window=1024).shape == (3, 8)  # steps 0, 1 and 7
    work = pairs(2, 4, window=2)  # tokens 0 1 | 6 7 and 2 3 | 4 5, each sees itself and the one before
    np.testing.assert_array_equal(work, [[6, 7], [1, 1]])


def test_two_documents_by_hand():
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 3]])  # rank 0 has 0 1 | 2 3 of each's ends, rank 1 2 3 | 0 1
    work = pairs(2, 4, positions=positions)
    np.testing.assert_array_equal(work, [[6, 6], [4, 4]])
    one_long = pairs(2, 4, positions=np.array([[0, 0, 0, 0, 0, 0, 0, 1]]))
    np.testing.assert_array_equal(one_long, [[5, 4], [0, 0]])
    assert lock_step(one_long) == 5 / 4.5


@pytest.mark.source
def test_documents_as_the_benchmarks_say():
    from balance import LENGTH, documents

    work = [pairs(4, LENGTH // 4, positions=documents(8, seed)) for seed in range(8)]
    assert np.mean([lock_step(x) for x in work]) == pytest.approx(1.92, abs=0.005)
    paths = [along_critical_path(x, (0, 1, 2, 3)) for x in work]
    assert np.mean(paths) == pytest.approx(1.67, abs=0.005)
    for x, path in zip(work, paths, strict=True):  # who waits for neighbours alone waits less
        assert busiest(x) <= path <= lock_step(x)


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
    """docs/benchmarks.md, 8192 tokens a rank. All but the last are runs that the constants come from."""
    work = pairs(cp, 8192, layout=layout)
    got = ring_seconds(QWEN, cp, 8192, work, layout=layout, machine=machine)
    assert got.forward == pytest.approx(forward, rel=0.04)
    assert got.backward == pytest.approx(backward, rel=0.04)


@pytest.mark.parametrize(("length", "both"), [(8192, 3.036e-3), (16384, 11.876e-3)])
def test_one_card_that_the_constants_do_not_come_from(length, both):
    """One H200; the kernels' constants are an H100's."""
    assert ring_seconds(QWEN, 1, length, pairs(1, length)).both == pytest.approx(both, rel=0.03)


def test_an_all_gather_as_measured():
    got = gather_seconds(QWEN, 2, 8192, pairs(2, 8192))
    assert got.forward == pytest.approx(1.749e-3, rel=0.02)
    assert 0.8 * 5.513e-3 < got.backward < 5.513e-3  # copies into natural order and back are not counted


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


def test_dead_steps_send_nothing():
    slow = H100._replace(link=1e9, toll=0.0)
    long, short = (ring_seconds(QWEN, 8, 2048, pairs(8, 2048, window=w), window=w, machine=slow) for w in (None, 1024))
    hop = 2048 * QWEN.payload / 1e9
    assert short.forward == pytest.approx(2 * 2 * hop, rel=0.02)  # three live steps
    assert long.forward == pytest.approx(7 * 2 * hop, rel=0.02)
    assert short.backward == pytest.approx(2 * hop + 2 * 4 * hop, rel=0.02)


def test_positions_must_fit():
    with pytest.raises(ValueError, match=r"positions must be \[B, 16\], got \[1, 8\]"):
        pairs(2, 8, positions=np.zeros((1, 8), int))
