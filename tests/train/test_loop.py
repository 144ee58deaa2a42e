"""A run that cannot begin or go on ends in one line."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from zigzag_jax.models.presets import PRESETS
from zigzag_jax.train import __main__ as command_line
from zigzag_jax.train.config import Config
from zigzag_jax.train.errors import PeerError, RunError, UserError
from zigzag_jax.train.logs.report import HeldOut
from zigzag_jax.train.loop import _parts, run
from zigzag_jax.train.stop import Stopped, StopRequest


def test_a_run_does_not_write_into_the_model_that_it_begins_with(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["tiny-qwen3-moe"].to_hf()))
    config = Config(model=str(tmp_path), random_init=True, out=tmp_path / "x" / "..")
    with pytest.raises(UserError, match=r"^out: must be another folder than the model's, got "):
        run(config)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


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


def test_the_report_moves_and_may_be_asked_to_stop_after_each_part():
    told, stop = [], StopRequest(print)
    part = _parts(stop, SimpleNamespace(doing=lambda *what: told.append(what)), 9)  # type: ignore[arg-type]
    part()
    stop.asked = "SIGTERM"
    with pytest.raises(Stopped):
        part()
    assert told == [(9, "writing the report after step", 10)] * 3
