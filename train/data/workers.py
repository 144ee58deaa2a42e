"""Several processes that share a list of tasks, each of which is done whole or not at all.

Since a task that is broken off leaves nothing, stopping is killing: when a worker fails, or the caller is interrupted,
the others are killed where they are; and a worker whose parent is gone, even by kill -9, ends itself.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from zigzag_jax.train.errors import RunError, UserError

_LOOK = 0.5  # seconds between two looks at the progress
COUNTERS = 3


def run_tasks[T](
    make: Callable[[], Callable[[T], Iterator[tuple[int, ...]]]],
    tasks: Sequence[T],
    workers: int,
    watch: Callable[[Sequence[int]], None],
) -> None:
    """Do all tasks in `workers` processes, in any order.

    Each process calls `make`, which must be picklable, once, and what it returns with one task after another; that
    yields tuples of COUNTERS increments, whose sums over all processes `watch` gets twice a second.
    Raises what a worker raises, if it is a UserError, RunError or OSError; RunError for one that ends in another way.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads of JAX and of the tokenizers
    following, counters = context.Value("q", 0), context.Array("q", COUNTERS)
    pipes = [context.Pipe(duplex=False) for _ in range(min(workers, len(tasks)))]
    processes = [
        context.Process(target=_work, args=(make, tasks, following, counters, end), daemon=True) for _, end in pipes
    ]
    try:
        for process in processes:
            process.start()
        running = dict(zip(processes, (errors for errors, _ in pipes), strict=True))
        while running:
            ended = wait([process.sentinel for process in running], _LOOK)
            watch(counters.get_obj()[:])  # without its lock, which a killed worker may hold
            for process in [process for process in running if process.sentinel in ended]:
                process.join()
                errors = running.pop(process)
                if process.exitcode:
                    raise errors.recv() if errors.poll() else RunError(_how_it_ended(process.exitcode))
    finally:
        for process in processes:
            if process.pid is not None:  # it was started
                process.kill()
                process.join()


def _how_it_ended(code: int) -> str:
    how = f"was killed by signal {-code} (is there memory for fewer --workers?)" if code < 0 else "failed"
    return f"a worker {how}; the same command again goes on"


def _work(make: Callable, tasks: Sequence, following: Any, counters: Any, errors: Connection) -> None:
    """What a worker does, from its start to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all of a terminal; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work = make()
        while (n := _claim(following)) < len(tasks):
            for increments in work(tasks[n]):
                with counters.get_lock():
                    counters[:] = [x + more for x, more in zip(counters[:], increments, strict=True)]
    except (UserError, RunError, OSError) as error:
        errors.send(error)
        sys.exit(1)


def _claim(following: Any) -> int:
    with following.get_lock():
        following.value += 1
        return following.value - 1


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
