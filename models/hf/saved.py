"""The folders that a model can lie in, and the ways between them.

    Hugging Face's           config.json, model*.safetensors         separate tensors (see convert.py)
    an imported one          config.json, parameters*.safetensors    stacked tensors, in the dtype they had
    a training checkpoint    DIR/checkpoints/STEP                    stacked tensors, float32 (see run_folder.py)

The config.json of the first two is the same file, kept as it came, and so are the tokenizer's files beside it.
"""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from zigzag_jax.models.balance import BIAS
from zigzag_jax.models.config import read_json
from zigzag_jax.models.hf import convert, files, run_folder
from zigzag_jax.models.progress import Told, silent
from zigzag_jax.models.registry import ModelConfig, read_config
from zigzag_jax.models.sharding import Sharding

IMPORTED = "parameters"  # the stem of an imported model's files
EXTRAS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json"),
)

Path = str | os.PathLike


class Source(NamedTuple):
    """A folder that holds a model."""

    config: dict[str, Any]
    """Its config.json."""

    tensors: Mapping[str, Any]
    """Name -> array that is read when it is sliced."""

    stacked: bool
    """Which names and shapes these are, see convert.py."""

    trained: bool
    """Whether it is a training checkpoint."""

    beside: pathlib.Path
    """The folder where a tokenizer would lie."""

    @property
    def router_bias(self) -> bool:
        """Whether the routers have a bias (see balance.py)."""
        return any(name.endswith(f".{BIAS}") for name in self.tensors)


def open_source(folder: Path) -> Source:
    """Hugging Face's folder, an imported one, or a run (or one of its checkpoints). ValueError for anything else."""
    path = pathlib.Path(folder)
    if any(path.glob(f"{IMPORTED}*.safetensors")):
        return Source(read_json(path), files.Folder(path, IMPORTED), stacked=True, trained=False, beside=path)
    if any(path.glob("model*.safetensors")):
        return Source(read_json(path), files.Folder(path), stacked=False, trained=False, beside=path)
    step = run_folder.find(path)
    if step is None:
        raise ValueError(
            f"a model's folder must hold model*.safetensors, {IMPORTED}*.safetensors or a run's checkpoints, got {path}"
        )
    config = run_folder.config(step)
    return Source(config, run_folder.Parameters(step), stacked=True, trained=True, beside=step.parent.parent)


def has_weights(folder: Path) -> bool:
    """Whether a folder is a model with its weights, Hugging Face's or imported."""
    return any(any(pathlib.Path(folder).glob(f"{stem}*.safetensors")) for stem in ("model", IMPORTED))


def check_weights(source: Source, config: ModelConfig) -> None:
    """ValueError unless a folder holds the tensors of this model; reads their shapes only."""
    (convert.separate if source.stacked else convert.stack)(source.tensors, config)


def read_state(
    source: Source, config: ModelConfig, shapes: nnx.State, sharding: Sharding, dtype: Any = np.float32,
    told: Told = silent,
) -> nnx.State:  # fmt: skip
    """The parameters of a folder as a state like `shapes` on the mesh, in `dtype`.

    Each process reads the slices its own devices keep; `told` gets the bytes of its pieces, in `dtype`. ValueError for
    a folder that does not hold this model.
    """
    if source.stacked:
        return convert.from_stacked(source.tensors, shapes, sharding, dtype, told)
    return convert.from_hf(source.tensors, config, shapes, sharding, dtype, told)


def import_model(source: Path, out: Path, wrote: Told = silent) -> None:
    """Hugging Face's folder -> an imported one, tensor by tensor. ValueError for a folder that is no such model, or an
    `out` that is not empty.
    """
    with _new_folder(out) as made:
        values = read_json(source)
        tensors = convert.stack(files.Folder(source), read_config(values))
        _write(made, tensors, IMPORTED, wrote)
        _write_rest(made, values, pathlib.Path(source))


def export_model(source: Path, out: Path, *, dtype: str | None = None, wrote: Told = silent) -> None:
    """An imported folder or a training checkpoint -> a folder that `transformers` loads.

    `dtype` rounds the weights ("bfloat16"); None keeps what they have. The config's dtype is that of the weights.
    ValueError for a source that is neither, or an `out` that is not empty.
    """
    with _new_folder(out) as made:
        found = open_source(source)
        if not found.stacked:
            raise ValueError(
                f"the source must be an imported model, a run or a checkpoint, got Hugging Face's {source}"
            )
        tensors = convert.separate(
            found.tensors, read_config(found.config), None if dtype is None else jnp.dtype(dtype)
        )
        changed = dtype is not None or found.trained
        values = _with_dtype(found.config, str(tensors[0].dtype)) if changed else found.config
        _write(made, tensors, "model", wrote)
        _write_rest(made, values, found.beside)


def _with_dtype(values: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config with its dtype changed, in the spelling that it has."""
    return values | {"torch_dtype" if "torch_dtype" in values else "dtype": dtype}


def _write(folder: pathlib.Path, tensors: list[files.Tensor], stem: str, wrote: Told) -> None:
    total, done = sum(tensor.nbytes for tensor in tensors), 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        wrote(done, total)

    files.write(folder, tensors, stem=stem, wrote=add)


def _write_rest(folder: pathlib.Path, config: dict[str, Any], beside: pathlib.Path) -> None:
    """Everything that is no tensor: the config, and the tokenizer's files."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    copy_companions(beside, folder)


def copy_companions(source: pathlib.Path, folder: pathlib.Path) -> None:
    """The files that are no weights: the tokenizer's, the generation's, and code that config.json names."""
    for file in [source / name for name in EXTRAS] + sorted(source.glob("*.py")):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)


@contextlib.contextmanager
def _new_folder(path: Path) -> Iterator[pathlib.Path]:
    """A folder that has its name only when it is whole: it is made beside it and renamed."""
    path = pathlib.Path(path).resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir()) or path.is_mount()):
        raise ValueError(f"the output must be a new folder, or an empty one that is no mount point, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    made = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    made.chmod(0o755)  # mkdtemp's are its maker's alone
    try:
        yield made
        made.replace(path)  # an empty folder may be replaced
    finally:
        shutil.rmtree(made, ignore_errors=True)
