"""How the two hard operations of a model run (attention over the ring, the experts' matmuls); never what they mean."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class KernelOptions:
    """Choices of `zigzag_attention` and `grouped_swiglu`; change them to compare, or to compile for another machine."""

    implementation: str | None = None
    """A kernel by name, for both; None takes this backend's, "hopper" a Hopper GPU's."""

    strategy: Literal["ring", "allgather"] | None = None
    """How keys reach the queries; None lets the library choose."""

    payload: Literal["latent", "expanded"] | None = None
    """What of DeepSeek's keys and values travels; None lets a cost rule choose (zigzag_jax/cost.py)."""

    exchange_rows: int | None = None
    """Rows that a device sends to each other one in a round of the experts' exchange (exchange.py); None: a quarter
    more than an even share. Fewer take less memory and more rounds."""

    fused: bool = False
    """SwiGLU inside the experts' matmuls (grouped_swiglu); without ep only."""

    deterministic: bool = False
    """Gradient sums in a fixed order, so that two runs agree bit for bit."""

    grad_dtype: str | None = None
    """Number format in which the gradients of keys and values travel: float32 (None) or bfloat16."""

    def __post_init__(self):
        if self.exchange_rows is not None and self.exchange_rows < 1:
            raise ValueError(f"exchange_rows must be None or at least 1, got {self.exchange_rows}")
