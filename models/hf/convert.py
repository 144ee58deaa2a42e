"""Saved tensors <-> parameters, either way a loop over the table of names.py.

Three forms of the same numbers, each as a mapping from names to arrays that are read when they are sliced:

    separate    Hugging Face's: a tensor for every matrix of every expert of every layer, [out, in]
    stacked     ours on disk: a tensor for every parameter, named by its path ("groups.0.attention.q.weight")
    state       ours on a mesh, every device with its piece; float32 for training
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh

from zigzag_jax.models.balance import BIAS
from zigzag_jax.models.hf.files import Tensor, listed
from zigzag_jax.models.hf.names import EMBEDDING, HEAD, Entry, Path, entries
from zigzag_jax.models.progress import Told, silent
from zigzag_jax.models.registry import ModelConfig, model_of
from zigzag_jax.models.sharding import Sharding, abstract_state, parameter_shardings

Arrays = Mapping[str, Any]  # name -> array
Parts = dict[tuple[int, ...], Entry]  # place in a parameter -> the tensor that lies there


def dotted(path: Path) -> str:
    """A parameter's name in the stacked form."""
    return ".".join(map(str, path))


def from_hf(
    tensors: Arrays, config: ModelConfig, shapes: nnx.State, sharding: Sharding, dtype: Any = np.float32,
    told: Told = silent,
) -> nnx.State:  # fmt: skip
    """A state like `shapes` (see `abstract_state`) on the mesh, in `dtype`, from the separate form.

    Each process makes the pieces that its own devices keep, one at a time: with `files.Folder`, which maps files into
    memory, a host holds one device's piece of one parameter beside what is on the devices. ValueError that lists the
    tensors that are missing, have another shape, or that nothing here takes (`check_tensors`).
    """
    tensors = _without_copied_head(tensors, config)
    flat = {path: v.get_value().shape for path, v in nnx.to_flat_state(shapes)}
    parts = _parts(config)
    check_tensors(tensors, _separate_shapes(flat, parts))

    def reader(path: Path):
        # these models have no router bias in their files: it begins at zero
        if path[-1] == BIAS:
            return _zeros(flat[path])
        return functools.partial(_read, tensors, parts[path], flat[path], dtype)

    return _place(shapes, sharding, reader, np.dtype(dtype).itemsize, told)


def from_stacked(
    tensors: Arrays, shapes: nnx.State, sharding: Sharding, dtype: Any = np.float32, told: Told = silent
) -> nnx.State:
    """The same from the stacked form. A router bias that is not there begins at zero."""
    flat = {dotted(path): v.get_value().shape for path, v in nnx.to_flat_state(shapes)}
    absent = {name for name in flat if name.endswith(f".{BIAS}") and name not in tensors}
    check_tensors(tensors, {name: shape for name, shape in flat.items() if name not in absent})

    def reader(path: Path):
        name = dotted(path)
        if name in absent:
            return _zeros(flat[name])
        kept = np.float32 if name.endswith(f".{BIAS}") else dtype  # its steps are smaller than bfloat16 has
        return lambda index: np.asarray(tensors[name][index]).astype(kept)

    return _place(shapes, sharding, reader, np.dtype(dtype).itemsize, told)


def _zeros(shape: tuple[int, ...]):
    return lambda index: np.zeros(shape, np.float32)[index]


def _place(
    shapes: nnx.State, sharding: Sharding, reader: Callable[[Path], Callable[[Any], np.ndarray]], itemsize: int,
    told: Told,
) -> nnx.State:  # fmt: skip
    where = dict(nnx.to_flat_state(parameter_shardings(shapes, sharding)))
    flat = {path: (x, x.get_value().shape, where[path].get_value()) for path, x in nnx.to_flat_state(shapes)}
    counts = [len(_keepers(shape, cut)) * math.prod(cut.shard_shape(shape)) for _, shape, cut in flat.values()]
    done = 0

    def add(piece: np.ndarray) -> None:
        nonlocal done
        done += piece.size
        told(done * itemsize, sum(counts) * itemsize)

    return nnx.from_flat_state(
        [(path, x.replace(_place_one(shape, cut, reader(path), add))) for path, (x, shape, cut) in flat.items()]
    )


