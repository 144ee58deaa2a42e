"""Safetensors in several files, as Hugging Face lays them out: read lazily, written piece by piece.

A safetensors file is 8 bytes with the length of a JSON header, the header (name -> dtype, shape, byte range), and the
bytes. Files are mapped into memory, so a tensor costs nothing until rows of it are read; a folder of many files is one
mapping from name to tensor. NumPy has no bfloat16, ml_dtypes (a part of jax) has.

Format: https://huggingface.co/docs/safetensors, "Format".
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
META = "__metadata__"  # the one key of a header that is no tensor
INDEX = ".safetensors.index.json"
_LISTED = 20  # names that a message tells


def listed(names: list[str]) -> str:
    """Names as a message tells them: all of a few, the first of many."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


class Folder(Mapping[str, np.ndarray]):
    """The tensors of all files STEM*.safetensors of a folder, memory-mapped: name -> array that is read when sliced."""

    def __init__(self, folder: str | os.PathLike, stem: str = "model"):
        self.folder, self.stem = pathlib.Path(folder), stem
        self.tensors: dict[str, np.ndarray] = {}
        files = sorted(self.folder.glob(f"{stem}*.safetensors"))
        if not files:
            raise ValueError(f"a saved model must hold {stem}*.safetensors, got the folder {self.folder} without any")
        for file in files:
            for name, tensor in _mapped(file):
                if name in self.tensors:
                    raise ValueError(f"a tensor must be in one file, got {name} in {file.name} and another")
                self.tensors[name] = tensor
        self._check_index()

    def _check_index(self) -> None:
        """A file that is missing shows in the index only."""
        path = self.folder / f"{self.stem}{INDEX}"
        if not path.exists():
            return
        try:
            places = dict(json.loads(path.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"an index must be JSON with a weight_map ({error!r}), got {path}") from None
        if lost := sorted(places.keys() - self.tensors.keys()):
            homes = listed(sorted({str(places[name]) for name in lost}))
            found = f"{len(lost)} missing (of {homes}): {listed(lost)}"
            raise ValueError(f"a saved model must hold all tensors of {path.name}, got {found}")

    def __getitem__(self, name: str) -> np.ndarray:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def _mapped(file: pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"a safetensors file must hold its header of {length} bytes, got {size} bytes in {file}")
        try:
            header = json.loads(f.read(length))
            entries = [(name, x["dtype"], x["shape"], *x["data_offsets"]) for name, x in header.items() if name != META]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"a safetensors file must have a header as the format says ({error!r}), got {file}"
            ) from None
    data = np.memmap(file, np.uint8, "r", offset=8 + length) if size > 8 + length else np.zeros(0, np.uint8)
    for name, dtype, shape, begin, end in entries:
        if dtype not in DTYPES:
            raise ValueError(f"weights must be of {', '.join(DTYPES)}, got {name} of {dtype}")
        if end > len(data):
            raise ValueError(f"a safetensors file must hold the bytes of {name}, got {file} cut short")
        yield name, data[begin:end].view(DTYPES[dtype]).reshape(shape)


class Tensor(NamedTuple):
    """A tensor to be written: what a file says of it, and where its values come from."""

    name: str
    """Its name in the file."""

    dtype: np.dtype
    """One of DTYPES."""

    shape: tuple[int, ...]
    """Its dimensions."""

    pieces: Callable[[], Iterable[np.ndarray]]
    """The values in C order, in one array or several; called once, when they are written."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(
    folder: str | os.PathLike,
    tensors: Iterable[Tensor],
    *,
    stem: str = "model",
    most: int = 4 << 30,
    wrote: Callable[[int], None] = lambda count: None,
) -> None:
    """Write tensors as safetensors, several files with an index where they are over `most` bytes together.

    Values are read and written piece by piece: what is held is one piece. `wrote` is told the bytes of each. A file
    that was not finished ends in .tmp.
    """
    folder, shards = pathlib.Path(folder), _shards(tensors, most)
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for i, shard in enumerate(shards):
        many = f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        final = folder / (many if len(shards) > 1 else f"{stem}.safetensors")
        unfinished = final.with_suffix(".tmp")
        _write_shard(unfinished, shard, wrote)
        unfinished.rename(final)
        weight_map |= {tensor.name: final.name for tensor in shard}
    if len(shards) > 1:
        total = sum(tensor.nbytes for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}{INDEX}").write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: Iterable[Tensor], most: int) -> list[list[Tensor]]:
    shards, size = [[]], 0
    for tensor in tensors:
        if tensor.dtype not in NAMES:
            raise ValueError(f"weights must be of {', '.join(DTYPES)}, got {tensor.name} of {tensor.dtype}")
        if shards[-1] and size + tensor.nbytes > most:
            shards, size = [*shards, []], 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _write_shard(path: pathlib.Path, tensors: Iterable[Tensor], wrote: Callable[[int], None]) -> None:
    header: dict[str, Any] = {META: {"format": "pt"}}
    at = 0
    for tensor in tensors:
        place = [at, at + tensor.nbytes]
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place,
        }  # fmt: skip
        at = place[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for piece in tensor.pieces():
                f.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
                wrote(piece.nbytes)
        f.flush()
        os.fsync(f.fileno())  # the name that follows must not outlive its bytes
