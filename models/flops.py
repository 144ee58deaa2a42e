"""How much arithmetic a model is: the FLOPs that model FLOPs utilisation (MFU) counts.

What is counted is what the model *means*, not what an implementation computes: multiplications and additions of the
matrix products, active experts only, the head, and of the attention's scores the half that a causal mask leaves

    forward, per token     2 * (parameters of the matrices that it meets)  +  layers * 2 * H * (D + E) * S / 2
    training               three times that: a backward takes two products for each of the forward

(PaLM, arXiv:2204.02311, appendix B, with the causal half as FlashAttention counts it). Recomputation, padding rows,
norms, softmax, the embedding's lookup and the optimiser count nothing: MFU = these FLOPs / time / what the card can do.
"""

import numpy as np

from zigzag_jax.models.deepseek_v2 import DeepseekV2Config
from zigzag_jax.models.registry import ModelConfig

H100_FLOPS = 989e12
"""Dense bfloat16 FLOPs a second of an H100 or H200 SXM by its data sheet: what MFU is measured against."""
_PEAKS = {"H100": H100_FLOPS, "H200": H100_FLOPS, "A100": 312e12}
_SLOWER = ("PCIE", "NVL")  # cards of the same names with lower clocks; an A100 on PCIe has the same data sheet


def peak_flops(device_kind: str) -> float | None:
    """What a device can do by its data sheet, in dense bfloat16 FLOPs a second; None where this file does not know.

    >>> peak_flops("NVIDIA H100 80GB HBM3"), peak_flops("NVIDIA H100 PCIe"), peak_flops("cpu")
    (989000000000000.0, None, None)
    """
    kind = device_kind.upper()
    name = next((name for name in _PEAKS if name in kind), None)
    if name is None or (name != "A100" and any(word in kind for word in _SLOWER)):
        return None
    return _PEAKS[name]


def _attention_matrices(config: ModelConfig) -> int:
    """Parameters of one layer's attention that a token is multiplied by."""
    size, heads = config.hidden_size, config.num_attention_heads
    if isinstance(config, DeepseekV2Config):
        nope, rope, out = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        rank, narrow = config.kv_lora_rank, config.q_lora_rank
        queries = size * narrow + narrow * heads * (nope + rope) if narrow else size * heads * (nope + rope)
        return queries + size * (rank + rope) + rank * heads * (nope + out) + heads * out * size
    return 2 * size * (heads + config.num_key_value_heads) * config.head_dim


def _score_width(config: ModelConfig) -> int:
    """H (D + E): the products of one query and key pair, of its score and of its value."""
    if isinstance(config, DeepseekV2Config):
        dims = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    else:
        dims = 2 * config.head_dim
    return config.num_attention_heads * dims


def _block_matrices(config: ModelConfig, sparse: bool) -> int:
    """Parameters of one layer's feed-forward block that a token is multiplied by: router and active experts, or all."""
    size = config.hidden_size
    if not sparse:
        return 3 * size * config.intermediate_size
    shared = config.n_shared_experts if isinstance(config, DeepseekV2Config) else 0
    active = 3 * size * config.moe_intermediate_size * (config.num_experts_per_tok + shared)
    return active + size * config.expert_count


def active_parameters(config: ModelConfig) -> int:
    """Parameters that each token is multiplied by: without the embedding and the experts it is not sent to."""
    layers = sum(_attention_matrices(config) + _block_matrices(config, sparse) for sparse in config.sparse_layers)
    return layers + config.hidden_size * config.vocab_size


def forward_flops(config: ModelConfig, length: int) -> float:
    """Of one document of `length` tokens."""
    scores = config.num_hidden_layers * 2 * _score_width(config) * length / 2
    return length * (2 * active_parameters(config) + scores)


def training_flops(config: ModelConfig, length: int) -> float:
    """Of one document of `length` tokens, forward and backward."""
    return 3 * forward_flops(config, length)


def packed_training_flops(config: ModelConfig, lengths: np.ndarray) -> float:
    """Of several documents, forward and backward: their scores grow with their own lengths, not with that of a row."""
    tokens, squares = float(np.sum(lengths)), float(np.sum(np.square(lengths, dtype=np.float64)))
    return 3 * (2 * active_parameters(config) * tokens + config.num_hidden_layers * _score_width(config) * squares)
