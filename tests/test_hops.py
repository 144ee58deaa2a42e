"""The ring's timetable, played with names in the place of arrays: who holds whose payload, and where gradients end."""

import pytest

from zigzag_jax.hops import backward_hops, forward_hops
from zigzag_jax.ranges import live_steps

CASES = [(cp, window) for cp in range(1, 10) for window in (None, 1, 9, 17, 40)]  # chunks of 8, or of 16


def on(holders: list, by: int) -> list:
    """What each rank holds when every one has sent what it held `by` ranks on."""
    return [holders[(rank - by) % len(holders)] for rank in range(len(holders))]


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize(("cp", "window"), CASES)
def test_at_each_live_step_the_payload_is_here_and_gradients_come_home(cp, window, layout):
    live = live_steps(cp, 16, window, layout)
    sources = lambda step: [(rank - step) % cp for rank in range(cp)]

    held = list(range(cp))
    for hop in forward_hops(live):
        assert held == sources(hop.step)
        held = on(held, hop.by)
    assert [hop.step for hop in forward_hops(live)] == list(live)
    assert sum(hop.by > 0 for hop in forward_hops(live)) == len(live) - 1

    hops = backward_hops(live, cp)
    held = on(list(range(cp)), live[1] if len(live) > 1 else 0)  # the first hop is made before
    gradients: list[tuple[int, list[int]]] = []  # (of whose payload, what each step added)
    for hop in hops:
        if hop is hops[-1]:
            held = list(range(cp))  # the diagonal: a rank's own payload, which it kept
        assert held == sources(hop.step)
        arrived = on(gradients, hop.came) if hop.came else [(source, []) for source in held]
        assert [source for source, _ in arrived] == held  # a gradient meets the payload that it is of
        gradients = [(source, [*steps, hop.step]) for source, steps in arrived]
        held = on(held, hop.by)
    assert gradients == [(rank, [*live[1:], 0]) for rank in range(cp)]
    assert sum(hop.came > 0 for hop in hops) == len(live) - 1
