"""Tokens on disk: all documents one after another in a memory-mapped file, and an index of where each begins.

    SIDE.tokens    uint16 [N]       (uint32 for a vocabulary of 65536 and more)
    SIDE.offsets   int64 [D + 1]    document d is tokens[offsets[d] : offsets[d + 1]], the end token included

Reading a row of a batch is then slicing: no process holds the corpus, however large it is. The files are bare arrays in
the machine's byte order; their dtype and length stand in the meta.json beside them (`zigzag_jax.train.data.dataset`).
"""

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

_CHUNK = 1 << 24  # bytes copied at once


class Tokens(Protocol):
    """What rows are made of: documents one after another, wherever they lie."""

    @property
    def lengths(self) -> np.ndarray:
        """int64 [D]: tokens of each document, the end-of-document token included (so never 0)."""
        ...

    @property
    def offsets(self) -> np.ndarray:
        """int64 [D + 1]: where each document begins, and N."""
        ...

    @property
    def size(self) -> int:
        """N: tokens of all documents."""
        ...

    def read(self, begin: int, end: int) -> np.ndarray:
        """tokens[begin : end]."""
        ...


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

    @property
    def size(self) -> int:
        """N: tokens of all documents."""
        return len(self.tokens)

    def read(self, begin: int, end: int) -> np.ndarray:
        """tokens[begin : end]."""
        return self.tokens[begin:end]


def token_dtype(ids: int) -> str:
    """The dtype that holds a vocabulary of `ids` tokens."""
    return "uint16" if ids < 2**16 else "uint32"


def read_store(folder: Path, side: str, *, dtype: str, tokens: int, documents: int) -> TokenStore:
    """Map the files of one side. Raises OSError or ValueError, which name the file that is not there or not whole."""
    for file, size in ((f"{side}.tokens", tokens * np.dtype(dtype).itemsize), (f"{side}.offsets", 8 * documents + 8)):
        if (found := (folder / file).stat().st_size) != size:
            raise ValueError(f"{file} must have {size} bytes, got {found}")
    offsets = np.fromfile(folder / f"{side}.offsets", np.int64)
    if offsets[-1] != tokens:
        raise ValueError(f"{side}.offsets must end with {tokens}, got {offsets[-1]}")
    return TokenStore(np.memmap(folder / f"{side}.tokens", dtype, "r"), offsets)


class TokenWriter(contextlib.ExitStack):
    """Appends documents to the files of one side; a context manager that closes them."""

    def __init__(self, folder: Path, side: str, *, dtype: str, end_of_document: int) -> None:
        super().__init__()
        self.dtype, self.end, self.size, self.documents = dtype, end_of_document, 0, 0
        self.tokens: BinaryIO = self.enter_context((folder / f"{side}.tokens").open("wb"))
        self.offsets: BinaryIO = self.enter_context((folder / f"{side}.offsets").open("wb"))
        self._hashes = {file: hashlib.blake2b(digest_size=16) for file in (self.tokens, self.offsets)}
        self._append(self.offsets, np.zeros(1, np.int64).tobytes())

    def add(self, ids: np.ndarray) -> None:
        """One document: int [n] without its end-of-document token."""
        self.size += len(ids) + 1
        self.documents += 1
        self._append(self.tokens, np.append(ids, self.end).astype(self.dtype).tobytes())
        self._append(self.offsets, np.array([self.size], np.int64).tobytes())

    def extend(self, folder: Path, side: str) -> None:
        """The documents that another writer of the same dtype wrote."""
        with (folder / f"{side}.tokens").open("rb") as tokens:
            while chunk := tokens.read(_CHUNK):
                self._append(self.tokens, chunk)
        offsets = np.fromfile(folder / f"{side}.offsets", np.int64)
        self._append(self.offsets, (offsets[1:] + self.size).tobytes())
        self.size += int(offsets[-1])
        self.documents += len(offsets) - 1

    @property
    def digest(self) -> str:
        """Hex digest of what both files hold."""
        return "".join(found.hexdigest() for found in self._hashes.values())

    def sync(self) -> None:
        """Everything on the disk: a rename that outlives a power cut must not name empty files."""
        for file in (self.tokens, self.offsets):
            file.flush()
            os.fsync(file.fileno())

    def _append(self, file: BinaryIO, data: bytes) -> None:
        file.write(data)
        self._hashes[file].update(data)
