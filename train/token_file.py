"""Tokens on disk: all documents one after another in a memory-mapped file, and an index of where each begins.

    SIDE.tokens    uint16 [N]       (uint32 for a vocabulary of 65536 and more)
    SIDE.offsets   int64 [D + 1]    document d is tokens[offsets[d] : offsets[d + 1]], the end token included

Reading a row of a batch is then slicing: no process holds the corpus, however large it is. The files are bare arrays in
the machine's byte order; their dtype and length stand in the meta.json beside them (`zigzag_jax.train.store`).
"""

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np


@dataclass(frozen=True, eq=False)
class TokenStore:
    """The documents of one side of a dataset, as tokens."""

    tokens: np.ndarray
    """uint16 or uint32 [N], memory-mapped: slice it, do not copy it whole."""
    offsets: np.ndarray
    """int64 [D + 1]: where each document begins, and N."""

    @property
    def lengths(self) -> np.ndarray:
        """int64 [D]: tokens of each document, the end-of-document token included (so never 0)."""
        return np.diff(self.offsets)


def token_dtype(ids: int) -> str:
    """The dtype that holds a vocabulary of `ids` tokens."""
    return "uint16" if ids < 2**16 else "uint32"


def read_store(folder: Path, side: str, *, dtype: str, size: int) -> TokenStore:
    """Map the files of one side. Raises OSError or ValueError when they are not there or not of the recorded size."""
    tokens = np.memmap(folder / f"{side}.tokens", dtype, "r")
    offsets = np.fromfile(folder / f"{side}.offsets", np.int64)
    if not len(offsets) or not len(tokens) == size == offsets[-1]:
        raise ValueError(f"{side}.tokens must hold {size} tokens, got {len(tokens)}")
    return TokenStore(tokens, offsets)


class TokenWriter(contextlib.ExitStack):
    """Appends documents to the files of one side; a context manager that closes them."""

    def __init__(self, folder: Path, side: str, *, dtype: str, end_of_document: int) -> None:
        super().__init__()
        self.dtype, self.end, self.size = dtype, end_of_document, 0
        self.hash = hashlib.blake2b(digest_size=16)
        self.tokens: BinaryIO = self.enter_context((folder / f"{side}.tokens").open("wb"))
        self.offsets: BinaryIO = self.enter_context((folder / f"{side}.offsets").open("wb"))
        self._append(self.offsets, np.zeros(1, np.int64))

    def add(self, ids: np.ndarray) -> None:
        """One document: int [n] without its end-of-document token."""
        self.size += len(ids) + 1
        self._append(self.tokens, np.append(ids, self.end).astype(self.dtype))
        self._append(self.offsets, np.array([self.size], np.int64))

    def sync(self) -> None:
        """Everything on the disk: a rename that outlives a power cut must not name empty files."""
        for file in (self.tokens, self.offsets):
            file.flush()
            os.fsync(file.fileno())

    def _append(self, file: BinaryIO, array: np.ndarray) -> None:
        file.write(array.tobytes())
        self.hash.update(array.tobytes())
