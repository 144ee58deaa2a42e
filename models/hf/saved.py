"""The folders that a model can lie in, and the ways between them.

    Hugging Face's           config.json, model*.safetensors         separate tensors (see convert.py)
    an imported one          config.json, parameters*.safetensors    stacked tensors, in the dtype they had
    a training checkpoint    DIR/checkpoints/STEP                    stacked tensors, float32 (see checkpoint.py)

The config.json of the first two is the same file, kept as it came, and so are the tokenizer's files beside it.
"""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
from flax import nnx

from zigzag_jax.models.config import read_json
from zigzag_jax.models.hf import checkpoint, convert, files
from zigzag_jax.models.registry import ModelConfig, read_config
from zigzag_jax.models.sharding import Sharding

IMPORTED = "parameters"  # the stem of an imported model's files
EXTRAS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json"),
)

Folder = str | os.PathLike
Wrote = Callable[[int, int], None]  # (bytes written, bytes of all)


def has_weights(folder: Folder) -> bool:
    """Whether a folder is a model with its weights, Hugging Face's or imported."""
    return any(any(pathlib.Path(folder).glob(f"{stem}*.safetensors")) for stem in ("model", IMPORTED))


def check_weights(folder: Folder, config: ModelConfig) -> None:
    """ValueError unless a folder, Hugging Face's or imported, holds the tensors of this model; reads headers only."""
    if _imported(folder):
        convert.separate(files.Folder(folder, IMPORTED), config)
    else:
        convert.stack(files.Folder(folder), config)


def read_state(folder: Folder, config: ModelConfig, shapes: nnx.State, sharding: Sharding) -> nnx.State:
    """The parameters of a folder, Hugging Face's or imported, as a float32 state like `shapes` on the mesh.

    Each process reads the slices its own devices keep. ValueError for a folder that does not hold this model.
    """
    if _imported(folder):
        return convert.from_stacked(files.Folder(folder, IMPORTED), shapes, sharding)
    return convert.from_hf(files.Folder(folder), config, shapes, sharding)


def import_model(source: Folder, out: Folder, wrote: Wrote = lambda done, total: None) -> None:
    """Hugging Face's folder -> an imported one, tensor by tensor. ValueError for a folder that is no such model, or an
    `out` that is not empty.
    """
    with _new_folder(out) as made:
        values = read_json(source)
        tensors = convert.stack(files.Folder(source), read_config(values))
        _write(made, tensors, IMPORTED, wrote)
        _write_config(made, values)
        _copy_extras(pathlib.Path(source), made)


def export_model(
    source: Folder, out: Folder, *, dtype: str | None = None, wrote: Wrote = lambda done, total: None
) -> None:
    """An imported folder or a training checkpoint -> a folder that `transformers` loads.

    `dtype` rounds the weights ("bfloat16"); None keeps what they have. The config's dtype is that of the weights.
    ValueError for a source that is neither, or an `out` that is not empty.
    """
    with _new_folder(out) as made:
        if _imported(source):
            values, beside = read_json(source), pathlib.Path(source)
            stacked = files.Folder(source, IMPORTED)
        else:
            step = checkpoint.find(source)
            values, beside = checkpoint.config(step), step.parent.parent
            stacked = checkpoint.Parameters(step)
        tensors = convert.separate(stacked, read_config(values), None if dtype is None else jnp.dtype(dtype))
        if dtype is not None or not _imported(source):
            values = _with_dtype(values, str(tensors[0].dtype))
        _write(made, tensors, "model", wrote)
        _write_config(made, values)
        _copy_extras(beside, made)


def _imported(folder: Folder) -> bool:
    return any(pathlib.Path(folder).glob(f"{IMPORTED}*.safetensors"))


def _with_dtype(values: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config with its dtype changed, in the spelling that it has."""
    return values | {"torch_dtype" if "torch_dtype" in values else "dtype": dtype}


def _write(folder: pathlib.Path, tensors: list[files.Tensor], stem: str, wrote: Wrote) -> None:
    total, done = sum(tensor.nbytes for tensor in tensors), 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        wrote(done, total)

    files.write(folder, tensors, stem=stem, wrote=add)


def _write_config(folder: pathlib.Path, values: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def _copy_extras(source: pathlib.Path, folder: pathlib.Path) -> None:
    for name in EXTRAS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


@contextlib.contextmanager
def _new_folder(path: Folder) -> Iterator[pathlib.Path]:
    """A folder that has its name only when it is whole."""
    path = pathlib.Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"the output must be a new or an empty folder, got {path}")
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a call that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            path.rmdir()
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
