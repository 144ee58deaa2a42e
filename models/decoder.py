"""The transformer that all models here are: pre-norm layers of attention and feed-forward, for sequences cut over `cp`.

    h = embedding(tokens)          [B, S, d], the sequence in zigzag order
    h = h + attention(norm(h))     every layer,
    h = h + mlp(norm(h))           a mixture of experts or, in some layers, a dense block
    hidden = norm(h)               the head is separate: [B, S, vocab] is never made in training

Only attention mixes tokens, and it is the ring's; everything else is the same function of each token, so it does not
know in which order the tokens lie. What a token needs to know about its place travels beside it: `positions`, its index
inside its document, which is both the mask and (by default) the angle of the rotary embedding.

A model is a `Decoder` that says how its attention and its feed-forward blocks are made. It is built with `init_state`
(sharding.py) and used functionally: `nnx.merge(graphdef, state)(tokens, positions)`.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from zigzag_jax.models.balance import AuxLoss, RouterStats
from zigzag_jax.models.layers import Embedding, Linear, RMSNorm, linear
from zigzag_jax.models.moe import LayerStats
from zigzag_jax.models.options import KernelOptions
from zigzag_jax.models.rope import Rope, Rotary, rotary
from zigzag_jax.models.sharding import Sharding
from zigzag_jax.models.stack import check_remat, equal_groups, scan_layers, stack_layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The sizes that every model here has, under Hugging Face's names."""

    vocab_size: int
    """Rows of the embedding, and columns of the head."""

    hidden_size: int
    """Width d of the residual stream."""

    num_hidden_layers: int
    """Layers, dense and sparse together."""

    num_attention_heads: int
    """Query heads."""

    num_experts_per_tok: int
    """Experts that each token is sent to."""

    moe_intermediate_size: int
    """Inner width of one expert."""

    intermediate_size: int
    """Inner width of a dense block; no layer may need it."""

    rope: Rope
    """The rotary embedding."""

    rms_norm_eps: float = 1e-6
    """Added to the mean square in the layers' norms."""

    initializer_range: float = 0.02
    """Standard deviation of freshly drawn weights."""

    tie_word_embeddings: bool = False
    """The head is the transposed embedding."""

    router_aux_loss_coef: float = 0.001
    """Weight of the load-balancing loss as the file has it; see aux_coefficient."""

    aux_loss: AuxLoss = "hf"
    """Which load-balancing loss the model was made with, for the trainer (balance.py)."""

    max_position_embeddings: int
    """Longest document the weights were trained for; nothing is computed from it."""

    dtype: str = "float32"
    """Number format of the weights in the file this came from; what to compute in is the model's argument."""

    @property
    def rotary_size(self) -> int:
        """Values of a head that the rotary embedding turns."""
        raise NotImplementedError

    @property
    def expert_count(self) -> int:
        """Routed experts of a sparse layer."""
        raise NotImplementedError

    @property
    def sparse_layers(self) -> list[bool]:
        """For each layer, whether it has experts."""
        raise NotImplementedError

    @property
    def hop_values(self) -> dict[str, int]:
        """Values a token that travel round the ring in a layer's forward, by what they are."""
        raise NotImplementedError

    def travels(
        self, cp: int, rows: int, length: int, itemsize: int, strategy: Literal["ring", "allgather"] = "ring"
    ) -> str:
        """Which of `hop_values` it is where nobody says so: on a rank of cp with `rows` of `length` tokens."""
        del cp, rows, length, itemsize, strategy
        (only,) = self.hop_values
        return only

    @property
    def aux_coefficient(self) -> float:
        """Weight of the load-balancing loss, in the scale of balance.py."""
        return self.router_aux_loss_coef

    def to_hf(self) -> dict[str, Any]:
        """The fields of a config.json that say these sizes, to the models here and to `transformers`."""
        values = dataclasses.asdict(self)
        dtype, rope, _ = (values.pop(name) for name in ("dtype", "rope", "aux_loss"))
        values |= {"torch_dtype": dtype, "rope_theta": rope["theta"], "rope_scaling": None}
        if self.rope.scaling is not None:
            given = {name: x for name, x in rope["scaling"].items() if x is not None}
            values["rope_scaling"] = {"rope_type": self.rope.scaling.kind, **given}
        return values | {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0}


def check_sizes(config: Any, may_be_zero: tuple[str, ...] = ()) -> None:
    """ValueError unless every int field of a config dataclass is a whole number of at least 1 (or 0 where named).

    Fields that may be None are checked where they are not.
    """
    for field in dataclasses.fields(config):
        value, least = getattr(config, field.name), 0 if field.name in may_be_zero else 1
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
        needed = field.type in ("int", int) or (field.type == int | None and value is not None)
        if needed and not whole:
            raise ValueError(f"{field.name} must be a whole number of at least {least}, got {value!r}")


class Layer(nnx.Module):
    """Attention, then a feed-forward block; `sparse` says whether the block also returns router statistics."""

    def __init__(self, config: DecoderConfig, sharding: Sharding, attention: nnx.Module, mlp: nnx.Module, sparse: bool):
        self.sharding, self.sparse = sharding, sparse
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = attention
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = mlp

    def __call__(
        self, x: jax.Array, positions: jax.Array, turn: Rotary, real: jax.Array, routes: jax.Array | None
    ) -> tuple[jax.Array, LayerStats | None]:
        with jax.named_scope("attention"):
            x = x + self.attention(self.attention_norm(x), positions, turn)
            x = self.sharding.constrain(x, "batch", "sequence", "embed")
        with jax.named_scope("mlp"):
            y = self.mlp_norm(x)
            y, stats = self.mlp(y, real, routes) if self.sparse else (self.mlp(y), None)
            return self.sharding.constrain(x + y, "batch", "sequence", "embed"), stats


