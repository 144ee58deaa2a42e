"""What the libraries below a checkpoint print of an error that they also raise: tracebacks that nobody needs twice."""

import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any


def say_errors_once() -> None:
    """From now on in this process; more calls change nothing."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_not_said_twice)
    if not isinstance(sys.unraisablehook, LateWrites):
        sys.unraisablehook = LateWrites(sys.unraisablehook)
    # Arrays are read beside what describes them. Where an array is damaged, orbax closes its event loop, and a
    # description may be due that was not begun.
    left = r"coroutine 'Store\._get_array_metadatas' was never awaited"
    warnings.filterwarnings("ignore", left, RuntimeWarning)


class LateWrites:
    """A sys.unraisablehook that passes over what tensorstore's threads say when a save has failed: writes that were
    under way come back to an event loop that orbax has closed meanwhile, and each would print a traceback.
    """

    def __init__(self, other: Callable[[Any], None]) -> None:
        self._other = other

    def __call__(self, what: Any) -> None:
        if not (isinstance(what.exc_value, RuntimeError) and str(what.exc_value) == "Event loop is closed"):
            self._other(what)


def _not_said_twice(record: logging.LogRecord) -> bool:
    """Orbax writes a traceback of every error that it also raises, and asyncio one of every other of its writes."""
    return record.levelno != logging.ERROR or "orbax" not in record.pathname + record.getMessage()
