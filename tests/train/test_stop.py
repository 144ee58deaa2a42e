"""Signals ask for a stop; a second Ctrl-C insists; afterwards everything is as before."""

import os
import signal

import pytest

from zigzag_jax.train.stop import Stopped, StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_not_fatal(number: signal.Signals):
    before = signal.getsignal(number)
    said: list[str] = []
    with StopRequest(said.append) as stop:
        assert stop.asked is None
        os.kill(os.getpid(), number)
        assert stop.asked == number.name
    assert len(said) == 1
    assert said[0].startswith(number.name)
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_insists():
    with StopRequest(lambda text: None):
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_leaves_out_what_is_left_of_a_report():
    said: list[str] = []
    with StopRequest(said.append) as stop:
        part = stop.parts(9)
        part()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped):
            part()
    assert said == ["SIGTERM: all is saved, leaving the rest of the report out (Ctrl-C again stops at once)"]


class Wire:
    """What StopRequest needs of a Link: the others hear at once."""

    stop_at: int | None = None

    def stop_after(self, step: int) -> None:
        self.stop_at = step


def test_of_several_processes_all_stop_after_the_next_step():
    wire = Wire()
    here, there = (StopRequest(lambda text: None, wire) for _ in range(2))  # type: ignore[arg-type]
    with here:
        assert [here.after(4), there.after(4)] == [False, False]
        os.kill(os.getpid(), signal.SIGTERM)
        assert not here.after(5)
        assert wire.stop_at == 6
        assert not there.after(5)
        assert [here.after(6), there.after(6)] == [True, True]
    assert (here.asked, there.asked) == ("SIGTERM", "a signal to another process")


def test_of_several_processes_a_stop_after_the_last_step_leaves_out_the_report():
    wire = Wire()
    here, there = (StopRequest(lambda text: None, wire) for _ in range(2))  # type: ignore[arg-type]
    wire.stop_after(9)
    assert [here.after(9), there.after(9)] == [True, True]  # and 9 steps are all: the run goes on to its report
    for request in (here, there):
        with pytest.raises(Stopped):
            request.parts(9)()
