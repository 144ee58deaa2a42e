"""What bench_attention.py and kernel_times.py run: kernels under jit, their peers, and the errors against float32."""

import contextlib
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from bench import verdict
from bench_inputs import BARS, Inputs, relative, truth

from zigzag_jax.kernels import flash_bwd, flash_fwd
from zigzag_jax.kernels.flash import cudnn
from zigzag_jax.ranges import KeyRange

jit_fwd, jit_bwd = (jax.jit(f, static_argnames=("scale", "implementation")) for f in (flash_fwd, flash_bwd))


def row_dot(dout, out):
    """Delta [B, H, S]: the row sums of dout * out."""
    return jnp.einsum("bqhe,bqhe->bhq", dout, out, preferred_element_type=jnp.float32)


@functools.partial(jax.jit, static_argnames=("scale", "name"))
def forward(q, k, v, keys, *, scale, name):
    """A call on its own: out in q's dtype, lse."""
    return flash_fwd(q, k, v, keys, scale=scale, out_dtype=q.dtype, implementation=name)


@functools.partial(jax.jit, static_argnames=("scale", "name"), donate_argnames="carry")
def carried(carry, q, k, v, keys, *, scale, name):
    """A step in the middle of a ring, in place."""
    return flash_fwd(q, k, v, keys, scale=scale, carry=carry, implementation=name)


@functools.partial(jax.jit, static_argnames=("scale", "name", "deterministic"))
def backward(q, k, v, out, lse, dout, keys, *, scale, name, deterministic=False):
    """All that a backward of attention does: delta, and gradients in q's dtype."""
    grads = flash_bwd(
        q, k, v, lse, row_dot(dout, out), dout, keys, scale=scale, deterministic=deterministic, implementation=name
    )
    return tuple(x.astype(q.dtype) for x in grads)


@functools.partial(jax.jit, static_argnames=("scale", "name"))
def ring_forward(q, ks, vs, keys, *, scale, name):
    """Every step of a rank's ring but the communication; ks, vs and keys are stacked, one a step."""
    carry, last = None, len(ks) - 1
    for at, (k, v, start, stop) in enumerate(zip(ks, vs, *keys, strict=True)):
        dtype = q.dtype if at == last else jnp.float32
        carry = flash_fwd(
            q, k, v, KeyRange(start, stop), scale=scale, carry=carry, out_dtype=dtype, implementation=name
        )
    return carry


@functools.partial(jax.jit, static_argnames=("scale", "name"))
def ring_backward(q, ks, vs, out, lse, dout, keys, *, scale, name):
    """The same backward; the gradient of k and v arrives and is added to at each step."""
    delta, dq, travels = row_dot(dout, out), None, None
    for k, v, start, stop in zip(ks, vs, *keys, strict=True):
        dq, *own = flash_bwd(
            q, k, v, lse, delta, dout, KeyRange(start, stop), scale=scale, dq=dq, implementation=name
        )  # fmt: skip
        travels = own if travels is None else [a + b for a, b in zip(travels, own, strict=True)]
    return jax.tree.map(lambda x: x.astype(q.dtype), (dq, travels))


def cudnn_calls(x: Inputs, block: cudnn.Block) -> dict[str, Callable]:
    """The kernels of cuDNN itself on the part of q, k, v that takes part."""
    static = {"scale": x.scale, "causal": block.causal, "window": block.window}
    fwd, bwd = (jax.jit(functools.partial(f, **static)) for f in (cudnn.forward, cudnn.backward))
    q, k, v, dout = x.q[:, block.rows], x.k[:, block.keys], x.v[:, block.keys], x.dout[:, block.rows]
    out, lse = fwd(q, k, v)
    return {"fwd": lambda: fwd(q, k, v), "bwd": lambda: bwd(q, k, v, out, lse, dout)}


