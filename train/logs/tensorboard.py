"""TensorBoard events of a run, written by the thread that calls.

tensorboardX's SummaryWriter hands events to a thread of its own. A full disk ends that thread, and ten events later the
training waits for it for ever; here the error comes to the caller, and what was not written goes out with the next.
"""

import time
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary


class Events:
    """One event file; whatever earlier files of the folder say of the steps from `first` on is hidden."""

    def __init__(self, folder: Path, first: int) -> None:
        """OSError where the folder cannot be written."""
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        self._writer.write_event(Event(step=first, file_version="brain.Event:2"))
        self._writer.write_event(Event(step=first, session_log=SessionLog(status=SessionLog.START)))
        self._writer.flush()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One scalar a name, on disk when this returns. OSError where it is not, yet."""
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._writer.write_event(Event(step=step, wall_time=time.time(), summary=summary))
        self._writer.flush()

    def close(self) -> None:
        """Close the file. OSError where the disk has not taken all of it."""
        self._writer.close()