class Decoder(nnx.Module):
    """The whole model. Its parameters are float32; `dtype` is what it computes in."""

    def __init__(
        self,
        config: Any,
        sharding: Sharding,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        remat: str = "none",
        router_bias: bool = False,
        options: KernelOptions = KernelOptions(),  # noqa: B008 (frozen)
    ):
        """`router_bias` gives every router a bias, zero at first, for `balance.move_biases`."""
        check_remat(remat)
        self.config, self.sharding, self.dtype, self.remat = config, sharding, jnp.dtype(dtype), remat
        self.router_bias = router_bias
        std = config.initializer_range
        self.embedding = Embedding(config.vocab_size, config.hidden_size, sharding, std=std, rngs=rngs)
        self.lengths = tuple(length for _, length in equal_groups(config.sparse_layers))
        self.groups = nnx.List(
            stack_layers(lambda rngs, sparse=sparse: self._layer(options, sparse, rngs), length, rngs)
            for sparse, length in equal_groups(config.sparse_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        shape, tied = (config.hidden_size, config.vocab_size), config.tie_word_embeddings
        self.head = None if tied else Linear(shape, ("embed", "vocab"), std=std, rngs=rngs)

    def _attention(self, options: KernelOptions, rngs: nnx.Rngs) -> nnx.Module:
        """Called as attention(x [B, S, d], positions, turn) -> [B, S, d].

        For decode.py also: keep(x, turn) -> a tuple of arrays [B, S, heads, size], what it needs of each token; and
        recall(x [B, 1, d], turn, [(kept, visible [B or 1, n]), ...]) -> [B, 1, d], one token that looks at them.
        """
        raise NotImplementedError

    def _mlp(self, options: KernelOptions, sparse: bool, rngs: nnx.Rngs) -> nnx.Module:
        """Called as mlp(x) -> y or, where sparse, as mlp(x, real, routes) -> (y, LayerStats)."""
        raise NotImplementedError

    def _layer(self, options: KernelOptions, sparse: bool, rngs: nnx.Rngs) -> Layer:
        attention = self._attention(options, rngs)
        return Layer(self.config, self.sharding, attention, self._mlp(options, sparse, rngs), sparse)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        *,
        real: jax.Array | None = None,
        rope_positions: jax.Array | None = None,
        routes: jax.Array | None = None,
    ) -> tuple[jax.Array, RouterStats]:
        """From tokens, positions int32 [B, S] in zigzag order to hidden [B, S, d] after the last norm, and RouterStats.

        `real` [B, S] bool is False on padding, which is computed and not counted. `rope_positions` are the numbers
        that the rotary embedding turns by, where they are not the positions inside a document. `routes` int32
        [MoE layers, B, S, k] are the experts to use (another pass's RouterStats.routes, or `balanced_routes`), in the
        order of `tokens`: the zigzag order of this cp, so that routes of another cp are to be laid out anew; without it
        the routers choose.
        """
        real = jnp.ones(tokens.shape, bool) if real is None else real.astype(bool)
        rope_positions = positions if rope_positions is None else rope_positions
        turn = rotary(rope_positions, self.config.rotary_size, self.config.rope)
        self._check_routes(tokens, routes)
        x = self.embed(tokens)
        kept, at = [], 0
        for layers, length in zip(self.groups, self.lengths, strict=True):
            sparse = layers.sparse
            own = routes[at : at + length] if sparse and routes is not None else None
            call = lambda layer, x, own: layer(x, positions, turn, real, own)
            x, stats = scan_layers(layers, length, call, x, self.remat, own)
            kept, at = ([*kept, stats], at + length) if sparse else (kept, at)
        return self.norm(x), self._stats(kept, real)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Tokens [B, S] -> the first hidden states [B, S, d]."""
        with jax.named_scope("embedding"):
            return self.sharding.constrain(self.embedding(tokens, self.dtype), "batch", "sequence", "embed")

    def _check_routes(self, tokens: jax.Array, routes: jax.Array | None) -> None:
        want = (sum(self.config.sparse_layers), *tokens.shape, self.config.num_experts_per_tok)
        if routes is not None and (routes.shape != want or not jnp.issubdtype(routes.dtype, jnp.integer)):
            raise ValueError(
                f"routes must be integers [MoE layers, B, S, k] = {want}, got {routes.shape} {routes.dtype}"
            )

    def _stats(self, kept: list[LayerStats], real: jax.Array) -> RouterStats:
        tokens = jnp.sum(real, axis=1, dtype=jnp.int32).astype(jnp.float32)
        if not kept:
            none = jnp.zeros((0, len(real), self.config.expert_count), jnp.float32)
            routes = jnp.zeros((0, *real.shape, self.config.num_experts_per_tok), jnp.int32)
            return RouterStats(none, none, tokens, routes)
        counts, probs, routes = (jnp.concatenate(parts) for parts in zip(*kept, strict=True))
        return RouterStats(counts, probs, tokens, routes)

    @property
    def head_weight(self) -> jax.Array:
        """The head [d, vocab], float32; cut like a parameter over its first dimension."""
        return self.embedding.table[...].T if self.head is None else self.head.weight[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """All logits [B, S, vocab] of hidden states, for inference and tests. A trainer takes them in chunks."""
        return linear(hidden, self.head_weight)
