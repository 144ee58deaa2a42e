"""Make tests/models/golden/ with `transformers`: tiny random models, their logits, gradients and auxiliary loss.

    python3.11 -m venv /tmp/hfenv && /tmp/hfenv/bin/pip install torch==2.13.0 transformers==5.24.0 safetensors
    /tmp/hfenv/bin/python tests/models/make_golden.py

Each folder holds a model as the hub would (config.json, model.safetensors) and golden files: input_ids, logits,
cotangent, grad.NAME of sum(logits * cotangent), and positions when several documents share a row. Float32 throughout.
The weights are drawn wider than a real model's, and the norms away from one, so that attention, routing and norms all
matter.
"""

import json
import pathlib

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DeepseekV2Config, Qwen3Config, Qwen3MoeConfig

GOLDEN = pathlib.Path(__file__).parent / "golden"
BATCH, LENGTH = 2, 48
STARTS = [[0, 17, 18], [0, 30, 41]]  # of the packed documents in each row
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "moe_intermediate_size": 24,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
DEEPSEEK = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "topk_method": "greedy",
    "max_position_embeddings": 4096,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.707,
        "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096,
    },
}  # fmt: skip
PACKED = ("qwen3_moe_mixed", "deepseek_v2_full")
DENSE = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rope_parameters",
)
MODELS = {
    "qwen3_moe": {"num_hidden_layers": 2},
    # a dense layer between two mixtures of experts, weights that are not renormalised, one table for both ends
    "qwen3_moe_mixed": {
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
        "norm_topk_prob": False,
        "tie_word_embeddings": True,
    },
    "qwen3_moe_yarn": {
        "num_hidden_layers": 1,
        "max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 8.0,
            "original_max_position_embeddings": 32,
        },
    },
    "qwen3_moe_linear": {
        "num_hidden_layers": 1,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    },
    # as Lite, and as the full model: queries through a bottleneck, experts in groups, weights scaled
    "deepseek_v2_lite": {},
    "deepseek_v2_full": {
        "first_k_dense_replace": 0,
        "q_lora_rank": 20,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
    },
    "qwen3": {"num_hidden_layers": 1},
}


def make_config(name, changes):
    if name.startswith("deepseek"):
        return DeepseekV2Config(**DEEPSEEK | changes)
    if name.startswith("qwen3_moe"):
        return Qwen3MoeConfig(**SIZES | changes)
    return Qwen3Config(vocab_size=96, **{key: SIZES[key] for key in DENSE} | changes)


def saved_gradients(model):
    """(name as in a saved file, gradient): in memory the experts of a layer are fused, in a file they are not."""
    for name, p in model.named_parameters():
        stem, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for e, grad in enumerate(p.grad):
                for part, half in zip(("gate_proj", "up_proj"), grad.chunk(2), strict=True):
                    yield f"{stem}.{e}.{part}.weight", half
        elif last == "down_proj":
            for e, grad in enumerate(p.grad):
                yield f"{stem}.{e}.down_proj.weight", grad
        else:
            yield name, p.grad


def packed_arguments():
    """Positions that restart with each document, and the mask that keeps attention inside one."""
    start = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    for row, starts in enumerate(STARTS):
        for s in starts:
            start[row, s:] = s
    place = torch.arange(LENGTH)
    positions = place[None] - start
    visible = (place[None, None] <= place[None, :, None]) & (place[None, None] >= start[:, :, None])
    mask = torch.where(visible[:, None], 0.0, torch.finfo(torch.float32).min)
    return positions, mask


def golden(model, packed):
    """One forward and backward pass as a golden file's tensors."""
    ids = torch.randint(0, model.config.vocab_size, (BATCH, LENGTH))
    extra, arguments = {}, {}
    if packed:
        positions, mask = packed_arguments()
        extra = {"positions": positions.to(torch.int32)}
        arguments = {"position_ids": positions, "attention_mask": mask}
    model.zero_grad()
    logits = model(ids, use_cache=False, **arguments).logits
    cotangent = torch.randn_like(logits)
    (logits * cotangent).sum().backward()
    gradients = {f"grad.{name}": g.contiguous() for name, g in saved_gradients(model)}
    return {"input_ids": ids.to(torch.int32), "logits": logits.detach(), "cotangent": cotangent, **extra, **gradients}


def aux_losses(model):
    """The auxiliary loss of one batch, without and with padding at the end of its rows."""
    ids = torch.randint(0, model.config.vocab_size, (BATCH, LENGTH))
    real = torch.ones_like(ids)
    real[0, 29:] = 0
    real[1, 46:] = 0
    with torch.no_grad():
        plain = model(ids, use_cache=False, output_router_logits=True).aux_loss
        padded = model(ids, attention_mask=real, use_cache=False, output_router_logits=True).aux_loss
    return {
        "input_ids": ids.to(torch.int32),
        "real": real.to(torch.int32),
        "plain": plain.reshape(1),
        "padded": padded.reshape(1),
    }


def main():
    for seed, (name, changes) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        config = make_config(name, changes)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        for p in model.parameters():
            p.data.add_(torch.randn_like(p) * 0.15)
        folder = GOLDEN / name
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        config_file = folder / "config.json"
        config_file.write_text(json.dumps(json.loads(config_file.read_text()), indent=2) + "\n")
        save_file(golden(model, packed=name in PACKED), folder / "golden.safetensors")
        if name == "qwen3_moe":
            save_file(golden(model, packed=True), folder / "packed.safetensors")
        if name.startswith("qwen3_moe"):  # transformers has no auxiliary loss for the others
            save_file(aux_losses(model), folder / "aux.safetensors")


if __name__ == "__main__":
    main()
