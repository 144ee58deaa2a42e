"""Qwen3 without experts: the layers of qwen3_moe.py, every feed-forward block dense."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from zigzag_jax.models.config import Fields
from zigzag_jax.models.qwen3_moe import Qwen3MoeConfig
from zigzag_jax.models.rope import Rope

_NO_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "router_aux_loss_coef")
_NO_LAYERS = ("decoder_sparse_step", "mlp_only_layers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3Config(Qwen3MoeConfig):
    """The sizes of a Qwen3; the fields about experts mean nothing."""

    num_experts: int = 1
    num_experts_per_tok: int = 1
    moe_intermediate_size: int = 1
    rope: Rope = Rope(1e6)  # noqa: RUF009 (frozen)

    @property
    def sparse_layers(self) -> list[bool]:
        """No layer has experts."""
        return [False] * self.num_hidden_layers

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | os.PathLike) -> "Qwen3Config":
        """Read a config.json (its fields, its path, or its folder); what this code does not compute raises."""
        fields = Fields(source)
        fields.refuse_unless("model_type", ("qwen3",))
        layers = fields.take("num_hidden_layers")
        fields.refuse_unless("layer_types", (["full_attention"] * layers,))
        sizes = cls._shared(fields) | {"intermediate_size": fields.take("intermediate_size")}
        fields.finish()
        return cls(**sizes)

    def to_hf(self) -> dict[str, Any]:
        """See DecoderConfig."""
        values = {k: v for k, v in super().to_hf().items() if k not in _NO_EXPERTS + _NO_LAYERS}
        return values | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
