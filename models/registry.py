"""Which models there are: Hugging Face's `model_type` -> sizes -> module."""

import os
from collections.abc import Mapping
from typing import Any

from zigzag_jax.models.config import read_json
from zigzag_jax.models.decoder import Decoder
from zigzag_jax.models.deepseek_v2 import DeepseekV2, DeepseekV2Config
from zigzag_jax.models.qwen3 import Qwen3Config
from zigzag_jax.models.qwen3_moe import Qwen3Moe, Qwen3MoeConfig

ModelConfig = Qwen3MoeConfig | DeepseekV2Config

CONFIGS: dict[str, type[ModelConfig]] = {
    "qwen3": Qwen3Config,
    "qwen3_moe": Qwen3MoeConfig,
    "deepseek_v2": DeepseekV2Config,
}
MODELS: dict[type, type[Decoder]] = {
    Qwen3Config: Qwen3Moe,
    Qwen3MoeConfig: Qwen3Moe,
    DeepseekV2Config: DeepseekV2,
}


def read_config(source: Mapping[str, Any] | str | os.PathLike) -> ModelConfig:
    """The sizes in a config.json (its fields, its path, or its folder); NotImplementedError for another model_type."""
    values = dict(source) if isinstance(source, Mapping) else read_json(source)
    kind = values.get("model_type")
    if kind not in CONFIGS:
        raise NotImplementedError(f"config field model_type must be one of {', '.join(CONFIGS)}, got {kind!r}")
    return CONFIGS[kind].from_hf(values)


def model_of(config: ModelConfig) -> type[Decoder]:
    """The module class of these sizes."""
    return MODELS[type(config)]
