"""What stops a run that cannot go on."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from zigzag_jax.train import __main__ as command_line
from zigzag_jax.train.errors import PeerError, RunError, UserError
from zigzag_jax.train.logs.report import HeldOut
from zigzag_jax.train.loop import _check_finite, _uneven
from zigzag_jax.train.task import Losses


@pytest.mark.parametrize(("loss", "norm"), [(np.nan, 1.0), (1.0, np.inf)])
def test_a_loss_that_is_no_number_stops_before_it_is_saved(loss: float, norm: float):
    zero = jnp.float32(0)
    result = SimpleNamespace(
        losses=Losses(jnp.float32(loss), zero, jnp.float32(1), jnp.zeros((0, 1)), zero), grad_norm=np.float32(norm)
    )
    with pytest.raises(
        RunError, match=r"^step 7: the .* is (nan|inf), training stops; that of step 5; its batch is there"
    ):
        _check_finite(7, result, lambda: "that of step 5", lambda: "its batch is there")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("batch", "must be even", 3), 2, "error: batch: must be even, got 3"),
        (RunError("step 1: no"), 1, "error: step 1: no"),
        (PeerError("process 1 did not come"), 70, "error: process 1 did not come"),
        (KeyboardInterrupt(), 130, "interrupted; the same command again goes on"),
    ],
)
def test_each_end_is_one_line(
    error: BaseException, code: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(config: object) -> int:
        raise error

    monkeypatch.setattr(command_line, "run", fail)
    assert command_line.main([]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(text)


def test_the_held_out_rows_do_not_depend_on_the_mesh():
    class Batches(SimpleNamespace):
        def __len__(self) -> int:
            return 100

    batches = (Batches(batch=8, seq_len=padded, plan=SimpleNamespace(seq_len=512)) for padded in (512, 516))
    assert [HeldOut(b).count for b in batches] == [8, 8]  # type: ignore[arg-type]


def test_how_uneven_the_load_is():
    assert _uneven(np.array([[2.0, 2], [1, 3]], np.float32)) == 1.5
    assert _uneven(np.zeros((0, 4), np.float32)) == 1.0
