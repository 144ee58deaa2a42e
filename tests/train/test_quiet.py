"""Errors that are raised are not printed too; all others are."""

import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from orbax.checkpoint._src.metadata.array_metadata_store import Store

from zigzag_jax.train.quiet import LateWrites, say_errors_once


def test_late_writes_of_a_failed_save_print_nothing(monkeypatch: pytest.MonkeyPatch):
    said = []
    monkeypatch.setattr("sys.unraisablehook", said.append)
    hook = LateWrites(said.append)
    hook(SimpleNamespace(exc_value=RuntimeError("Event loop is closed")))
    assert not said
    hook(SimpleNamespace(exc_value=RuntimeError("another")))
    assert len(said) == 1


def test_it_is_done_once(monkeypatch: pytest.MonkeyPatch):
    said = []
    monkeypatch.setattr("sys.unraisablehook", said.append)
    say_errors_once()
    first = sys.unraisablehook
    say_errors_once()
    assert sys.unraisablehook is first
    assert isinstance(first, LateWrites)


def test_what_a_failed_read_had_not_begun_warns_of_nothing(monkeypatch: pytest.MonkeyPatch):
    async def another() -> None: ...

    monkeypatch.setattr("sys.unraisablehook", sys.unraisablehook)  # which is another one afterwards
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Store()._get_array_metadatas(Path("nowhere"))  # pyright: ignore[reportArgumentType, reportUnusedCoroutine]
        another()  # pyright: ignore[reportUnusedCoroutine]
        assert len(caught) == 2
        say_errors_once()
        Store()._get_array_metadatas(Path("nowhere"))  # pyright: ignore[reportArgumentType, reportUnusedCoroutine]
        another()  # pyright: ignore[reportUnusedCoroutine]
    assert [str(warning.message).split("'")[1].split(".")[-1] for warning in caught[2:]] == ["another"]
