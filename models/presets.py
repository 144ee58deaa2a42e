"""Models by name: one that trains on a laptop's CPU, and the real one."""

import dataclasses

from zigzag_jax.models.qwen3_moe import Qwen3MoeConfig
from zigzag_jax.models.rope import Rope

PRESETS: dict[str, Qwen3MoeConfig] = {
    "tiny-qwen3-moe": Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=96,
        intermediate_size=256,
        norm_topk_prob=True,
        rope=Rope(1e4),
    ),
    "qwen3-30b-a3b": Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        intermediate_size=6144,
        norm_topk_prob=True,
        rope=Rope(1e6),
        max_position_embeddings=40960,
        dtype="bfloat16",
    ),
}


def preset(name: str, vocab_size: int | None = None) -> Qwen3MoeConfig:
    """The configuration called `name`, with the vocabulary of a tokenizer if one is given.

    >>> preset("tiny-qwen3-moe", vocab_size=512).vocab_size
    512
    """
    if name not in PRESETS:
        raise ValueError(f"model must be one of {', '.join(PRESETS)}, got {name!r}")
    config = PRESETS[name]
    return config if vocab_size is None else dataclasses.replace(config, vocab_size=vocab_size)
