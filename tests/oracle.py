"""The truth: dense attention, grouped matmuls and their gradients in float64 NumPy, and how far a result may be off."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# float32 arithmetic against float64, relative L2. Worst seen: 1.1e-6 (dsink, a sum over all rows); elsewhere 4.6e-7.
FLOAT32 = 3e-6


class Attention(NamedTuple):
    """What a call yields: out [B, S, H, E], lse [B, H, S], and gradients where cotangents were given."""

    out: np.ndarray
    lse: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    dsink: np.ndarray


def attention(q, k, v, visible, *, scale, dout, dlse=None, sink=None, softcap=None) -> Attention:
    """Attention of q [B, Sq, H, D] over k [B, Sk, K, D], v [B, Sk, K, E] where visible [B or 1, Sq, Sk] is true.

    The gradients are those of sum(out * dout) + sum(lse * dlse). A row that sees nothing has out 0 and lse -inf.
    """
    q, k, v, dout = (np.asarray(x, np.float64) for x in (q, k, v, dout))
    group = q.shape[2] // k.shape[2]
    keys, values = np.repeat(k, group, 2), np.repeat(v, group, 2)
    s, slope = np.einsum("bqhd,bkhd->bhqk", q, keys) * scale, 1.0
    if softcap is not None:
        s = softcap * np.tanh(s / softcap)
        slope = 1 - (s / softcap) ** 2
    s = np.where(visible[:, None], s, -np.inf)
    logit = np.full(q.shape[2], -np.inf) if sink is None else np.asarray(sink, np.float64)
    logit = logit[None, :, None, None]
    top = np.maximum(s.max(-1, keepdims=True), logit)
    top = np.where(np.isneginf(top), 0.0, top)
    p, share = np.exp(s - top), np.exp(logit - top)
    total = p.sum(-1, keepdims=True) + share
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    total = np.where(total > 0, total, 1.0)
    p, share = p / total, share / total
    out = np.einsum("bhqk,bkhe->bqhe", p, values)

    dp = np.einsum("bqhe,bkhe->bhqk", dout, values)
    delta = (dp * p).sum(-1, keepdims=True) - (0.0 if dlse is None else np.asarray(dlse, np.float64)[..., None])
    ds = p * (dp - delta) * slope * scale

    def fold(x):
        return x.reshape(*x.shape[:2], k.shape[2], group, -1).sum(3)

    return Attention(
        out=out,
        lse=lse,
        dq=np.einsum("bhqk,bkhd->bqhd", ds, keys),
        dk=fold(np.einsum("bhqk,bqhd->bkhd", ds, q)),
        dv=fold(np.einsum("bhqk,bqhe->bkhe", p, dout)),
        dsink=-(share * delta).sum((0, 2, 3)),
    )


def random_bounds(rng, batch: int, rows: int, keys: int) -> tuple[np.ndarray, np.ndarray]:
    """Key ranges (start, stop) int32 [batch, rows]: monotone, other in every batch row, some start after their stop."""
    start, stop = (np.sort(rng.integers(0, keys + 1, (batch, rows)), axis=1).astype(np.int32) for _ in range(2))
    return start, stop


def seen(start, stop, length: int) -> np.ndarray:
    """Dense mask [B or 1, Sq, Sk] of key ranges."""
    at = np.arange(length)
    return (at >= np.asarray(start)[..., None]) & (at < np.asarray(stop)[..., None])


def causal(length: int, positions=None, window: int | None = None) -> np.ndarray:
    """Dense mask [B or 1, S, S], natural order: token i sees token j of its document, i - window < j <= i."""
    i = np.arange(length)
    first = np.zeros((1, length), int) if positions is None else i - np.asarray(positions)
    if window is not None:
        first = np.maximum(first, i - window + 1)
    return (i[None, None, :] <= i[None, :, None]) & (i[None, None, :] >= first[:, :, None])


def random_documents(rng, batch: int, length: int, cuts: int) -> np.ndarray:
    """Positions int32 [batch, length], natural order, of rows packed with up to `cuts` + 1 documents each."""
    start = np.zeros((batch, length), np.int32)
    for row in start:
        for cut in np.sort(rng.choice(np.arange(1, length), min(cuts, length - 1), replace=False)):
            row[cut:] = cut
    return (np.arange(length) - start).astype(np.int32)


def groups(sizes) -> list[tuple[int, slice]]:
    """(group, its slice of the rows) for each group."""
    ends = np.cumsum(sizes)
    return [(g, slice(end - size, end)) for g, (end, size) in enumerate(zip(ends, sizes, strict=True))]


def grouped(x, w, sizes, dy) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y, dx, dw of the grouped matmul."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros_like(x), np.zeros_like(w)
    for g, rows in groups(sizes):
        y[rows], dx[rows], dw[g] = x[rows] @ w[g], dy[rows] @ w[g].T, x[rows].T @ dy[rows]
    return y, dx, dw


def grouped_swiglu(x, gate_up, down, scale, sizes, dy) -> tuple[np.ndarray, ...]:
    """y, dx, dgate_up, ddown, dscale of down(scale * silu(x gate) * (x up)), group by group."""
    x, gate_up, down, dy = (np.asarray(a, np.float64) for a in (x, gate_up, down, dy))
    scale = np.asarray(scale, np.float64)[:, None]
    gate, up = np.split(grouped(x, gate_up, sizes, np.zeros((len(x), gate_up.shape[2])))[0], 2, axis=1)
    sigmoid = 1 / (1 + np.exp(-gate))
    silu = gate * sigmoid
    y, z, ddown = grouped(scale * silu * up, down, sizes, dy)
    slope = sigmoid + silu * (1 - sigmoid)
    dhidden = np.concatenate([scale * z * up * slope, scale * z * silu], axis=1)
    _, dx, dgate_up = grouped(x, gate_up, sizes, dhidden)
    return y, dx, dgate_up, ddown, np.sum(z * silu * up, axis=1)


@dataclass(frozen=True)
class Heads:
    """Sizes of a call, and the name they have in a test's id."""

    heads: int
    kv_heads: int
    dim: int
    out_dim: int

    def __str__(self) -> str:
        kind = "mha" if self.heads == self.kv_heads else "mqa" if self.kv_heads == 1 else "gqa"
        return f"{kind}-D{self.dim}-E{self.out_dim}"

    def draw(self, rng, batch: int, rows: int, keys: int | None = None):
        """Random q, k, v and dout, float64."""
        keys = rows if keys is None else keys
        sizes = (rows, self.heads, self.dim), (keys, self.kv_heads, self.dim), (keys, self.kv_heads, self.out_dim)
        return tuple(rng.standard_normal((batch, *s)) for s in (*sizes, (rows, self.heads, self.out_dim)))