def _keepers(shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> list[tuple[Any, list[jax.Device]]]:
    """The pieces of an array that this process keeps: the index of each, and on which devices."""
    found: dict[str, tuple[Any, list[jax.Device]]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        found.setdefault(str(index), (index, []))[1].append(device)
    return list(found.values())


def _place_one(
    shape: tuple[int, ...], sharding: jax.sharding.Sharding, read: Callable[[Any], np.ndarray],
    add: Callable[[np.ndarray], None],
) -> jax.Array:  # fmt: skip
    """One array, piece by piece; a piece that several devices keep is read once.

    `jax.make_array_from_callback` would make all of them first.
    """
    pieces = []
    for index, devices in _keepers(shape, sharding):
        piece = read(index)
        pieces += [jax.device_put(piece, device) for device in devices]
        jax.block_until_ready(pieces[-len(devices) :])
        add(piece)
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)


def stack(tensors: Arrays, config: ModelConfig) -> list[Tensor]:
    """The stacked form of the separate one, in the dtype it has; read when it is written. ValueError as `from_hf`, and
    where the tensors of one parameter have several dtypes.
    """
    tensors = _without_copied_head(tensors, config)
    shapes, parts = abstract_parameters(config), _parts(config)
    check_tensors(tensors, _separate_shapes(shapes, parts))
    return [_stacked(dotted(path), shape, parts[path], tensors) for path, shape in shapes.items()]


def _stacked(name: str, shape: tuple[int, ...], parts: Parts, tensors: Arrays) -> Tensor:
    dtypes = {tensors[entry.name].dtype for entry in parts.values()}
    if len(dtypes) > 1:
        found = " and ".join(sorted(map(str, dtypes)))
        raise ValueError(f"the tensors of equal layers must have one dtype, got {found} for {name}")

    def pieces() -> Iterator[np.ndarray]:
        for at in sorted(parts):  # the order of the stacked array
            value = tensors[parts[at].name]
            yield value.T if parts[at].transposed else value

    return Tensor(name, dtypes.pop(), shape, pieces)


def separate(tensors: Arrays, config: ModelConfig, dtype: Any = None) -> list[Tensor]:
    """The separate form of the stacked one, rounded to `dtype` where one is given; read when it is written.

    Tensors of one parameter stand together: what is slow to read is read once. ValueError that lists the parameters
    that are missing, have another shape, or that this model does not have.
    """
    if biases := [name for name in tensors if name.endswith(f".{BIAS}")]:
        raise ValueError(f"a model must have no router bias to be written for transformers, got {', '.join(biases)}")
    shapes = abstract_parameters(config)
    check_tensors(tensors, {dotted(path): shape for path, shape in shapes.items()})
    found = []
    for path, parts in _parts(config).items():
        for at, entry in parts.items():
            shape = shapes[path][len(at) :]
            kept = np.dtype(tensors[dotted(path)].dtype if dtype is None else dtype)
            read = functools.partial(_separated, tensors, dotted(path), at, entry.transposed, kept)
            found.append(Tensor(entry.name, kept, shape[::-1] if entry.transposed else shape, read))
    return found


def _separated(tensors: Arrays, name: str, at: tuple[int, ...], transposed: bool, dtype: np.dtype):
    value = np.asarray(tensors[name][at]).astype(dtype, copy=False)
    yield value.T if transposed else value


def to_hf(state: nnx.State, config: ModelConfig) -> dict[str, np.ndarray]:
    """The separate form of a state of ours (parameters, or their gradients), on the host."""
    ours = {dotted(path): np.asarray(variable.get_value()) for path, variable in nnx.to_flat_state(state)}
    return {tensor.name: next(iter(tensor.pieces())) for tensor in separate(ours, config)}


def abstract_parameters(config: ModelConfig) -> dict[Path, tuple[int, ...]]:
    """The shape of every parameter, by its path; needs no device."""
    mesh = AbstractMesh((1,), ("cp",), axis_types=(AxisType.Auto,))
    sharding = Sharding(cast(Mesh, mesh))  # shapes need no devices
    _, shapes = abstract_state(lambda rngs: model_of(config)(config, sharding, rngs=rngs, dtype=jnp.float32))
    return {path: variable.get_value().shape for path, variable in nnx.to_flat_state(shapes)}


def _without_copied_head(tensors: Arrays, config: ModelConfig) -> Arrays:
    """Some files of models with tied embeddings hold the head too: it says nothing, unless it is another matrix."""
    head, table = (tensors.get(name) for name in (HEAD, EMBEDDING))
    if not config.tie_word_embeddings or head is None or table is None:
        return tensors
    if head.dtype != table.dtype or not np.array_equal(head, table):
        raise ValueError(f"{HEAD} must equal {EMBEDDING} where tie_word_embeddings is true, got another matrix")
    return {name: x for name, x in tensors.items() if name != HEAD}


def _parts(config: ModelConfig) -> dict[Path, Parts]:
    parts: dict[Path, Parts] = {}
    for entry in entries(config):
        parts.setdefault(entry.path, {})[entry.at] = entry
    return parts


def _separate_shapes(shapes: Mapping[Path, tuple[int, ...]], parts: Mapping[Path, Parts]) -> dict[str, tuple[int, ...]]:
    wanted = {}
    for path, found in parts.items():
        for at, entry in found.items():
            shape = shapes[path][len(at) :]
            wanted[entry.name] = shape[::-1] if entry.transposed else shape
    return wanted


def check_tensors(tensors: Arrays, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError that lists what is missing, what is unexpected, and what has another shape: all three at once."""
    wrong = [
        f"{n} {tuple(tensors[n].shape)} instead of {s}"
        for n, s in wanted.items()
        if n in tensors and tuple(tensors[n].shape) != s
    ]
    faults = (
        ("missing", [n for n in wanted if n not in tensors]),
        ("unexpected", sorted(set(tensors) - wanted.keys())),
        ("of another shape", wrong),
    )
    if found := "; ".join(f"{len(names)} {words}: {listed(names)}" for words, names in faults if names):
        raise ValueError(f"a saved model must hold the tensors of its config and no others, got {found}")


def _read(tensors: Arrays, parts: Parts, shape: tuple[int, ...], dtype: Any, index) -> np.ndarray:
    """The piece `index` (a slice for each dimension of `shape`) of a parameter made of `parts`, in `dtype`."""
    bounds = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
    piece = np.empty([end - begin for begin, end in bounds], dtype)
    lead = len(next(iter(parts)))
    inner = tuple(slice(*b) for b in bounds[lead:])
    for at in itertools.product(*(range(*b) for b in bounds[:lead])):
        entry = parts[at]
        value = tensors[entry.name][inner[::-1] if entry.transposed else inner]
        place = tuple(i - begin for i, (begin, _) in zip(at, bounds[:lead], strict=True))
        piece[place] = value.T if entry.transposed else value
    return piece
