"""Hugging Face's files: sharded safetensors, read lazily and written in pieces.

A safetensors file is 8 bytes with the length of a JSON header, the header (name -> dtype, shape, byte range), and the
bytes. Files are mapped into memory, so a tensor costs nothing until rows of it are read; a folder of many files is one
mapping from name to tensor. NumPy has no bfloat16, ml_dtypes (a part of jax) has.

Format: https://huggingface.co/docs/safetensors, "Format".
"""

import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"


class Folder(Mapping[str, np.ndarray]):
    """The tensors of all safetensors files of a saved model, memory-mapped: name -> array that is read when sliced."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = pathlib.Path(folder)
        self.tensors: dict[str, np.ndarray] = {}
        files = sorted(self.folder.glob("model*.safetensors"))
        if not files:
            raise ValueError(f"a saved model must hold model*.safetensors, got the folder {self.folder} without any")
        for file in files:
            for name, tensor in _mapped(file):
                if name in self.tensors:
                    raise ValueError(f"a tensor must be in one file, got {name} in {file.name} and another")
                self.tensors[name] = tensor
        self._check_index()

    def _check_index(self) -> None:
        """A file that is missing shows in the index only."""
        path = self.folder / INDEX
        if path.exists() and (lost := json.loads(path.read_text())["weight_map"].keys() - self.tensors.keys()):
            raise ValueError(f"a saved model must hold all tensors of {INDEX}, got none for {sorted(lost)[:3]}")

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
        header = json.loads(f.read(length))
    data = np.memmap(file, np.uint8, "r", offset=8 + length) if size > 8 + length else np.zeros(0, np.uint8)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"weights must be of {', '.join(DTYPES)}, got {name} of {entry['dtype']}")
        begin, end = entry["data_offsets"]
        if end > len(data):
            raise ValueError(f"a safetensors file must hold the bytes of {name}, got {file} cut short")
        yield name, data[begin:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])


def write(folder: str | os.PathLike, tensors: Iterable[tuple[str, np.ndarray]], *, most: int = 4 << 30) -> None:
    """Write tensors as sharded safetensors with an index, as `save_pretrained` lays them out.

    `tensors` is walked once and at most about `most` bytes of it are held at a time. Files are written under another
    name first, so that a folder never holds half a file under a right name.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards, held, size, total = [], {}, 0, 0
    for name, tensor in tensors:
        if held and size + tensor.nbytes > most:
            shards.append(_write_shard(folder, len(shards), held))
            held, size = {}, 0
        held[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    shards.append(_write_shard(folder, len(shards), held))
    weight_map = {}
    for i, (path, names) in enumerate(shards):
        many = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        final = folder / (many if len(shards) > 1 else "model.safetensors")
        path.rename(final)
        weight_map |= dict.fromkeys(names, final.name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(
    folder: pathlib.Path, number: int, tensors: Mapping[str, np.ndarray]
) -> tuple[pathlib.Path, list[str]]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise ValueError(f"weights must be of {', '.join(DTYPES)}, got {name} of {tensor.dtype}")
        header[name] = {
            "dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes],
        }  # fmt: skip
        at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    path = folder / f".shard-{number}.tmp"
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            f.write(np.ascontiguousarray(tensor).tobytes())
    return path, list(tensors)
