"""Bfloat16 beside `transformers` itself, where it is installed: no further from float32 than torch is.

`pytest -m gpu tests/models`: on a GPU with its kernels, on a CPU with the plain ones. Every token goes through every
expert, so that no routing decision can flip between number formats; the heads have the sizes of the real models.
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_helpers import maker, natural, put, relative, sharding

from zigzag_jax.models.hf.convert import to_hf
from zigzag_jax.models.hf.saved import open_source, read_state
from zigzag_jax.models.registry import read_config
from zigzag_jax.models.sharding import abstract_state

HERE = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HERE, reason="no transformers"),
    pytest.mark.filterwarnings("default"),  # other people's
]
BATCH, LENGTH = 2, 256


def torch_model(name: str):
    import torch
    import transformers

    torch.manual_seed(0)
    shared = {
        "vocab_size": 512, "hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 128,
        "num_hidden_layers": 2, "num_experts_per_tok": 4, "initializer_range": 0.05,
    }  # fmt: skip
    if name == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(
            **shared, num_attention_heads=8, num_key_value_heads=2, head_dim=128, num_experts=4, norm_topk_prob=True
        )
    else:
        config = transformers.DeepseekV2Config(
            **shared, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, n_shared_experts=1,
            first_k_dense_replace=1, kv_lora_rank=128, q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64,
            v_head_dim=128, topk_method="greedy", n_group=1, topk_group=1,
        )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for p in model.parameters():  # as bfloat16 holds them, norms away from one
        p.data = (p.data + 0.05 * torch.randn_like(p)).bfloat16().float()
    return model


def torch_pass(model, ids, cotangent, dtype):
    """Logits and gradients by name, float32 on the host."""
    import torch
    from make_golden import saved_gradients

    where = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(where, dtype)
    model.zero_grad()
    logits = model(torch.tensor(ids, device=where, dtype=torch.long), use_cache=False).logits
    (logits.float() * torch.tensor(cotangent, device=where)).sum().backward()
    found = {"logits": logits, **dict(saved_gradients(model))}
    return {name: x.detach().float().cpu().numpy() for name, x in found.items()}


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v2"])
def test_bfloat16_is_no_further_from_float32_than_torch_is(name, tmp_path):
    model = torch_model(name)
    model.save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 512, (BATCH, LENGTH)).astype(np.int32)
    cotangent = rng.standard_normal((BATCH, LENGTH, 512), np.float32)
    exact = torch_pass(model, ids, cotangent, __import__("torch").float32)
    theirs = torch_pass(model, ids, cotangent, __import__("torch").bfloat16)

    source, where = open_source(tmp_path), sharding()
    config = read_config(source.config)
    graphdef, shapes = abstract_state(maker(config, where, dtype=jnp.bfloat16))
    state = read_state(source, config, shapes, where)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1))
    batch = put({"ids": ids, "positions": positions, "cotangent": cotangent}, where)

    @jax.jit
    def run(state):
        def loss(state):
            merged = nnx.merge(graphdef, state)
            logits = merged.logits(merged(batch["ids"], batch["positions"])[0])
            return jnp.sum(logits.astype(jnp.float32) * batch["cotangent"]), logits

        return jax.grad(loss, has_aux=True)(state)

    gradients, logits = run(state)
    ours = to_hf(gradients, config) | {"logits": natural(logits.astype(jnp.float32), where)}
    assert ours.keys() == exact.keys()
    errors = {x: (relative(ours[x], exact[x]), relative(theirs[x], exact[x])) for x in exact}
    worst = max(errors, key=lambda x: errors[x][0] / errors[x][1])
    mean = np.mean([own for own, _ in errors.values()]) / np.mean([other for _, other in errors.values()])
    print(f"{name}: logits {errors['logits']}, mean ratio {mean:.2f}, worst {worst} {errors[worst]}")
    assert mean < 1.1
    assert all(own < 1.5 * other for own, other in errors.values()), (worst, errors[worst])
