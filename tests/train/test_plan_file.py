"""Plans of rows in the cache: found again, mapped, and never another than the one that is packed."""

import os
from pathlib import Path

import numpy as np
import pytest

from zigzag_jax.train.data import plan_file
from zigzag_jax.train.data.packing import Plan, make_plan
from zigzag_jax.train.data.plan_file import kept_plan

LENGTHS = np.random.default_rng(0).integers(1, 90, 300)
FIELDS = ("starts", "sizes", "columns", "ends", "bounds")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("ZIGZAG_CACHE", str(tmp_path))
    return tmp_path / "plans"


def assert_equal(got: Plan, want: Plan) -> None:
    assert (got.seq_len, got.seed, got.rows, got.fill) == (want.seq_len, want.seed, want.rows, want.fill)
    for name in FIELDS:
        assert getattr(got, name).dtype == getattr(want, name).dtype
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
    np.testing.assert_array_equal(got.stream(5, 99), want.stream(5, 99))


def test_the_second_start_packs_nothing_and_maps_the_file(cache: Path, monkeypatch: pytest.MonkeyPatch):
    assert_equal(kept_plan(LENGTHS, 64, seed=3), make_plan(LENGTHS, 64, seed=3))
    want = make_plan(LENGTHS, 64, seed=3)
    monkeypatch.setattr(plan_file, "make_plan", None)
    found = kept_plan(LENGTHS.astype(np.int32), 64, seed=3, say=pytest.fail)
    assert_equal(found, want)
    assert not any(getattr(found, name).flags.owndata or getattr(found, name).flags.writeable for name in FIELDS)
    assert len(list(cache.iterdir())) == 1  # nothing temporary is left


def test_what_decides_a_plan_is_its_name(cache: Path, monkeypatch: pytest.MonkeyPatch):
    other = LENGTHS.copy()
    other[7] += 1
    for lengths, seq_len, seed in ((LENGTHS, 64, 3), (other, 64, 3), (LENGTHS, 65, 3), (LENGTHS, 64, 4)):
        assert_equal(kept_plan(lengths, seq_len, seed=seed), make_plan(lengths, seq_len, seed=seed))
    monkeypatch.setattr(plan_file, "RULE", "another rule")
    kept_plan(LENGTHS, 64, seed=3)
    assert len(list(cache.iterdir())) == 5


def damage_cut(good: bytes) -> bytes:
    return good[:-8]


def damage_empty(good: bytes) -> bytes:
    return b""


def damage_bit(good: bytes) -> bytes:
    return good[:1000] + bytes([good[1000] ^ 1]) + good[1001:]


def damage_head(good: bytes) -> bytes:
    return b"[]".ljust(512) + good[512:]


def damage_foreign(good: bytes) -> bytes:
    return b"not a plan at all"


@pytest.mark.parametrize("damage", [damage_cut, damage_empty, damage_bit, damage_head, damage_foreign])
def test_a_damaged_file_is_named_and_made_again(cache: Path, damage):
    kept_plan(LENGTHS, 64, seed=3)
    said: list[str] = []
    want = make_plan(LENGTHS, 64, seed=3)
    (file,) = cache.iterdir()
    good = file.read_bytes()
    file.write_bytes(damage(good))
    assert_equal(kept_plan(LENGTHS, 64, seed=3, say=said.append), want)
    assert len(said) == 1
    assert said[0].startswith(f"the plan of rows {file} cannot be used (")
    assert file.read_bytes() == good


def test_another_plan_under_this_name_is_not_taken(cache: Path):
    kept_plan(LENGTHS, 64, seed=4)
    (other,) = cache.iterdir()
    kept_plan(LENGTHS, 64, seed=3)
    (file,) = set(cache.iterdir()) - {other}
    file.write_bytes(other.read_bytes())
    said: list[str] = []
    assert_equal(kept_plan(LENGTHS, 64, seed=3, say=said.append), make_plan(LENGTHS, 64, seed=3))
    assert said == [f"the plan of rows {file} cannot be used (it is another plan): it is made again"]


def test_a_cache_that_cannot_be_written_costs_time_only(cache: Path):
    cache.write_text("a file where the folder should be")
    said: list[str] = []
    assert_equal(kept_plan(LENGTHS, 64, seed=3, say=said.append), make_plan(LENGTHS, 64, seed=3))
    assert said[-1].startswith(f"the plan of rows cannot be kept in {cache} (")


def test_a_write_that_fails_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch):
    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    said: list[str] = []
    kept_plan(LENGTHS, 64, seed=3, say=said.append)
    assert said == [
        f"the plan of rows cannot be kept in {cache} (No space left on device): the next start makes it again"
    ]
    assert list(cache.iterdir()) == []


def test_what_a_killed_process_left_goes_away(cache: Path):
    kept_plan(LENGTHS, 64, seed=3)
    (file,) = cache.iterdir()
    left, fresh = (file.with_name(f".{file.stem}-{name}") for name in ("left", "fresh"))
    for path in (left, fresh):
        path.write_bytes(b"half a plan")
    os.utime(left, (0, 0))
    file.unlink()
    kept_plan(LENGTHS, 64, seed=3)
    assert set(cache.iterdir()) == {file, fresh}


def test_a_file_that_another_process_wrote_meanwhile_stays(cache: Path, monkeypatch: pytest.MonkeyPatch):
    """It may be mapped there."""
    real = plan_file.make_plan

    def slow(lengths: np.ndarray, seq_len: int, *, seed: int) -> Plan:
        monkeypatch.setattr(plan_file, "make_plan", real)
        kept_plan(lengths, seq_len, seed=seed)
        (file,) = cache.iterdir()
        first.append(file.stat().st_ino)
        return real(lengths, seq_len, seed=seed)

    first: list[int] = []
    monkeypatch.setattr(plan_file, "make_plan", slow)
    kept_plan(LENGTHS, 64, seed=3, say=pytest.fail)
    (file,) = cache.iterdir()
    assert first == [file.stat().st_ino]


def test_a_file_system_without_links(cache: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*paths: object) -> None:
        raise PermissionError("links")

    monkeypatch.setattr(os, "link", refuse)
    kept_plan(LENGTHS, 64, seed=3, say=pytest.fail)
    assert len(list(cache.iterdir())) == 1


def test_a_plan_that_storage_does_not_give_now_is_packed_and_left_alone(cache: Path, monkeypatch: pytest.MonkeyPatch):
    want, said = kept_plan(LENGTHS, 64, seed=3), []
    (file,) = cache.iterdir()
    before = file.stat().st_ino

    def away(*arguments: object) -> Plan:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(plan_file, "_read", away)
    assert_equal(kept_plan(LENGTHS, 64, seed=3, say=said.append), want)
    assert "Stale file handle" in said[0]
    assert file.stat().st_ino == before
