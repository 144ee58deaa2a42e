"""config.json: both spellings give one configuration, and nothing is dropped in silence."""

import dataclasses
import json

import pytest
from model_helpers import GOLDEN, TINY

from zigzag_jax.models.presets import PRESETS
from zigzag_jax.models.qwen3_moe import Qwen3MoeConfig
from zigzag_jax.models.rope import Linear, Rope, Yarn

NEW = json.loads((GOLDEN / "qwen3_moe" / "config.json").read_text())

# the file of Qwen3-30B-A3B as the hub has it: the older spelling
HUB = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_the_hubs_file_is_the_preset():
    assert Qwen3MoeConfig.from_hf(HUB) == PRESETS["qwen3-30b-a3b"]


def test_the_fields_of_qwen3_coder():
    """Files of this family on the hub say these too; they say nothing new."""
    more = {"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0}
    assert Qwen3MoeConfig.from_hf(HUB | more) == PRESETS["qwen3-30b-a3b"]
    for name, value in (("qkv_bias", True), ("use_qk_norm", False), ("shared_expert_intermediate_size", 64)):
        with pytest.raises(NotImplementedError, match=f"config field {name} is not supported with this value"):
            Qwen3MoeConfig.from_hf(HUB | {name: value})


def test_sizes_that_are_none():
    for name, value in (("hidden_size", "2048"), ("num_attention_heads", 0)):
        fields = {key: x for key, x in HUB.items() if key != "head_dim"} | {name: value}
        with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got {value!r}"):
            Qwen3MoeConfig.from_hf(fields)


def test_both_spellings():
    old = dict(NEW)
    old |= {"num_experts": old.pop("num_local_experts"), "torch_dtype": old.pop("dtype"), "rope_scaling": None}
    old["rope_theta"] = old.pop("rope_parameters")["rope_theta"]
    config = Qwen3MoeConfig.from_hf(old)
    assert config == Qwen3MoeConfig.from_hf(NEW)
    assert (config.num_experts, config.rope, config.dtype) == (8, Rope(1e6), "float32")
    assert Qwen3MoeConfig.from_hf(old | {"rope_scaling": {"type": "default"}}) == config


def test_from_a_folder_and_from_a_file():
    folder = GOLDEN / "qwen3_moe_mixed"
    config = Qwen3MoeConfig.from_hf(folder)
    assert config == Qwen3MoeConfig.from_hf(str(folder / "config.json"))
    assert config.sparse_layers == [True, False, True]
    assert config.tie_word_embeddings


def test_sparse_step():
    config = dataclasses.replace(TINY, num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=(3,))
    assert config.sparse_layers == [False, True, False, False, False, True]


def test_defaults_of_absent_fields():
    fields = {k: v for k, v in NEW.items() if k not in ("head_dim", "dtype", "norm_topk_prob", "mlp_only_layers")}
    config = Qwen3MoeConfig.from_hf(fields)
    assert (config.head_dim, config.dtype, config.norm_topk_prob, config.mlp_only_layers) == (8, "float32", False, ())


YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}


def test_scaled_rotary_embeddings_in_both_spellings():
    yarn = Rope(1e6, Yarn(4.0, 32768))
    old = {name: value for name, value in YARN.items() if name not in ("rope_type", "rope_theta")} | {"type": "yarn"}
    bare = {k: v for k, v in NEW.items() if k != "rope_parameters"}
    assert Qwen3MoeConfig.from_hf(bare | {"rope_parameters": YARN}).rope == yarn
    assert Qwen3MoeConfig.from_hf(bare | {"rope_theta": 1e6, "rope_scaling": old}).rope == yarn
    linear = {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 4.0}}
    assert Qwen3MoeConfig.from_hf(bare | linear).rope == Rope(1e6, Linear(4.0))
    derived = {"rope_type": "yarn", "rope_theta": 1e6, "original_max_position_embeddings": 1024}
    given = Qwen3MoeConfig.from_hf(bare | {"rope_parameters": derived, "max_position_embeddings": 4096})
    assert given.rope == Rope(1e6, Yarn(4.0, 1024))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"rope_parameters": YARN | {"rope_type": "llama3"}}, "rope_parameters"),
        ({"rope_parameters": YARN | {"short_factor": [1.0]}}, "rope_parameters"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}},
            "rope_parameters",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling"),
        ({"attention_bias": True}, "attention_bias"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "qwen3"}, "model_type"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_not_computed_raises(change, name):
    value = change[name]
    with pytest.raises(NotImplementedError) as error:
        Qwen3MoeConfig.from_hf(NEW | change)
    assert f"config field {name} " in str(error.value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "config field hidden_size is missing"),
        ({"rope_parameters": {"rope_type": "default"}}, "config field rope_theta is missing"),
        ({"rope_scaling": {"type": "linear"}}, "config field rope_scaling must hold factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "a rope scaling's factor must be at least 1, got 0.5"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta must be > 0, got -1.0"),
        (
            {"rope_parameters": YARN, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "config fields rope_parameters and rope_scaling must not both scale",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}, "max_position_embeddings": None},
            "config field rope_parameters must hold original_max_position_embeddings",
        ),
        ({"num_experts": 4}, "two spellings of one config field must agree"),
        ({"rope_theta": 5.0}, "must agree, got rope_theta = 5.0 and 1000000.0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number of at least 1, got 0"),
        ({"vocab_size": "96"}, "vocab_size must be a whole number of at least 1, got '96'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide num_attention_heads = 4, got 3"),
        ({"head_dim": 15}, "head_dim must be even, got 15"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok must be at most num_experts = 8, got 9"),
    ],
)
def test_a_wrong_file_raises(change, message):
    with pytest.raises(ValueError, match=r"config|must") as error:
        Qwen3MoeConfig.from_hf(NEW | change)
    assert message in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"must hold a config\.json, got"):
        Qwen3MoeConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="must be a JSON file, got"):
        Qwen3MoeConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must be a JSON object, got"):
        Qwen3MoeConfig.from_hf(tmp_path)
