"""The FLOPs that MFU counts, against sums written out and against a model's own parameters."""

import dataclasses

import jax
import pytest
from model_helpers import maker, sharding

from zigzag_jax.models.flops import active_parameters, forward_flops, training_flops
from zigzag_jax.models.presets import PRESETS
from zigzag_jax.models.sharding import abstract_state


def test_the_qwen_slice_of_the_benchmarks():
    config = dataclasses.replace(PRESETS["qwen3-30b-a3b"], num_hidden_layers=4)
    size, length = 2048, 32768
    layer = size * 40 * 128 + 32 * 128 * size + size * 128 + 8 * 3 * size * 768
    token = 4 * (2 * layer + 2 * 2 * 32 * 128 * length / 2) + 2 * size * 151936
    assert forward_flops(config, length) == token * length
    assert training_flops(config, length) == 3 * token * length


def test_known_sizes_of_the_real_models():
    """Active parameters as their authors state them: 3.3 B without the embedding's and 2.4 B (of 15.7 B)."""
    assert active_parameters(PRESETS["qwen3-30b-a3b"]) == pytest.approx(3.3e9 - 2048 * 151936, rel=0.02)
    assert active_parameters(PRESETS["deepseek-v2-lite"]) == pytest.approx(2.4e9, rel=0.04)


@pytest.mark.parametrize("name", ["tiny-qwen3-moe", "tiny-deepseek-v2"])
def test_with_every_expert_active_it_is_the_matrices_of_the_model(name):
    config = PRESETS[name]
    config = dataclasses.replace(config, num_experts_per_tok=config.expert_count)
    _, shapes = abstract_state(maker(config, sharding(1)))
    sizes = jax.tree_util.tree_leaves_with_path(shapes)
    matrices = sum(x.size for path, x in sizes if not any(n in str(path).lower() for n in ("norm", "embed", "bias")))
    assert active_parameters(config) == matrices


def test_mla_counts_its_own_widths():
    config = PRESETS["deepseek-v2-lite"]
    more = forward_flops(config, 2000) / 2000 - forward_flops(config, 1000) / 1000
    assert more == 27 * 2 * 16 * (192 + 128) * 1000 / 2
    narrow = dataclasses.replace(config, q_lora_rank=128)
    assert active_parameters(narrow) - active_parameters(config) == 27 * (128 * (2048 + 16 * 192) - 2048 * 16 * 192)
