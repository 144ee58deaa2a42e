"""Qwen3-MoE: grouped-query attention with normed queries and keys, and mixtures of experts (decoder.py is the rest)."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from zigzag_jax import zigzag_attention
from zigzag_jax.models.config import Fields
from zigzag_jax.models.decoder import Decoder, DecoderConfig, check_sizes
from zigzag_jax.models.layers import Linear, RMSNorm, SwiGLU
from zigzag_jax.models.memory import Memory, attend
from zigzag_jax.models.moe import MoE
from zigzag_jax.models.options import KernelOptions
from zigzag_jax.models.rope import Rope, Rotary, rotate_half
from zigzag_jax.models.router import SoftmaxTopK
from zigzag_jax.models.sharding import Sharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(DecoderConfig):
    """The sizes of a Qwen3-MoE, under Hugging Face's names."""

    num_key_value_heads: int
    """Key and value heads; a divisor of the query heads."""

    head_dim: int
    """Width of a head; even (the rotary embedding turns pairs)."""

    num_experts: int
    """Experts of a sparse layer."""

    norm_topk_prob: bool = False
    """Divide the weights of the chosen experts by their sum."""

    decoder_sparse_step: int = 1
    """Layer i has experts where (i + 1) is a multiple of this, and a dense block elsewhere."""

    mlp_only_layers: tuple[int, ...] = ()
    """Layers that have a dense block all the same."""

    rope: Rope = Rope(1e6)  # noqa: RUF009 (frozen)
    max_position_embeddings: int = 32768

    def __post_init__(self):
        check_sizes(self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads = {self.num_attention_heads}, "
                f"got {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok must be at most num_experts = {self.num_experts}, got {self.num_experts_per_tok}"
            )

    @property
    def rotary_size(self) -> int:
        """Values of a head that the rotary embedding turns: all of them."""
        return self.head_dim

    @property
    def expert_count(self) -> int:
        """Experts of a sparse layer."""
        return self.num_experts

    @property
    def hop_values(self) -> dict[str, int]:
        """Values a token that travel round the ring in a layer's forward, by what they are."""
        return {"k, v": 2 * self.num_key_value_heads * self.head_dim}

    @property
    def sparse_layers(self) -> list[bool]:
        """For each layer, whether it has experts."""
        dense, step = self.mlp_only_layers, self.decoder_sparse_step
        return [i not in dense and (i + 1) % step == 0 for i in range(self.num_hidden_layers)]

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | os.PathLike) -> "Qwen3MoeConfig":
        """Read a config.json (its fields, its path, or its folder); what this code does not compute raises."""
        fields = Fields(source)
        fields.refuse_unless("model_type", ("qwen3_moe",))
        config = cls(
            **cls._shared(fields),
            num_experts=fields.take("num_experts", "num_local_experts"),
            num_experts_per_tok=fields.take("num_experts_per_tok"),
            moe_intermediate_size=fields.take("moe_intermediate_size"),
            intermediate_size=fields.take("intermediate_size"),
            norm_topk_prob=fields.take("norm_topk_prob", default=False),
            decoder_sparse_step=fields.take("decoder_sparse_step", default=1),
            mlp_only_layers=tuple(fields.take("mlp_only_layers", default=())),
            router_aux_loss_coef=fields.take("router_aux_loss_coef", default=0.001),
        )
        fields.finish()
        return config

    @staticmethod
    def _shared(fields: Fields) -> dict[str, Any]:
        """What has nothing to do with experts."""
        fields.refuse_unless("hidden_act", ("silu",))
        fields.refuse_unless("attention_bias", (False,))
        fields.refuse_unless("attention_dropout", (0,))
        fields.refuse_unless("use_sliding_window", (False,))
        fields.refuse_unless("qkv_bias", (False,))  # this and the next two: files of Qwen3-Coder
        fields.refuse_unless("use_qk_norm", (True,))
        fields.refuse_unless("shared_expert_intermediate_size", (0,))
        fields.take("sliding_window", default=None)  # means nothing without use_sliding_window
        hidden, heads = fields.take("hidden_size"), fields.take("num_attention_heads")
        return {
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "vocab_size": fields.take("vocab_size"),
            "num_hidden_layers": fields.take("num_hidden_layers"),
            "num_key_value_heads": fields.take("num_key_value_heads"),
            "head_dim": fields.take("head_dim", default=None) or _quotient(hidden, heads),
            "rope": fields.rope(),
            "rms_norm_eps": fields.take("rms_norm_eps", default=1e-6),
            "initializer_range": fields.take("initializer_range", default=0.02),
            "tie_word_embeddings": fields.take("tie_word_embeddings", default=False),
            "max_position_embeddings": fields.take("max_position_embeddings", default=32768),
            "dtype": fields.take("dtype", "torch_dtype", default="float32"),
        }

    def to_hf(self) -> dict[str, Any]:
        """See DecoderConfig."""
        kind = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "use_sliding_window": False}
        return kind | super().to_hf() | {"mlp_only_layers": list(self.mlp_only_layers)}


