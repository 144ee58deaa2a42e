"""What the tests of the models share: meshes, tiny models, packed positions, the measure of a parity check."""

import functools
import pathlib

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType

from zigzag_jax import from_zigzag, to_zigzag
from zigzag_jax.models.qwen3_moe import Qwen3MoeConfig
from zigzag_jax.models.registry import model_of
from zigzag_jax.models.sharding import Sharding, abstract_state, parameter_shardings

GOLDEN = pathlib.Path(__file__).parent / "golden"

TINY = Qwen3MoeConfig(
    vocab_size=64,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    intermediate_size=20,
    norm_topk_prob=True,
    initializer_range=0.2,
)


@functools.cache
def sharding(dp: int = 1, fsdp: int = 1, cp: int = 1) -> Sharding:
    devices = jax.devices()[: dp * fsdp * cp]
    return Sharding(
        jax.make_mesh((dp, fsdp, cp), ("dp", "fsdp", "cp"), axis_types=(AxisType.Auto,) * 3, devices=devices)
    )


def maker(config, where, **options):
    return lambda rngs: model_of(config)(config, where, rngs=rngs, **options)


# the arrays are tiny: nearly all of a test's time is LLVM, and half of that its optimisations
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def draw(make):
    """The random parameters of `make(rngs)` on one device."""
    return jit(lambda key: nnx.split(make(nnx.Rngs(key)), nnx.Param)[1])(jax.random.key(0))


@functools.cache
def drawn(config):
    """A model's random parameters, compiled once; that a mesh draws the same has a test of its own."""
    return draw(maker(config, sharding()))


def build(config, where, **options):
    """(graphdef, state) of a random model on a mesh."""
    graphdef, shapes = abstract_state(maker(config, where, **options))
    return graphdef, jax.device_put(drawn(config), parameter_shardings(shapes, where))


def put(tree, where):
    """Host arrays [B, S, ...] in natural order -> zigzag order on the mesh."""
    order = to_zigzag(tree, where.mesh.shape["cp"])
    names = ("batch", "sequence", "embed")
    return jax.tree.map(lambda x: jax.device_put(x, where.named(names[: x.ndim], x.shape)), order)


def natural(x, where):
    """The way back of `put`, on the host."""
    return from_zigzag(np.asarray(x), where.mesh.shape["cp"])


def document_positions(length: int, starts: list[list[int]]) -> np.ndarray:
    """Positions inside the documents that start at these places, a row each."""
    place = np.arange(length)
    return np.stack([place - np.max([np.where(place >= s, s, 0) for s in row], axis=0) for row in starts]).astype(
        np.int32
    )


def relative(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def flat(state) -> dict[str, np.ndarray]:
    """A state as {dotted path: array}."""
    return {".".join(map(str, path)): np.asarray(v.get_value()) for path, v in nnx.to_flat_state(state)}
