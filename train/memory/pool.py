"""What of a card's memory a program may fill, and how a run gets it.

JAX takes a part of the card at its start, three quarters unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise, and all
arrays live in it. The rest is for the CUDA context, NCCL's buffers and loaded kernels.
"""

from dataclasses import dataclass

DEFAULT, LARGE = 0.75, 0.92  # JAX's own part, and one that leaves 6 GiB of an H100 for the rest


@dataclass(frozen=True)
class Pool:
    """The memory of one card that JAX may use."""

    size: int
    """Bytes."""

    def room(self, state: int) -> int:
        """Bytes within which XLA keeps its schedule: of what `state` leaves free it sets a twentieth aside.

        Over that it goes for memory alone: it recomputes, and no hop flies above a kernel.
        """
        return state + (self.size - state) * 95 // 100


def start_with(peak: int, state: int, memory: int, fraction: float) -> float | None:
    """The XLA_PYTHON_CLIENT_MEM_FRACTION that a run of this peak has to be started with, JAX's own where that will do.

    `fraction` is what the run was planned for; None: neither that nor LARGE has room.
    """
    for part in sorted({DEFAULT, max(DEFAULT, fraction), LARGE}):
        if peak <= Pool(int(memory * part)).room(state):
            return part
    return None
