"""What a run saved: its newest checkpoint, and the parameters inside one, one at a time.

A checkpoint (train/checkpoint.py writes them) is a folder of orbax items. `state` holds the arrays under the paths
params.… and opt_state.…; `config` is the model's config.json. One parameter can be read without the others, and
without a mesh: what an export needs.
"""

import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

STATE, CONFIG = "state", "config"


def find(path: str | os.PathLike) -> pathlib.Path | None:
    """The newest checkpoint of a run's folder (or of its folder of checkpoints), or the checkpoint itself, or None."""
    path = pathlib.Path(path).absolute()
    if (path / STATE).is_dir():
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = [p for p in folder.iterdir() if p.name.isdecimal() and (p / STATE).is_dir()] if folder.is_dir() else []
    return max(steps, key=lambda p: int(p.name), default=None)


def config(step: pathlib.Path) -> dict[str, Any]:
    """The model's config.json, as it was saved beside the state."""
    file = step / CONFIG / "metadata"
    if not file.is_file():
        raise ValueError(f"a checkpoint must hold its model's config, got {step} without {CONFIG}/metadata")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise _unreadable(step, error) from None


class Parameters(Mapping[str, Any]):
    """Stacked parameters by name ("groups.0.attention.q.weight"), each read when it is sliced; the last is kept."""

    def __init__(self, step: pathlib.Path):
        self._state = step / STATE
        try:
            tree = ocp.PyTreeCheckpointHandler().metadata(self._state).tree
        except Exception as error:  # whatever a damaged file raises
            raise _unreadable(step, error) from None
        self._found = {".".join(path): leaf for path, leaf in _leaves(tree["params"])}
        self._last: tuple[str, np.ndarray] | None = None

    def __getitem__(self, name: str) -> "Parameter":
        leaf = self._found[name]
        return Parameter(self, name, tuple(leaf.shape), np.dtype(leaf.dtype))

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def read(self, name: str) -> np.ndarray:
        """The whole parameter."""
        if self._last is None or self._last[0] != name:
            self._last = None  # before the next one is read: two may not fit
            self._last = (name, self._restore(name))
        return self._last[1]

    def _restore(self, name: str) -> np.ndarray:
        leaf, path = self._found[name], ("params", *name.split("."), "value")
        item = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        args = ocp.args.PyTreeRestore(
            item=_nested(path, item),
            restore_args=_nested(path, ocp.RestoreArgs(restore_type=np.ndarray)),
            partial_restore=True,
        )
        try:
            tree = ocp.PyTreeCheckpointHandler().restore(self._state, args=args)
        except Exception as error:  # whatever a damaged file raises
            raise _unreadable(self._state.parent, error) from None
        for key in path:
            tree = tree[key]
        return tree


class Parameter:
    """A parameter that is read when it is sliced."""

    def __init__(self, source: Parameters, name: str, shape: tuple[int, ...], dtype: np.dtype):
        self._source, self._name, self.shape, self.dtype = source, name, shape, dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        return self._source.read(self._name)[index]


def _unreadable(step: pathlib.Path, error: Exception) -> ValueError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return ValueError(f"a checkpoint must be one that can be read ({reason}), got {step}")


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Parameters of the metadata: each is a node with its "value"."""
    for key, value in tree.items():
        if key == "value" and hasattr(value, "shape"):
            yield path, value
        else:
            yield from _leaves(value, (*path, key))


def _nested(path: tuple[str, ...], leaf: Any) -> Any:
    for key in reversed(path):
        leaf = {key: leaf}
    return leaf
