"""The batch of a step that went wrong is kept."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from zigzag_jax.train.errors import RunError
from zigzag_jax.train.logs.replay import check_finite, save_batch
from zigzag_jax.train.step import StepMetrics
from zigzag_jax.train.task import Losses


@pytest.fixture
def batch() -> dict[str, jax.Array]:
    mesh = jax.make_mesh((2, 2), ("dp", "cp"), devices=jax.devices()[:4])
    return {"tokens": jax.device_put(np.arange(32).reshape(4, 8), NamedSharding(mesh, PartitionSpec("dp", "cp")))}


def test_whole(tmp_path: Path, batch: dict[str, jax.Array]):
    assert save_batch(tmp_path, 7, batch) == f"its batch is {tmp_path / 'bad_batch_7.npz'}"
    np.testing.assert_array_equal(np.load(tmp_path / "bad_batch_7.npz")["tokens"], np.arange(32).reshape(4, 8))


def test_pieces_of_several_processes(tmp_path: Path, batch: dict[str, jax.Array], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    save_batch(tmp_path, 7, batch)
    found = np.load(tmp_path / "bad_batch_7-process-0.npz")
    assert sorted(found) == ["tokens[0:2,0:4]", "tokens[0:2,4:8]", "tokens[2:4,0:4]", "tokens[2:4,4:8]"]
    np.testing.assert_array_equal(found["tokens[2:4,4:8]"], np.arange(32).reshape(4, 8)[2:4, 4:8])


def test_a_disk_that_takes_nothing(tmp_path: Path, batch: dict[str, jax.Array]):
    assert save_batch(tmp_path / "nowhere", 7, batch).startswith("its batch could not be kept (No such file")


@pytest.mark.parametrize(("loss", "norm"), [(np.nan, 1.0), (1.0, np.inf)])
def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path, batch: dict[str, jax.Array], loss: float, norm: float):
    zero = jnp.float32(0)
    losses = Losses(jnp.float32(loss), zero, jnp.float32(1), jnp.zeros((0, 1)), zero)
    rule = rf"^step 7: the .* is (nan|inf), training stops; that of step 5; its batch is {tmp_path}/bad_batch_7.npz$"
    with pytest.raises(RunError, match=rule):
        check_finite(7, StepMetrics(losses, jnp.float32(norm)), batch, tmp_path, lambda: "that of step 5")
    good = StepMetrics(losses._replace(loss=zero), zero)
    check_finite(8, good, batch, tmp_path, pytest.fail)
    assert [path.name for path in tmp_path.iterdir()] == ["bad_batch_7.npz"]
