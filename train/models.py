"""From --model to a model: a named one, or the sizes of a Hugging Face folder."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from zigzag_jax.models.decoder import Decoder
from zigzag_jax.models.options import KernelOptions
from zigzag_jax.models.presets import PRESETS
from zigzag_jax.models.registry import ModelConfig, model_of, read_config
from zigzag_jax.models.sharding import Sharding
from zigzag_jax.train.config import Config
from zigzag_jax.train.errors import UserError


def model_config(config: Config) -> ModelConfig:
    """The sizes that --model names. UserError where it names nothing that can be built."""
    name, folder = config.model, Path(config.model)
    if name in PRESETS:
        return PRESETS[name]
    if not folder.is_dir():
        raise UserError("model", f"must be one of {', '.join(PRESETS)} or a folder with a config.json", name)
    if not config.random_init:
        raise UserError("model", "must be given with --random-init: a folder's weights are not read yet", name)
    try:
        return read_config(folder)
    except (OSError, ValueError, NotImplementedError) as error:
        raise UserError("model", f"must hold a config.json that can be computed ({error})", name) from None


def fit_vocabulary(sizes: ModelConfig, name: str, vocab_size: int) -> ModelConfig:
    """The named tiny models take the tokenizer's vocabulary; all others must have room for it."""
    if name in PRESETS and name.startswith("tiny-"):
        return dataclasses.replace(sizes, vocab_size=vocab_size)
    if vocab_size > sizes.vocab_size:
        raise UserError("tokenizer", f"must have at most the model's {sizes.vocab_size} tokens", vocab_size)
    return sizes


def maker(config: Config, sizes: ModelConfig, sharding: Sharding) -> Callable[[nnx.Rngs], Decoder]:
    """What builds the model from random keys."""
    options = KernelOptions(strategy=config.strategy)
    return lambda rngs: model_of(sizes)(
        sizes, sharding, rngs=rngs, dtype=jnp.dtype(config.dtype), remat=config.remat, options=options
    )
