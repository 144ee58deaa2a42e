"""DeepSeek-V2: multi-head latent attention, shared and routed experts (arXiv:2405.04434; decoder.py is the rest).

    q = q_b(norm(q_a(x))) or q(x)             per head: N values without a place, P that the rotary embedding turns
    latent, k_pe = kv_a(x)                    latent normed, k_pe turned and shared by the heads
    k, v = kv_b(latent) and k_pe              made where the ring needs them (zigzag_jax/mla.py)

The rotary embedding turns pairs (2i, 2i + 1), as `transformers` does for this model; with YaRN the softmax's scale
grows by the square of 0.1 mscale_all_dim ln(factor) + 1. The two inner norms have the fixed eps of 1e-6.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from zigzag_jax.cost import LatentSizes, choose_payload
from zigzag_jax.mla import latent_attention
from zigzag_jax.models.balance import AuxLoss
from zigzag_jax.models.config import Fields
from zigzag_jax.models.decoder import Decoder, DecoderConfig, check_sizes
from zigzag_jax.models.layers import Linear, RMSNorm, SwiGLU
from zigzag_jax.models.memory import Memory, attend
from zigzag_jax.models.moe import LayerStats, MoE
from zigzag_jax.models.options import KernelOptions
from zigzag_jax.models.rope import Rope, Rotary, Yarn, rotate_pairs, stretch
from zigzag_jax.models.router import GroupLimitedTopK
from zigzag_jax.models.sharding import Sharding, whole

INNER_EPS = 1e-6
TOPK_METHODS = ("greedy", "group_limited_greedy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepseekV2Config(DecoderConfig):
    """The sizes of a DeepSeek-V2, under Hugging Face's names."""

    kv_lora_rank: int
    """Width of the latent."""

    qk_nope_head_dim: int
    """N: values of a query or key head without a place."""

    qk_rope_head_dim: int
    """P: values of a query or key head that the rotary embedding turns; even."""

    v_head_dim: int
    """Values of a value head."""

    n_routed_experts: int
    """Experts of a sparse layer that the router chooses from."""

    n_shared_experts: int = 1
    """Experts that every token goes through, as one block of so many times the width."""

    q_lora_rank: int | None = None
    """Width of the queries' own bottleneck, or None: one projection."""

    first_k_dense_replace: int = 0
    """Layers at the start that have a dense block."""

    n_group: int = 1
    """Groups of experts, for group-limited routing."""

    topk_group: int = 1
    """Groups that a token may use; n_group = topk_group is no limit."""

    routed_scaling_factor: float = 1.0
    """Factor of the routed experts' weights."""

    rope: Rope = Rope(1e4)  # noqa: RUF009 (frozen)
    aux_loss: AuxLoss = "sequence"
    max_position_embeddings: int = 163840

    def __post_init__(self):
        check_sizes(self, may_be_zero=("first_k_dense_replace",))
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim must be even, got {self.qk_rope_head_dim}")
        if self.n_routed_experts % self.n_group:
            raise ValueError(
                f"n_group must divide n_routed_experts = {self.n_routed_experts}, got n_group = {self.n_group}"
            )
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group must be at most n_group = {self.n_group}, got topk_group = {self.topk_group}")
        if self.num_experts_per_tok > (most := self.n_routed_experts // self.n_group * self.topk_group):
            raise ValueError(f"num_experts_per_tok must be at most {most}, got {self.num_experts_per_tok}")

    @property
    def rotary_size(self) -> int:
        """Values of a head that the rotary embedding turns."""
        return self.qk_rope_head_dim

    @property
    def expert_count(self) -> int:
        """Routed experts of a sparse layer."""
        return self.n_routed_experts

    @property
    def hop_values(self) -> dict[str, int]:
        """Values a token that travel round the ring in a layer's forward, for each payload of zigzag_jax/mla.py."""
        return self._latent_sizes.payloads

    def travels(self, cp, rows, length, itemsize, strategy="ring"):
        """What the cost rule chooses, as latent_attention does."""
        return choose_payload(cp, rows, length, self._latent_sizes, itemsize, strategy=strategy)

    @property
    def _latent_sizes(self) -> LatentSizes:
        dim, rope = self.qk_nope_head_dim + self.qk_rope_head_dim, self.qk_rope_head_dim
        return LatentSizes(self.kv_lora_rank, rope, self.num_attention_heads, dim, self.v_head_dim)

    @property
    def sparse_layers(self) -> list[bool]:
        """For each layer, whether it has experts."""
        return [i >= self.first_k_dense_replace for i in range(self.num_hidden_layers)]

    @property
    def softmax_scale(self) -> float:
        """What multiplies q.k."""
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        scaling = self.rope.scaling
        if isinstance(scaling, Yarn) and scaling.mscale_all_dim:
            scale *= stretch(scaling.factor, scaling.mscale_all_dim) ** 2
        return scale

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | os.PathLike) -> "DeepseekV2Config":
        """Read a config.json (its fields, its path, or its folder); what this code does not compute raises."""
        fields = Fields(source)
        fields.refuse_unless("model_type", ("deepseek_v2",))
        fields.refuse_unless("hidden_act", ("silu",))
        fields.refuse_unless("attention_bias", (False,))
        fields.refuse_unless("mlp_bias", (False,))
        fields.refuse_unless("attention_dropout", (0,))
        fields.refuse_unless("scoring_func", ("softmax",))
        fields.refuse_unless("moe_layer_freq", (1,))
        fields.refuse_unless("topk_method", TOPK_METHODS)
        # never read by transformers
        for ignored in ("norm_topk_prob", "pretraining_tp", "auto_map", "ep_size"):
            fields.take(ignored, default=None)
        heads, nope, rope = (fields.take(n) for n in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim"))
        fields.refuse_unless("num_key_value_heads", (heads,))
        fields.refuse_unless("head_dim", (rope,))
        fields.refuse_unless("qk_head_dim", (nope + rope,))
        grouped = fields.take("topk_method", default="greedy") == "group_limited_greedy"
        groups, top_groups = (fields.take(n, default=1) for n in ("n_group", "topk_group"))
        config = cls(
            vocab_size=fields.take("vocab_size"),
            hidden_size=fields.take("hidden_size"),
            num_hidden_layers=fields.take("num_hidden_layers"),
            num_attention_heads=heads,
            kv_lora_rank=fields.take("kv_lora_rank"),
            qk_nope_head_dim=nope,
            qk_rope_head_dim=rope,
            v_head_dim=fields.take("v_head_dim"),
            n_routed_experts=fields.take("n_routed_experts", "num_local_experts", "num_experts"),
            num_experts_per_tok=fields.take("num_experts_per_tok"),
            moe_intermediate_size=fields.take("moe_intermediate_size"),
            intermediate_size=fields.take("intermediate_size"),
            n_shared_experts=fields.take("n_shared_experts"),
            q_lora_rank=fields.take("q_lora_rank", default=None),
            first_k_dense_replace=fields.take("first_k_dense_replace", default=0),
            n_group=groups if grouped else 1,
            topk_group=top_groups if grouped else 1,
            routed_scaling_factor=float(fields.take("routed_scaling_factor", default=1.0)),
            rope=fields.rope(),
            rms_norm_eps=fields.take("rms_norm_eps", default=1e-6),
            initializer_range=fields.take("initializer_range", default=0.02),
            tie_word_embeddings=fields.take("tie_word_embeddings", default=False),
            router_aux_loss_coef=fields.take("router_aux_loss_coef", "aux_loss_alpha", default=0.001),
            aux_loss="sequence" if fields.take("seq_aux", default=True) else "batch",
            max_position_embeddings=fields.take("max_position_embeddings", default=2048),
            dtype=fields.take("dtype", "torch_dtype", default="float32"),
        )
        fields.finish()
        return config

    @property
    def aux_coefficient(self) -> float:
        """DeepSeek's loss is 1 for an even load, where those of balance.py are k."""
        return self.router_aux_loss_coef / self.num_experts_per_tok

    def to_hf(self) -> dict[str, Any]:
        """See DecoderConfig."""
        kind = {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "scoring_func": "softmax"}
        grouped = {"topk_method": TOPK_METHODS[self.n_group > 1], "num_key_value_heads": self.num_attention_heads}
        rest = {"norm_topk_prob": False, "moe_layer_freq": 1, "seq_aux": self.aux_loss == "sequence"}
        return kind | super().to_hf() | grouped | rest


class Attention(nnx.Module):
    """Multi-head latent attention."""

    def __init__(self, config: DeepseekV2Config, sharding: Sharding, options: KernelOptions, *, rngs: nnx.Rngs):
        c, std, size = config, config.initializer_range, config.hidden_size
        self.config, self.sharding, self.options = config, sharding, options
        width = c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
        if c.q_lora_rank:
            self.q_a = Linear((size, c.q_lora_rank), ("embed", "latent"), std=std, rngs=rngs)
            self.q_norm = RMSNorm(c.q_lora_rank, INNER_EPS)
            self.q = Linear((c.q_lora_rank, width), ("latent", "heads"), std=std, rngs=rngs)
        else:
            self.q_a, self.q_norm = None, None
            self.q = Linear((size, width), ("embed", "heads"), std=std, rngs=rngs)
        latent = c.kv_lora_rank + c.qk_rope_head_dim
        self.kv_a = Linear((size, latent), ("embed", "latent"), std=std, rngs=rngs)
        self.kv_norm = RMSNorm(c.kv_lora_rank, INNER_EPS)
        made = c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)
        self.kv_b = Linear((c.kv_lora_rank, made), ("latent", "heads"), std=std, rngs=rngs)
        self.o = Linear((c.num_attention_heads * c.v_head_dim, size), ("heads", "embed"), std=std, rngs=rngs)

    def __call__(self, x: jax.Array, positions: jax.Array, turn: Rotary) -> jax.Array:
        c = self.config
        q, (latent, k_pe) = self._queries(x, turn), self._latent(x, turn)
        y = latent_attention(
            q,
            latent,
            k_pe,
            self._kv_b(x.dtype),
            positions=positions,
            scale=c.softmax_scale,
            mesh=self.sharding.mesh,
            spec=self.sharding.spec(("batch", "sequence", "heads", "head_dim"), q.shape),
            payload=self.options.payload,
            strategy=self.options.strategy,
            implementation=self.options.implementation,
            deterministic=self.options.deterministic,
            grad_dtype=self.options.grad_dtype,
        )
        return self.o(y.reshape(*x.shape[:2], -1))

    def keep(self, x: jax.Array, turn: Rotary) -> tuple[jax.Array]:
        """The latent and the rotary key side by side, as one head [B, S, 1, R + P]."""
        kept = jnp.concatenate(self._latent(x, turn), axis=-1)[:, :, None]
        return (self.sharding.constrain(kept, "batch", "sequence", "kv_heads", "head_dim"),)

    def recall(self, x: jax.Array, turn: Rotary, kept: list[tuple[Any, jax.Array]]) -> jax.Array:
        """See Decoder._attention. The latent is never expanded: kv_b goes to the query's side and to the output's
        (arXiv:2405.04434, section 2.1.2), which makes this attention of all heads over one key head.
        """
        c, nope = self.config, self.config.qk_nope_head_dim
        q, kv_b = self._queries(x, turn), self._kv_b(x.dtype).astype(x.dtype)
        wide = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        narrow = wide("bshn,rhn->bshr", q[..., :nope], kv_b[..., :nope]).astype(x.dtype)
        q = jnp.concatenate([narrow, q[..., nope:]], axis=-1)
        memories = [Memory(k, k[..., : c.kv_lora_rank], visible) for (k,), visible in kept]
        y = attend(q, memories, c.softmax_scale)
        y = wide("bshr,rhe->bshe", y, kv_b[..., nope:]).astype(x.dtype)
        return self.o(y.reshape(*x.shape[:2], -1))

    def _queries(self, x: jax.Array, turn: Rotary) -> jax.Array:
        nope = self.config.qk_nope_head_dim
        narrow = x if self.q_a is None or self.q_norm is None else self.q_norm(self.q_a(x))
        q = self.q(narrow).reshape(*x.shape[:2], self.config.num_attention_heads, -1)
        q = jnp.concatenate([q[..., :nope], rotate_pairs(q[..., nope:], turn)], axis=-1)
        return self.sharding.constrain(q, "batch", "sequence", "heads", "head_dim")

    def _latent(self, x: jax.Array, turn: Rotary) -> tuple[jax.Array, jax.Array]:
        """The latent [B, S, R], normed, and the rotary key [B, S, P], turned."""
        compressed, rank = self.kv_a(x), self.config.kv_lora_rank
        return self.kv_norm(compressed[..., :rank]), rotate_pairs(compressed[..., None, rank:], turn)[:, :, 0]

    def _kv_b(self, dtype: Any) -> jax.Array:
        """[R, H, N + E], float32 values of `dtype`."""
        kv_b = whole(self.sharding, ("latent", "heads"), dtype, self.kv_b.weight[...])
        return kv_b.reshape(self.config.kv_lora_rank, self.config.num_attention_heads, -1)


