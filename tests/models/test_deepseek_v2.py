"""DeepSeek-V2's sizes, its router, and that its two ring payloads are one model. Parity: test_hf_parity.py."""

import dataclasses
import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from model_helpers import GOLDEN, drawn, jit, maker, natural, put, sharding

from zigzag_jax.mla import Payload
from zigzag_jax.models.deepseek_v2 import DeepseekV2Config
from zigzag_jax.models.options import KernelOptions
from zigzag_jax.models.presets import PRESETS
from zigzag_jax.models.registry import read_config
from zigzag_jax.models.router import GroupLimitedTopK
from zigzag_jax.models.sharding import abstract_state, parameter_shardings

NEW = json.loads((GOLDEN / "deepseek_v2_full" / "config.json").read_text())
# deepseek-ai/DeepSeek-V2-Lite/config.json
HUB = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}


def test_the_hubs_file_is_the_preset():
    assert read_config(HUB) == PRESETS["deepseek-v2-lite"]


def test_the_softmax_scale_is_that_of_the_spec():
    lite = DeepseekV2Config.from_hf(HUB)
    assert lite.softmax_scale == pytest.approx(0.11472, abs=1e-5)
    small = dataclasses.replace(lite, qk_nope_head_dim=16, qk_rope_head_dim=8)
    assert small.softmax_scale == pytest.approx(0.32448, abs=1e-5)


def test_groups_count_only_where_the_method_says_so():
    limited = DeepseekV2Config.from_hf(NEW)
    assert (limited.n_group, limited.topk_group) == (4, 2)
    greedy = DeepseekV2Config.from_hf(NEW | {"topk_method": "greedy"})
    assert (greedy.n_group, greedy.topk_group) == (1, 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"topk_method": "noaux_tc"}, NotImplementedError, "topk_method"),
        ({"scoring_func": "sigmoid"}, NotImplementedError, "scoring_func"),
        ({"attention_bias": True}, NotImplementedError, "attention_bias"),
        ({"num_key_value_heads": 2}, NotImplementedError, "num_key_value_heads"),
        ({"qk_rope_head_dim": 7, "head_dim": 7, "qk_head_dim": 19}, ValueError, "qk_rope_head_dim must be even, got 7"),
        ({"n_group": 3}, ValueError, "n_group must divide n_routed_experts = 8, got n_group = 3"),
        ({"topk_group": 5}, ValueError, "topk_group must be at most n_group = 4, got topk_group = 5"),
        ({"num_experts_per_tok": 5}, ValueError, "num_experts_per_tok must be at most 4, got 5"),
        ({"q_lora_rank": 0}, ValueError, "q_lora_rank must be a whole number of at least 1, got 0"),
        (
            {"first_k_dense_replace": -1},
            ValueError,
            "first_k_dense_replace must be a whole number of at",
        ),
        ({"kv_lora_rank": None}, ValueError, "config field kv_lora_rank is missing"),
    ],
)
def test_a_config_that_cannot_be_computed(change, error, message):
    with pytest.raises(error, match=message):
        DeepseekV2Config.from_hf(NEW | change)


def test_deepseeks_own_auxiliary_loss():
    """Its paper's is 1 for an even load, those of balance.py are k: 6 for Lite."""
    lite = read_config(HUB)
    assert (lite.aux_loss, lite.router_aux_loss_coef) == ("sequence", 0.001)
    np.testing.assert_allclose(lite.aux_coefficient, 0.001 / 6)
    assert read_config(HUB | {"seq_aux": False}).aux_loss == "batch"
    assert read_config(HUB | {"seq_aux": False}).to_hf()["seq_aux"] is False


def test_an_unknown_model_type():
    with pytest.raises(
        NotImplementedError, match="model_type must be one of qwen3, qwen3_moe, deepseek_v2, got 'llama'"
    ):
        read_config(NEW | {"model_type": "llama"})


def test_group_limited_routing_by_the_definition():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((50, 12)), jnp.float32)
    routes = GroupLimitedTopK(top_k=3, groups=4, top_groups=2, scaling=2.5)(logits)
    probs = np.asarray(jax.nn.softmax(logits))
    for token in range(50):
        best = np.argsort(-probs[token].reshape(4, 3).max(1))[:2]
        allowed = [e for g in best for e in range(3 * g, 3 * g + 3)]
        want = sorted(allowed, key=lambda e: -probs[token, e])[:3]
        assert routes.experts[token].tolist() == want
        np.testing.assert_allclose(routes.weights[token], 2.5 * probs[token, want], rtol=1e-6)
    np.testing.assert_allclose(routes.probs, probs, rtol=1e-6)  # of all experts: what the auxiliary loss needs


@functools.cache
def gradient(cp: int, payload: Payload) -> SimpleNamespace:
    """Hidden states and gradients of one layer on a ring, compiled once for all batches."""
    config = dataclasses.replace(read_config(GOLDEN / "deepseek_v2_full"), num_hidden_layers=1)
    where = sharding(cp=cp)
    graphdef, shapes = abstract_state(maker(config, where, options=KernelOptions(payload=payload)))
    state = jax.tree.map(jax.device_put, drawn(config), parameter_shardings(shapes, where))

    def loss(state, batch):
        hidden, _ = nnx.merge(graphdef, state)(batch["tokens"], batch["positions"])
        return jnp.vdot(hidden, batch["cotangent"]), hidden

    run = jit(jax.grad(loss, has_aux=True))

    def of(batch: dict[str, np.ndarray]):
        gradients, hidden = run(state, put(batch, where))
        return natural(hidden, where), nnx.to_flat_state(gradients)

    return SimpleNamespace(config=config, of=of)


@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "packed"])
def test_latent_and_expanded_and_any_cp_are_one_model(packed):
    one = gradient(1, "expanded")
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, one.config.vocab_size, (2, 32)).astype(np.int32)
    positions = oracle.random_documents(rng, 2, 32, 3) if packed else np.tile(np.arange(32, dtype=np.int32), (2, 1))
    cotangent = rng.standard_normal((2, 32, one.config.hidden_size)).astype(np.float32)
    batch = {"tokens": tokens, "positions": positions, "cotangent": cotangent}
    want_hidden, want = one.of(batch)
    payloads: tuple[Payload, ...] = ("latent", "expanded")
    for payload in payloads:
        hidden, gradients = gradient(4, payload).of(batch)
        oracle.check("hidden", hidden, np.asarray(want_hidden, np.float64), 1e-5)
        for (path, got), (_, expected) in zip(gradients, want, strict=True):
            oracle.check(str(path), got.get_value(), np.asarray(expected.get_value(), np.float64), 2e-5)