def _quotient(hidden: Any, heads: Any) -> Any:
    """What head_dim is where it is not given; of numbers that are none the check of the sizes speaks."""
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 else hidden


class Attention(nnx.Module):
    """Grouped-query attention; queries and keys are normed per head, then turned by the rotary embedding."""

    def __init__(self, config: Qwen3MoeConfig, sharding: Sharding, options: KernelOptions, *, rngs: nnx.Rngs):
        size, width = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.width, self.sharding, self.options = width, sharding, options
        std = config.initializer_range
        self.q = Linear((size, heads * width), ("embed", "heads"), std=std, rngs=rngs)
        self.k = Linear((size, kv_heads * width), ("embed", "kv_heads"), std=std, rngs=rngs)
        self.v = Linear((size, kv_heads * width), ("embed", "kv_heads"), std=std, rngs=rngs)
        self.o = Linear((heads * width, size), ("heads", "embed"), std=std, rngs=rngs)
        self.q_norm = RMSNorm(width, config.rms_norm_eps)
        self.k_norm = RMSNorm(width, config.rms_norm_eps)

    def __call__(self, x: jax.Array, positions: jax.Array, turn: Rotary) -> jax.Array:
        q, (k, v) = self._queries(x, turn), self.keep(x, turn)
        y = zigzag_attention(
            q,
            k,
            v,
            positions=positions,
            mesh=self.sharding.mesh,
            spec=self.sharding.spec(("batch", "sequence", "heads", "head_dim"), q.shape),
            strategy=self.options.strategy,
            implementation=self.options.implementation,
            deterministic=self.options.deterministic,
            grad_dtype=self.options.grad_dtype,
        )
        return self.o(y.reshape(*x.shape[:2], -1))

    def keep(self, x: jax.Array, turn: Rotary) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, S, K, D]."""
        k = self._heads(self.k(x), "kv_heads")
        return rotate_half(self.k_norm(k), turn), self._heads(self.v(x), "kv_heads")

    def recall(self, x: jax.Array, turn: Rotary, kept: list[tuple[Any, jax.Array]]) -> jax.Array:
        """See Decoder._attention."""
        memories = [Memory(k, v, visible) for (k, v), visible in kept]
        y = attend(self._queries(x, turn), memories, self.width**-0.5)
        return self.o(y.reshape(*x.shape[:2], -1))

    def _queries(self, x: jax.Array, turn: Rotary) -> jax.Array:
        return rotate_half(self.q_norm(self._heads(self.q(x), "heads")), turn)

    def _heads(self, y: jax.Array, name: str) -> jax.Array:
        y = y.reshape(*y.shape[:2], -1, self.width)
        return self.sharding.constrain(y, "batch", "sequence", name, "head_dim")


class Qwen3Moe(Decoder):
    """The whole model."""

    config: Qwen3MoeConfig

    def _attention(self, options, rngs):
        return Attention(self.config, self.sharding, options, rngs=rngs)

    def _mlp(self, options, sparse, rngs):
        c, std = self.config, self.config.initializer_range
        if not sparse:
            return SwiGLU(c.hidden_size, c.intermediate_size, std=std, rngs=rngs)
        router = SoftmaxTopK(c.num_experts_per_tok, c.norm_topk_prob)
        sizes = (c.hidden_size, c.moe_intermediate_size, c.num_experts)
        return MoE(*sizes, router, self.sharding, std=std, rngs=rngs, options=options, bias=self.router_bias)