def tokamax_calls(x: Inputs, block: cudnn.Block) -> dict[str, Callable]:
    """What tokamax takes on this device, on the same part."""
    tokamax = importlib.import_module("tokamax")
    if block.window is not None:
        raise NotImplementedError("the benchmark gives tokamax no windows")
    attend = functools.partial(tokamax.dot_product_attention, scale=x.scale, is_causal=block.causal)
    q, k, v, dout = x.q[:, block.rows], x.k[:, block.keys], x.v[:, block.keys], x.dout[:, block.rows]
    fwd, bwd = jax.jit(attend), jax.jit(lambda pullback, dout: pullback(dout))
    _, pullback = jax.vjp(fwd, q, k, v)
    return {"fwd": lambda: fwd(q, k, v), "bwd": lambda: bwd(pullback, dout)}


PEERS = {"cudnn": cudnn_calls, "tokamax": tokamax_calls}


def calls(name: str, x: Inputs, keys: KeyRange) -> dict[tuple[str, str], Callable]:
    """What there is to time of an implementation or peer, each run once: {(name, fwd, carry or bwd): call}."""
    static = {"scale": x.scale, "name": name}

    def build():
        if name in PEERS:
            return PEERS[name](x, cudnn.recognise(keys, x.k.shape[1]))
        out, lse = forward(*x[:3], keys, **static)
        state = [(jnp.zeros(out.shape, jnp.float32), jnp.full(lse.shape, -jnp.inf))]

        def carry():
            state[0] = carried(state[0], *x[:3], keys, **static)
            return state[0]

        return {
            "fwd": lambda: forward(*x[:3], keys, **static),
            "carry": carry,
            "bwd": lambda: backward(*x[:3], out, lse, x.dout, keys, **static),
        }

    return usable(name, lambda: {(name, which): call for which, call in build().items()})


@contextlib.contextmanager
def refusal(name: str, what: str):
    """Prints why `name` cannot do `what`, as it says itself; cuDNN may find out only while it runs."""
    refuses = (NotImplementedError, jax.errors.JaxRuntimeError) if name in PEERS else NotImplementedError
    try:
        yield
    except refuses as reason:
        first, *_ = str(reason).splitlines() or [type(reason).__name__]
        print(f"{name} cannot do {what}: {first}")


def usable(name: str, build: Callable[[], dict[Any, Callable]]) -> dict[Any, Callable]:
    """Those of the calls of `name` that run; the others are printed with their reason."""
    runs, calls = {}, {}
    with refusal(name, "this"):
        calls = build()
    for key, call in calls.items():
        with refusal(name, key[-1]):
            jax.block_until_ready(call())
            runs[key] = call
    return runs


def errors(name: str, x: Inputs, keys: KeyRange) -> dict[str, float]:
    """An implementation against float32 on one kv head and its query heads, at the size that is timed."""
    at = x.k.shape[2] // 2
    group = x.q.shape[2] // x.k.shape[2]
    mine = slice(at * group, (at + 1) * group)
    static = {"scale": x.scale, "implementation": name}
    ahead, back = (flash_fwd, flash_bwd) if name in PEERS else (jit_fwd, jit_bwd)  # cuDNN's adapter reads the ranges
    out, lse = ahead(*x[:3], keys, **static)
    dq, dk, dv = back(*x[:3], lse, row_dot(x.dout.astype(jnp.float32), out), x.dout, keys, **static)
    got = out[0, :, mine], lse[0, mine].T, dq[0, :, mine], dk[0, :, at], dv[0, :, at]
    want = truth(x.q[0, :, mine], x.k[0, :, at], x.v[0, :, at], x.dout[0, :, mine], keys, x.scale)
    return {key: relative(a, b) for key, a, b in zip(BARS, got, want, strict=True)}


def check(name: str, x: Inputs, ranges: Mapping[str, KeyRange], column: str) -> list[dict]:
    """A row of `errors` and their verdict for each of the ranges that `name` can do, whose titles are a column."""
    rows = []
    for title, keys in ranges.items():
        with refusal(name, title):
            found = errors(name, x, keys)
            figures = {key: f"{error:.1e}" for key, error in found.items()}
            rows.append({column: title, "by": name, **figures, "verdict": verdict(found, BARS)})
    return rows