class SharedMoE(nnx.Module):
    """Routed experts, and a block that every token goes through."""

    def __init__(self, routed: MoE, shared: SwiGLU):
        self.routed, self.shared = routed, shared

    def __call__(self, x: jax.Array, real: jax.Array, routes: jax.Array | None) -> tuple[jax.Array, LayerStats]:
        y, stats = self.routed(x, real, routes)
        return y + self.shared(x), stats


class DeepseekV2(Decoder):
    """The whole model."""

    config: DeepseekV2Config

    def _attention(self, options, rngs):
        return Attention(self.config, self.sharding, options, rngs=rngs)

    def _mlp(self, options, sparse, rngs):
        c, std = self.config, self.config.initializer_range
        if not sparse:
            return SwiGLU(c.hidden_size, c.intermediate_size, std=std, rngs=rngs)
        router = GroupLimitedTopK(c.num_experts_per_tok, c.n_group, c.topk_group, c.routed_scaling_factor)
        sizes = (c.hidden_size, c.moe_intermediate_size, c.n_routed_experts)
        routed = MoE(*sizes, router, self.sharding, std=std, rngs=rngs, options=options, bias=self.router_bias)
        inner = c.moe_intermediate_size * c.n_shared_experts
        return SharedMoE(routed, SwiGLU(c.hidden_size, inner, std=std, rngs=rngs))
