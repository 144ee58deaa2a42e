"""How far bfloat16 ring attention is from float64, and that more ranks do not make it worse.

    JAX_PLATFORMS=cpu python examples/error_over_cp.py

Relative L2 errors of the output and the gradients against dense float64 attention on the same (rounded) inputs. The
online softmax is carried in float32 from step to step and the gradient of k and v travels in float32, so the error is
that of rounding each result once, at any cp. The last two columns let the gradient travel in bfloat16, half the bytes:
it is rounded at every hop.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from zigzag_jax import from_zigzag, to_zigzag, zigzag_attention


class Errors(NamedTuple):
    """Relative L2 errors at one cp; the bf16 ones are with grad_dtype=bfloat16."""

    cp: int
    out: float
    dq: float
    dk: float
    dv: float
    dk_bf16: float
    dv_bf16: float


def dense(q, k, v, dout):
    """(out, dq, dk, dv) of causal attention in float64; q, dout [B, S, H, D], k, v [B, S, K, D]."""
    group, length = q.shape[2] // k.shape[2], q.shape[1]
    keys, values = np.repeat(k, group, 2), np.repeat(v, group, 2)
    s = np.einsum("bqhd,bkhd->bhqk", q, keys) * q.shape[3] ** -0.5
    s = np.where(np.tri(length, dtype=bool), s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("bqhd,bkhd->bhqk", dout, values)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * q.shape[3] ** -0.5

    def per_kv_head(x):
        return x.reshape(*x.shape[:2], k.shape[2], group, -1).sum(3)

    return (
        np.einsum("bhqk,bkhd->bqhd", p, values),
        np.einsum("bhqk,bkhd->bqhd", ds, keys),
        per_kv_head(np.einsum("bhqk,bqhd->bkhd", ds, q)),
        per_kv_head(np.einsum("bhqk,bqhd->bkhd", p, dout)),
    )


def ring(cp: int, q, k, v, dout, *, grad_dtype):
    """(out, dq, dk, dv) by the ring over the first `cp` devices; arguments and results in natural order."""
    mesh = jax.make_mesh((cp,), ("cp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:cp])

    @jax.jit
    def out_and_gradients(q, k, v, dout):
        def attend(q, k, v):
            return zigzag_attention(q, k, v, mesh=mesh, spec=PartitionSpec(None, "cp"), grad_dtype=grad_dtype)

        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(dout)

    return from_zigzag(jax.device_get(out_and_gradients(*to_zigzag((q, k, v, dout), cp))), cp)


def errors(cps, seq_len: int, heads: int = 4, kv_heads: int = 2, head_dim: int = 64) -> list[Errors]:
    """The errors at every cp of `cps`; seq_len must be divisible by 2 * cp for each."""
    rng = np.random.default_rng(0)
    arrays = [
        rng.standard_normal((1, seq_len, h, head_dim)).astype(jnp.bfloat16) for h in (heads, kv_heads, kv_heads, heads)
    ]
    truth = dense(*(np.asarray(x, np.float64) for x in arrays))

    def relative(got):
        got = [np.asarray(x, np.float64) for x in got]
        return [float(np.linalg.norm(g - t) / np.linalg.norm(t)) for g, t in zip(got, truth, strict=True)]

    rows = []
    for cp in cps:
        out, dq, dk, dv = relative(ring(cp, *arrays, grad_dtype=jnp.float32))
        *_, dk_bf16, dv_bf16 = relative(ring(cp, *arrays, grad_dtype=jnp.bfloat16))
        rows.append(Errors(cp, out, dq, dk, dv, dk_bf16, dv_bf16))
    return rows


def table(rows: list[Errors]) -> str:
    """The errors as a Markdown table."""
    names = [name.replace("_bf16", ", bf16 hops") for name in Errors._fields]
    lines = [names, ["---:"] * len(names), *([str(row.cp), *(f"{error:.2e}" for error in row[1:])] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)  # no effect on GPUs
    cps = [cp for cp in range(1, 9) if cp <= jax.device_count()]
    print(table(errors(cps, seq_len=1680)))  # 2 * lcm(1..8): every cp divides it
