"""From --model to a model: a named one, or a folder with its sizes, weights and tokenizer (see models/hf/saved.py)."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from zigzag_jax.models.config import read_json
from zigzag_jax.models.decoder import Decoder
from zigzag_jax.models.hf.saved import check_weights, has_weights, open_source, read_state
from zigzag_jax.models.options import KernelOptions
from zigzag_jax.models.presets import PRESETS
from zigzag_jax.models.progress import Told, silent
from zigzag_jax.models.registry import ModelConfig, model_of, read_config
from zigzag_jax.models.sharding import Sharding, init_state
from zigzag_jax.train.config import Config
from zigzag_jax.train.errors import UserError, refusal


def model_folder(config: Config) -> Path | None:
    """The folder that --model names, if it is none of the names."""
    return None if config.model in PRESETS else Path(config.model)


def model_config(config: Config) -> ModelConfig:
    """The sizes that --model names. UserError where it names nothing that can be built, or a folder whose weights are
    not those of its config.
    """
    name, folder = config.model, model_folder(config)
    if folder is None:
        return PRESETS[name]
    if not folder.is_dir():
        raise UserError("model", f"must be one of {', '.join(PRESETS)} or a folder with a config.json", name)
    try:
        sizes = read_config(folder)
    except (OSError, ValueError, NotImplementedError) as error:
        raise refusal(error, "model", f"must hold a config.json that can be computed ({error})", name) from None
    if config.random_init:
        return sizes
    if not has_weights(folder):
        raise UserError("model", "must hold model*.safetensors (or give --random-init for its sizes alone)", name)
    try:
        check_weights(open_source(folder), sizes)
    except (OSError, ValueError) as error:
        raise refusal(error, "model", f"must hold the weights of its config.json ({error})", name) from None
    return sizes


def config_json(config: Config, sizes: ModelConfig, end_of_document: int) -> dict[str, Any]:
    """The config.json to keep beside the weights: the folder's own, or one made of the sizes and the tokenizer."""
    if (folder := model_folder(config)) is not None:
        return read_json(folder)
    return sizes.to_hf() | {"eos_token_id": end_of_document, "bos_token_id": None}


def weights_digest(config: Config) -> str:
    """Where training begins, as a run remembers it: "random", or a digest of the folder's tensors.

    Their names, shapes, dtypes and first bytes: reading all of them would take minutes at every start.
    """
    folder = model_folder(config)
    if folder is None or config.random_init:
        return "random"
    digest = hashlib.sha256()
    for name, x in sorted(open_source(folder).tensors.items()):
        first = np.asarray(x[tuple(slice(2) for _ in x.shape)])
        digest.update(f"{name} {x.shape} {x.dtype}".encode() + first.tobytes())
    return digest.hexdigest()[:12]


def tokenizer_file(config: Config) -> Path | None:
    """The tokenizer.json to use: --tokenizer, or the model folder's; None trains one on the data.

    UserError for weights without a tokenizer: ids that mean something else would train in silence.
    """
    folder = model_folder(config)
    if config.tokenizer is not None or folder is None:
        return config.tokenizer
    if (own := folder / "tokenizer.json").is_file():
        return own
    if not config.random_init:
        raise UserError("tokenizer", f"must be given, {folder} holds weights and no tokenizer.json", None)
    return None


def first_parameters(
    config: Config, sizes: ModelConfig, shapes: nnx.State, sharding: Sharding, told: Told = silent
) -> nnx.State:
    """Where training begins, on the mesh: the folder's weights, or random ones from --seed.

    `told` gets the bytes of weights that are read.
    """
    folder = model_folder(config)
    if folder is None or config.random_init:
        return init_state(maker(config, sizes, sharding), sharding, jax.random.key(config.seed))[1]
    return read_state(open_source(folder), sizes, shapes, sharding, told=told)


def fit_vocabulary(sizes: ModelConfig, name: str, vocab_size: int) -> ModelConfig:
    """The named tiny models take the tokenizer's vocabulary; all others must have room for it."""
    if name in PRESETS and name.startswith("tiny-"):
        return dataclasses.replace(sizes, vocab_size=vocab_size)
    if vocab_size > sizes.vocab_size:
        raise UserError("tokenizer", f"must have at most the model's {sizes.vocab_size} tokens", vocab_size)
    return sizes


def maker(
    config: Config, sizes: ModelConfig, sharding: Sharding, implementation: str | None = None
) -> Callable[[nnx.Rngs], Decoder]:
    """What builds the model from random keys; `implementation` as in KernelOptions. UserError for a --payload that the
    model has not.
    """
    if config.payload is not None and config.payload not in sizes.hop_values:
        raise UserError("payload", "must be left out for a model whose keys are made of no latent", config.payload)
    options = KernelOptions(implementation=implementation, strategy=config.strategy, payload=config.payload)
    bias = config.router.bias_rate > 0
    return lambda rngs: model_of(sizes)(
        sizes,
        sharding,
        rngs=rngs,
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
        router_bias=bias,
        options=options,
    )
