"""Threads as the processes of a run, that decide together."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from zigzag_jax.train.hosts.together import Together

PAUSES = (0.0, 0.0, 0.0)


def alone() -> Together:
    """The only process of a run, which waits for nothing."""
    return Together(0, lambda value: value, PAUSES)


class Votes:
    """`size` threads: the lowest of what all give."""

    def __init__(self, size: int = 2) -> None:
        self.given, self.barrier = [0] * size, threading.Barrier(size, timeout=60)

    def of(self, process: int) -> Together:
        def lowest(value: int) -> int:
            self.given[process] = value
            self.barrier.wait()
            found = min(self.given)
            self.barrier.wait()
            return found

        return Together(process, lowest, PAUSES)

    def all(self, act: Callable[[Together], object]) -> list:
        """What `act` gives or raises in each."""

        def one(process: int) -> object:
            try:
                return act(self.of(process))
            except Exception as error:
                return error

        size = len(self.given)
        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(one, range(size)))
