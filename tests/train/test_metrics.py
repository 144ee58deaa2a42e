"""metrics.jsonl: full precision, a line at once, half lines cut off, TensorBoard events beside it."""

import json
from pathlib import Path
from types import SimpleNamespace

from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

from zigzag_jax.train.logs import metrics
from zigzag_jax.train.logs.metrics import MetricsLog
from zigzag_jax.train.logs.report import draw_loss


def test_lines_are_on_disk_at_once_and_exact(tmp_path: Path):
    log = MetricsLog(tmp_path)
    log.header(devices=4, mesh={"cp": 4}, resumed_from=None)
    log.step(1, loss=0.1 + 0.2, tokens_per_second=5.0)
    lines = [json.loads(line) for line in (tmp_path / metrics.FILE).read_text().splitlines()]
    assert lines == [
        {"devices": 4, "mesh": {"cp": 4}, "resumed_from": None},
        {"step": 1, "loss": 0.1 + 0.2, "tokens_per_second": 5.0},
    ]
    log.close()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_half_line_of_a_killed_run_is_cut_off(tmp_path: Path):
    (tmp_path / metrics.FILE).write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    log = MetricsLog(tmp_path)
    log.step(2, loss=1.0)
    log.close()
    assert metrics.read(tmp_path / metrics.FILE, "loss") == {1: 2.0, 2: 1.0}


def test_lines_that_are_none_are_counted(tmp_path: Path):
    said: list[str] = []
    file = tmp_path / metrics.FILE
    file.write_text('{"step": 1, "loss": 2.0}\n\0\0\0\n[]\n{"step": 2, "loss": 1.0}\n')
    assert metrics.read(file, "loss", said.append) == {1: 2.0, 2: 1.0}
    assert said == [f"{file}: 2 of 4 lines cannot be read and are passed over"]
    draw_loss(file, (3.0, 2.0), tmp_path / "loss.png", said.append)
    assert said[1:] == said[:1]  # said once, though two curves are read


def test_the_last_line_of_a_step_wins_and_names_are_kept_apart(tmp_path: Path):
    log = MetricsLog(tmp_path)
    log.step(1, loss=3.0)
    log.step(1, eval_loss=9.0)
    log.step(1, loss=2.0)
    log.close()
    assert metrics.read(tmp_path / metrics.FILE, "loss") == {1: 2.0}
    assert metrics.read(tmp_path / metrics.FILE, "eval_loss") == {1: 9.0}


def test_layers_are_an_object_in_the_file_and_scalars_elsewhere(tmp_path: Path):
    told = []
    log = MetricsLog(tmp_path, wandb=SimpleNamespace(log=lambda *what: told.append(what), finish=lambda: None))  # type: ignore[arg-type]
    log.step(1, loss=3.0, expert_load_by_layer={"1": 1.5, "2": 2.0})
    log.close()
    assert json.loads((tmp_path / metrics.FILE).read_text())["expert_load_by_layer"] == {"1": 1.5, "2": 2.0}
    scalars = {"loss": 3.0, "expert_load_by_layer/1": 1.5, "expert_load_by_layer/2": 2.0}
    assert told == [(1, scalars)]
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert events(file) == scalars


def events(file: Path) -> dict[str, float]:
    """The scalars of an event file: records of a length (8 bytes), its checksum (4), an event and its checksum (4)."""
    data, found = file.read_bytes(), {}
    while data:
        size = int.from_bytes(data[:8], "little")
        values = Event.FromString(data[12 : 12 + size]).summary.value
        found |= {value.tag: value.simple_value for value in values}
        data = data[16 + size :]
    return found


def test_the_other_processes_write_nothing(tmp_path: Path):
    log = MetricsLog(None)
    log.header(devices=1)
    log.step(1, loss=1.0)
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_lines_that_are_no_numbers_are_passed_over(tmp_path: Path):
    lines = b'{"step": 1, "loss": 2.0}', b"\0\0\0", b"[3]", b'{"step": 2, "loss": 1.5}', b'{"step": 3, "lo'
    (tmp_path / metrics.FILE).write_bytes(b"\n".join(lines))
    assert metrics.read(tmp_path / metrics.FILE, "loss") == {1: 2.0, 2: 1.5}
