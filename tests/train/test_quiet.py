"""Errors that are raised are not printed too; all others are."""

import sys
from types import SimpleNamespace

import pytest

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
