"""The int32 arrays that Hopper's attention kernels are given besides their tensors, joined into one.

Key ranges, the plan made of them, counters that begin at 0: XLA would make each by a small kernel or more of its own.
One is some 2 us, and a call may be 100. Joined they are made by one.
"""

# Pallas' annotations do not know refs
# pyright: reportIndexIssue=false

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp

from zigzag_jax.kernels.hopper import i32

_TOGETHER = 4  # every array begins at a multiple: loads of two or four numbers must be aligned


def padded(size: int) -> int:
    """The numbers between the begin of an array of so many and that of the next."""
    return size + -size % _TOGETHER


def join(*arrays: jax.Array) -> jax.Array:
    """int32 [..]: the arrays behind one another; see `parts`."""
    flat = [x.astype(jnp.int32).reshape(-1) for x in arrays]
    return jnp.concatenate([jnp.pad(x, (0, padded(x.size) - x.size)) for x in flat])


def parts(joined, shapes: Sequence[tuple[int, ...]]) -> list["Part"]:
    """In a kernel: the arrays, by their shapes, in a ref to what `join` gave."""
    begin, found = 0, []
    for shape in shapes:
        size = math.prod(shape)
        found.append(Part(joined.at[pl.ds(begin, size)], shape))
        begin += padded(size)
    return found


@dataclass(frozen=True)
class Part:
    """One of the arrays."""

    numbers: Any
    """The ref to them, which has one axis."""
    shape: tuple[int, ...]

    def at(self, *index):
        """Where a number is in `numbers`; trailing axes may be left out."""
        place = i32(0)
        for axis, i in enumerate(index):
            place += i * math.prod(self.shape[axis + 1 :])
        return place

    def __getitem__(self, index):
        return self.numbers[self.at(*(index if isinstance(index, tuple) else (index,)))]

    def rows(self, *index, rows: pl.Slice):
        """A ref to some numbers of the last axis, `index` in all others."""
        return self.numbers.at[pl.ds(self.at(*index, rows.start), rows.size)]
