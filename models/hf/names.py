"""Hugging Face's parameter names <-> ours, as one table that is read in both directions.

A saved model has one tensor for every matrix of every expert of every layer; here equal layers and experts are
stacked, and a matrix is [in, out] where PyTorch's is [out, in]. `entries` lists, for each saved tensor, the parameter
it is a slice of, where in it, and whether it is transposed. Reading and writing (convert.py) are loops over that list,
so they cannot disagree.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from zigzag_jax.models.qwen3_moe import Qwen3MoeConfig
from zigzag_jax.models.registry import ModelConfig
from zigzag_jax.models.stack import equal_groups

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Path = tuple[Any, ...]  # the keys of a flat nnx.State


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


def _attention(config: ModelConfig) -> list[Part]:
    if isinstance(config, Qwen3MoeConfig):
        return NORMS + QWEN3_ATTENTION
    return NORMS + DEEPSEEK_ATTENTION + (DEEPSEEK_LOW_RANK_Q if config.q_lora_rank else DEEPSEEK_Q)


def _sparse(config: ModelConfig) -> tuple[Path, list[Part]]:
    """Where a layer keeps its routed experts, and its parts beside them."""
    if isinstance(config, Qwen3MoeConfig):
        return ("mlp",), [(("mlp", "route"), "mlp.gate", True)]
    shared = _swiglu(("mlp", "shared"), "mlp.shared_experts")
    return ("mlp", "routed"), [(("mlp", "routed", "route"), "mlp.gate", True), *shared]


def entries(config: ModelConfig) -> Iterator[Entry]:
    """Every tensor of a saved model."""
    yield Entry(EMBEDDING, ("embedding", "table"), (), False)
    yield Entry("model.norm.weight", ("norm", "weight"), (), False)
    if not config.tie_word_embeddings:
        yield Entry(HEAD, ("head", "weight"), (), True)
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