def relative(got, want, floor: float = 0.0) -> float:
    """|got - want| / max(|want|, floor), L2 in float64; entries that are -inf in both count as equal."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
    nothing = np.isneginf(want)
    assert np.array_equal(np.isneginf(got), nothing), "-inf in other places"
    difference = np.where(nothing, 0.0, got) - np.where(nothing, 0.0, want)
    return float(np.linalg.norm(difference) / max(np.linalg.norm(np.where(nothing, 0.0, want)), floor, 1e-30))


def check(name: str, got, want, tolerance: float = FLOAT32, floor: float = 0.0) -> None:
    """Assert relative L2 <= tolerance, and a cosine that an error of this size at most can leave.

    `floor` is the size below which a result counts as zero: a document of one token has dq = dk = 0.
    """
    error = relative(got, want, floor)
    assert error <= tolerance, f"{name}: relative L2 {error:.2e}, allowed {tolerance:.0e}"
    got, want = (np.where(np.isneginf(x), 0.0, x).ravel() for x in (np.asarray(y, np.float64) for y in (got, want)))
    size = np.linalg.norm(got) * np.linalg.norm(want)
    if np.linalg.norm(want) > floor and size > 0:
        lost = 1 - got @ want / size
        assert lost <= tolerance**2 + 1e-12, f"{name}: cosine 1 - {lost:.2e}"


def check_all(got, want: Attention, tolerance: float = FLOAT32, size: float | None = None) -> None:
    """Check for out, lse, dq, dk, dv (and dsink where `got` has six); gradients are never held to less than `size`."""
    for name, g, w in zip(want._fields, got, want, strict=False):
        # gradients that cancel to nearly nothing are compared with a twentieth of the cotangent's size
        check(name, g, w, tolerance, floor=0.05 * size if size is not None and name.startswith("d") else 0.0)
