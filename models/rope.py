"""The rotary embedding: every pair of values in a head is turned by position * frequency.

    frequency_i = theta^(-2i / D), i = 0 .. D/2 - 1        (RoFormer, Su et al. 2021)

Two pairings exist and are not interchangeable for given weights: `rotate_half` turns (x[i], x[i + D/2]), as Qwen does,
`rotate_pairs` turns (x[2i], x[2i + 1]), as DeepSeek does.

Models are stretched beyond the context they were trained for by lower frequencies:

    linear   all of them divided by `factor` (Chen et al. 2023)
    yarn     those that turn less than beta_slow times in the original context divided by `factor`, those that turn
             more than beta_fast times kept, between them a ramp; cos and sin are multiplied by an amplitude that makes
             up for the longer softmax (YaRN, Peng et al. 2023), here as `transformers` computes it

Angles depend on the tokens' positions only, never on where a token lies in the array: a permuted sequence keeps them.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

Rotary = tuple[jax.Array, jax.Array]  # cos and sin, each [B, S, D/2] float32


@dataclasses.dataclass(frozen=True)
class Linear:
    """All frequencies divided by one number."""

    kind: ClassVar[str] = "linear"

    factor: float
    """How many times longer the context gets."""


@dataclasses.dataclass(frozen=True)
class Yarn:
    """Low frequencies divided, high ones kept."""

    kind: ClassVar[str] = "yarn"

    factor: float
    """How many times longer the context gets."""

    original_max_position_embeddings: int
    """The context the model was first trained for."""

    beta_fast: float = 32
    """Frequencies that turn more often than this in the original context are kept."""

    beta_slow: float = 1
    """Those that turn less often than this are divided."""

    mscale: float | None = None
    """Growth of the amplitude with the factor; with `mscale_all_dim` the two are divided."""

    mscale_all_dim: float | None = None
    """Its counterpart; in DeepSeek-V2 it also scales the softmax."""

    attention_factor: float | None = None
    """The amplitude itself, where the file gives it."""

    truncate: bool = True
    """The ramp's ends are rounded to whole frequencies."""


@dataclasses.dataclass(frozen=True)
class Rope:
    """A model's rotary embedding."""

    theta: float
    """Base of the frequencies."""

    scaling: Linear | Yarn | None = None
    """How the frequencies are lowered."""

    def __post_init__(self):
        if not self.theta > 0:
            raise ValueError(f"rope_theta must be > 0, got {self.theta}")
        if self.scaling is not None and not self.scaling.factor >= 1:
            raise ValueError(f"a rope scaling's factor must be at least 1, got {self.scaling.factor}")

    def frequencies(self, size: int) -> np.ndarray:
        """Radians a token of the size / 2 pairs of a head, float32."""
        own = 1 / np.float32(self.theta) ** (np.arange(0, size, 2, dtype=np.float32) / np.float32(size))
        match self.scaling:
            case None:
                return own
            case Linear(factor):
                return own / np.float32(factor)
            case Yarn() as yarn:
                low, high = self._ramp(yarn, size)
                ramp = (np.arange(size // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
                divided = np.clip(ramp, 0, 1)
                return own / np.float32(yarn.factor) * divided + own * (1 - divided)

    def _ramp(self, yarn: Yarn, size: int) -> tuple[float, float]:
        """The (fractional) indices of the frequencies that turn beta_fast and beta_slow times in the old context."""

        def index(turns: float) -> float:
            return (
                size
                * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi))
                / (2 * math.log(self.theta))
            )

        low, high = index(yarn.beta_fast), index(yarn.beta_slow)
        if yarn.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        return low, high + 0.001 if high == low else high

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied by."""
        match self.scaling:
            case Yarn(attention_factor=given) if given is not None:
                return float(given)
            case Yarn(factor=factor, mscale=mscale, mscale_all_dim=all_dim) if mscale and all_dim:
                return stretch(factor, mscale) / stretch(factor, all_dim)
            case Yarn(factor=factor):
                return stretch(factor, 1.0)
        return 1.0


def stretch(factor: float, mscale: float) -> float:
    """YaRN's growth of the attention's temperature with the context: 0.1 mscale ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def rotary(positions: jax.Array, size: int, rope: Rope) -> Rotary:
    """Cos and sin of positions int32 [B, S] times the frequencies of heads of `size` values, times the amplitude."""
    angles = positions.astype(jnp.float32)[:, :, None] * rope.frequencies(size)[None, None]
    return jnp.cos(angles) * rope.amplitude, jnp.sin(angles) * rope.amplitude


def rotate_half(x: jax.Array, rotary: Rotary) -> jax.Array:
    """Turn the pairs (x[i], x[i + D/2]) of every head of x [B, S, H, D] by their angles, in float32."""
    cos, sin = (part[:, :, None] for part in rotary)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def rotate_pairs(x: jax.Array, rotary: Rotary) -> jax.Array:
    """Turn the pairs (x[2i], x[2i + 1]) of every head of x [B, S, H, D] by their angles, in float32."""
    cos, sin = (part[:, :, None] for part in rotary)
    wide = x.astype(jnp.float32)
    a, b = wide[..., 0::2], wide[..., 1::2]
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape).astype(x.dtype)
