"""Bytes that are read or written are shown: a bar in a terminal, a line now and then elsewhere, at first nothing."""

import os
from pathlib import Path

import pytest
from rich.console import Console

from zigzag_jax.models.progress import ByteBar

GIB = 2**30


@pytest.mark.parametrize("terminal", [True, False])
def test_bytes_are_shown(terminal: bool, monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr("zigzag_jax.models.progress.time.monotonic", lambda: next(clock))
    with Path(os.devnull).open("w") as null:
        console = Console(file=null, record=True, width=100, force_terminal=terminal)
        with ByteBar("reading weights", "read", console):
            pass
        assert not console.export_text().strip()
        with ByteBar("reading weights", "read", console) as told:
            for n in range(1, 5):
                told(n * GIB, 4 * GIB)
    lines = [line for line in console.export_text().splitlines() if line.strip()]
    if terminal:
        assert lines[-1].startswith("reading weights")
        assert "4.3/4.3 GB" in lines[-1]
    else:
        assert lines == ["2.0 of 4.0 GiB read", "4.0 of 4.0 GiB read"]
