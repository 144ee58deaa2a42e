"""One attention layer on several devices, as bench_multigpu.py runs it: every layout, strategy and mask by one name."""

import concurrent.futures
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from zigzag_jax import from_zigzag, to_zigzag, zigzag_attention
from zigzag_jax.layout import Layout
from zigzag_jax.ring import Strategy


class Attention(NamedTuple):
    """One attention layer on some of the GPUs."""

    cp: int
    layout: Layout = "zigzag"
    strategy: Strategy = "ring"
    window: int | None = None
    remat: bool = False

    @property
    def mesh(self) -> Mesh:
        """The first cp devices."""
        return Mesh(np.array(jax.devices()[: self.cp]), ("cp",))

    def put(self, x, order: bool = True):
        """An array in natural order, sharded over the ring."""
        x = to_zigzag(np.asarray(x), self.cp) if order and self.layout == "zigzag" else x
        return jax.device_put(x, NamedSharding(self.mesh, P(None, "cp", *[None] * (np.ndim(x) - 2))))

    def natural(self, x) -> np.ndarray:
        """A result in natural order on the host, float32."""
        x = np.asarray(x.astype(jnp.float32))
        return from_zigzag(x, self.cp) if self.layout == "zigzag" else x

    @property
    def function(self) -> Callable:
        """(q, k, v[, positions]) -> out."""

        def attend(q, k, v, positions=None):
            return zigzag_attention(
                q, k, v, positions=positions, window=self.window, mesh=self.mesh, spec=P(None, "cp", None, None),
                layout=self.layout, strategy=self.strategy,
            )  # fmt: skip

        return jax.checkpoint(attend) if self.remat else attend

    def results(self, q, k, v, dout, positions):
        """Out and the gradients."""
        out, pull = jax.vjp(lambda *qkv: self.function(*qkv, positions), q, k, v)
        return out, *pull(dout)


def compile_all(jobs: dict[Any, tuple[Callable, tuple]]) -> dict[Any, Callable]:
    """Every function compiled for its arguments, in parallel: a compiler thread for each."""
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        compiled = {key: pool.submit(lambda f, a: jax.jit(f).lower(*a).compile(), f, a) for key, (f, a) in jobs.items()}
        return {key: job.result() for key, job in compiled.items()}
