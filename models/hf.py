"""Hugging Face's parameter names <-> ours, as one table that is read in both directions.

A saved model has one tensor for every matrix of every expert of every layer; here equal layers and experts are
stacked, and a matrix is [in, out] where PyTorch's is [out, in]. `entries` lists, for each saved tensor, the parameter
it is a slice of, where in it, and whether it is transposed. Reading and writing are loops over that list, so they
cannot disagree.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from zigzag_jax.models.deepseek_v2 import DeepseekV2Config
from zigzag_jax.models.qwen3_moe import Qwen3MoeConfig
from zigzag_jax.models.sharding import Sharding, parameter_shardings
from zigzag_jax.models.stack import equal_groups

Path = tuple[Any, ...]  # the keys of a flat nnx.State
Config = Qwen3MoeConfig | DeepseekV2Config


class Entry(NamedTuple):
    """One tensor of a saved model."""

    name: str
    """Its name in the file."""

    path: Path
    """The parameter of ours that holds it."""

    at: tuple[int, ...]
    """Where in that parameter: () for all of it, (layer of the group,), or (layer of the group, expert)."""

    transposed: bool
    """Whether the file has the transposed matrix."""


Part = tuple[Path, str, bool]  # (ours inside a layer, theirs inside a layer, transposed)

NORMS: list[Part] = [
    (("attention_norm", "weight"), "input_layernorm", False),
    (("mlp_norm", "weight"), "post_attention_layernorm", False),
]
QWEN3_ATTENTION: list[Part] = [
    (("attention", "q", "weight"), "self_attn.q_proj", True),
    (("attention", "k", "weight"), "self_attn.k_proj", True),
    (("attention", "v", "weight"), "self_attn.v_proj", True),
    (("attention", "o", "weight"), "self_attn.o_proj", True),
    (("attention", "q_norm", "weight"), "self_attn.q_norm", False),
    (("attention", "k_norm", "weight"), "self_attn.k_norm", False),
]
DEEPSEEK_ATTENTION: list[Part] = [
    (("attention", "kv_a", "weight"), "self_attn.kv_a_proj_with_mqa", True),
    (("attention", "kv_norm", "weight"), "self_attn.kv_a_layernorm", False),
    (("attention", "kv_b", "weight"), "self_attn.kv_b_proj", True),
    (("attention", "o", "weight"), "self_attn.o_proj", True),
]
DEEPSEEK_Q: list[Part] = [(("attention", "q", "weight"), "self_attn.q_proj", True)]
DEEPSEEK_LOW_RANK_Q: list[Part] = [
    (("attention", "q_a", "weight"), "self_attn.q_a_proj", True),
    (("attention", "q_norm", "weight"), "self_attn.q_a_layernorm", False),
    (("attention", "q", "weight"), "self_attn.q_b_proj", True),
]


def _swiglu(ours: Path, theirs: str) -> list[Part]:
    return [((*ours, part, "weight"), f"{theirs}.{part}_proj", True) for part in ("gate", "up", "down")]


def _attention(config: Config) -> list[Part]:
    if isinstance(config, Qwen3MoeConfig):
        return NORMS + QWEN3_ATTENTION
    return NORMS + DEEPSEEK_ATTENTION + (DEEPSEEK_LOW_RANK_Q if config.q_lora_rank else DEEPSEEK_Q)


def _sparse(config: Config) -> tuple[Path, list[Part]]:
    """Where a layer keeps its routed experts, and its parts beside them."""
    if isinstance(config, Qwen3MoeConfig):
        return ("mlp",), [(("mlp", "route"), "mlp.gate", True)]
    shared = _swiglu(("mlp", "shared"), "mlp.shared_experts")
    return ("mlp", "routed"), [(("mlp", "routed", "route"), "mlp.gate", True), *shared]


def entries(config: Config) -> Iterator[Entry]:
    """Every tensor of a saved model."""
    yield Entry("model.embed_tokens.weight", ("embedding", "table"), (), False)
    yield Entry("model.norm.weight", ("norm", "weight"), (), False)
    if not config.tie_word_embeddings:
        yield Entry("lm_head.weight", ("head", "weight"), (), True)
    experts, beside = _sparse(config)
    layer = 0
    for group, (sparse, length) in enumerate(equal_groups(config.sparse_layers)):
        for i in range(length):
            prefix = f"model.layers.{layer}"
            for path, theirs, transposed in _attention(config) + (beside if sparse else _swiglu(("mlp",), "mlp")):
                yield Entry(f"{prefix}.{theirs}.weight", ("groups", group, *path), (i,), transposed)
            for e in range(config.expert_count if sparse else 0):
                for part in ("gate", "up", "down"):
                    name = f"{prefix}.mlp.experts.{e}.{part}_proj.weight"
                    yield Entry(name, ("groups", group, *experts, part), (i, e), True)
            layer += 1


def to_hf(state: nnx.State, config: Config) -> dict[str, np.ndarray]:
    """The tensors of a saved model from a state of ours (parameters, or their gradients), on the host."""
    ours = {path: np.asarray(variable.get_value()) for path, variable in nnx.to_flat_state(state)}
    found = {}
    for entry in entries(config):
        value = ours[entry.path][entry.at]
        found[entry.name] = value.T if entry.transposed else value
    return found


def from_hf(tensors: Mapping[str, Any], config: Config, shapes: nnx.State, sharding: Sharding) -> nnx.State:
    """A state like `shapes` (see `abstract_state`) on the mesh, from the tensors of a saved model.

    ValueError for a tensor that is missing, that has another shape, or that nothing here takes.
    """
    flat = nnx.to_flat_state(shapes)
    ours: dict[Path, np.ndarray] = {path: np.empty(v.get_value().shape, np.float32) for path, v in flat}
    left = set(tensors)
    for entry in entries(config):
        if entry.name not in tensors:
            raise ValueError(f"a saved model must hold {entry.name}")
        value = np.asarray(tensors[entry.name]).astype(np.float32)
        value = value.T if entry.transposed else value
        if value.shape != (wanted := ours[entry.path][entry.at].shape):
            raise ValueError(f"{entry.name} must have the shape {wanted} of the config, got {value.shape}")
        ours[entry.path][entry.at] = value
        left.discard(entry.name)
    if left:
        raise ValueError(f"a saved model must hold nothing else than its config says, got {sorted(left)[:3]}")
    return _place(ours, shapes, sharding)


def _place(values: Mapping[Path, np.ndarray], shapes: nnx.State, sharding: Sharding) -> nnx.State:
    """Host arrays -> the devices that keep them."""
    where = dict(nnx.to_flat_state(parameter_shardings(shapes, sharding)))
    placed = [
        (path, variable.replace(_put(values[path], where[path].get_value())))
        for path, variable in nnx.to_flat_state(shapes)
    ]
    return nnx.from_flat_state(placed)


def _put(value: np.ndarray, where: Any) -> jax.Array:
    pieces: Callable = value.__getitem__  # each process makes only the pieces of its own devices
    return jax.make_array_from_callback(value.shape, where, pieces)
