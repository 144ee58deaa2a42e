"""Logical axes -> rules -> mesh: where every array of a model lives.

A model names the dimensions of its arrays by what they mean ("batch", "embed", "experts"). One table, `RULES`, says
which mesh axes a meaning is cut over. `Sharding.spec` joins the two for a given shape:

    activations           ("batch", "sequence", "embed")            ->  P(("dp", "fsdp"), "cp", None)
    an attention weight   ("embed", "heads")                        ->  P(("fsdp", "cp"), None)
    one into a latent     ("embed", "latent")                       ->  P(("fsdp", "cp"), None)
    one out of it         ("latent", "heads")                       ->  P(("fsdp", "cp"), None)
    the experts' weights  ("layers", "experts", "embed", "mlp")     ->  P(None, None, ("fsdp", "cp"), None)

Three things make one table enough:

- **A mesh axis is given out once, to the leftmost dimension that asks.** In an activation, "batch" and "sequence" come
  first and take fsdp and cp, so the same "embed" that is cut in a weight stays whole in an activation.
- **A parameter that does not divide stays whole.** Of the axes of a rule the longest prefix that divides the dimension
  is used (hidden 128 on cp = 3: replicated). A tiny model runs on any mesh; a big one loses nothing, its sizes divide.
- **A batch, a sequence or experts that do not divide are an error**: every device would silently do all the work.

Parameters are cut over fsdp *and* cp: the ranks of a context-parallel group hold the same weights otherwise, and the
weights are what fills the memory. The price is the usual one of FSDP: weights are gathered where they are used,
gradients are summed and cut. `gather` is both, for code inside a `shard_map`; elsewhere XLA does it from the specs.

Expert parallelism is another entry for "experts" in the rules, `expert_rules`, and then the tokens travel to the
experts (exchange.py): over cp = 2 of fsdp = 4 and cp = 2,

    the experts' weights  ("layers", "experts", "embed", "mlp")     ->  P(None, "cp", "fsdp", None)
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Rules = tuple[tuple[str, tuple[str, ...]], ...]

RULES: Rules = (
    ("batch", ("dp", "fsdp")),
    ("sequence", ("cp",)),
    ("embed", ("fsdp", "cp")),
    ("heads", ()),
    ("kv_heads", ()),
    ("head_dim", ()),
    ("latent", ("fsdp", "cp")),
    ("norm", ()),
    ("mlp", ()),
    ("experts", ()),
    ("vocab", ()),
    ("layers", ()),
)
MUST_DIVIDE = ("batch", "sequence", "experts")


def expert_axes(ep: int, fsdp: int, cp: int) -> tuple[str, ...]:
    """The mesh axes that the experts are cut over where `ep` devices share them: whole axes, cp before fsdp.

    >>> expert_axes(8, fsdp=4, cp=2), expert_axes(2, fsdp=2, cp=2), expert_axes(1, fsdp=4, cp=2)
    (('fsdp', 'cp'), ('cp',), ())
    """
    for axes, size in (((), 1), (("cp",), cp), (("fsdp",), fsdp), (("fsdp", "cp"), fsdp * cp)):
        if ep == size:
            return axes
    raise ValueError(f"ep {expert_rule(fsdp, cp)}, got {ep}")


def expert_rule(fsdp: int, cp: int) -> str:
    """What ep must be on a mesh of these sizes."""
    return f"must be 1, cp, fsdp or fsdp * cp = 1, {cp}, {fsdp} or {fsdp * cp}"


def expert_rules(axes: tuple[str, ...]) -> Rules:
    """RULES with the experts cut over these mesh axes, fsdp and cp among them."""
    return tuple((name, axes if name == "experts" else own) for name, own in RULES)


@dataclasses.dataclass(frozen=True)
class Sharding:
    """A mesh and the rules that put logical axes on it. Hashable: it may be a static part of a jitted function."""

    mesh: Mesh
    """Axes among ("dp", "fsdp", "cp"), all of type Auto; an axis that is missing counts as one device."""

    rules: Rules = RULES
    """(logical axis, mesh axes it is cut over), one entry for every logical axis."""

    def __post_init__(self):
        if not all(t == AxisType.Auto for t in self.mesh.axis_types):
            raise ValueError(
                f"a model's mesh must have Auto axes, got {self.mesh.axis_types}: jax.make_mesh(axis_types=)"
            )

    def spec(self, names: tuple[str, ...], shape: tuple[int, ...]) -> P:
        """The PartitionSpec of an array whose dimensions mean `names`."""
        if len(names) != len(shape):
            raise ValueError(f"one logical axis for every dimension, got {names} for the shape {shape}")
        rules, taken, entries = dict(self.rules), set(), []
        for name, size in zip(names, shape, strict=True):
            wanted = [axis for axis in rules[name] if axis in self.mesh.shape and axis not in taken]
            axes = _dividing(wanted, size, self.mesh)
            if name in MUST_DIVIDE and len(axes) < len(wanted):
                parts = math.prod(self.mesh.shape[axis] for axis in wanted)
                raise ValueError(f"the {name} must be divisible by {' * '.join(wanted)} = {parts}, got {size}")
            taken.update(axes)
            entries.append(axes if len(axes) > 1 else axes[0] if axes else None)
        return P(*entries)

    @property
    def expert_axes(self) -> tuple[str, ...]:
        """The mesh axes of more than one device that the experts are cut over."""
        return tuple(axis for axis in dict(self.rules)["experts"] if self.mesh.shape.get(axis, 1) > 1)

    def named(self, names: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
        """`spec` on this mesh."""
        return NamedSharding(self.mesh, self.spec(names, shape))

    def constrain(self, x: jax.Array, *names: str) -> jax.Array:
        """Hold an intermediate array where its logical axes belong (XLA would guess otherwise)."""
        return lax.with_sharding_constraint(x, self.named(names, x.shape))


def _dividing(axes: list[str], size: int, mesh: Mesh) -> tuple[str, ...]:
    """The longest prefix of the mesh axes whose sizes together divide `size`."""
    for n in range(len(axes), 0, -1):
        if size % math.prod(mesh.shape[axis] for axis in axes[:n]) == 0:
            return tuple(axes[:n])
    return ()


def spec_axes(spec: P) -> tuple[str, ...]:
    """All mesh axes that a spec cuts over."""
    return tuple(
        axis for entry in spec if entry is not None for axis in ((entry,) if isinstance(entry, str) else entry)
    )


def gather(w: jax.Array, spec: P, dtype: Any) -> jax.Array:
    """Inside shard_map: this device's piece of a parameter -> the whole parameter, in `dtype`.

    The piece is cast before it travels (half the bytes in bfloat16); its gradient is summed over the devices in
    float32.
    """
    return _gather(spec, jnp.dtype(dtype), w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(spec: P, dtype: jnp.dtype, w: jax.Array) -> jax.Array:
    w = w.astype(dtype)
    for axis, entry in enumerate(spec):
        if entry is not None:
            # pieces side by side, then into their places: of a tiled gather XLA wants the axis outermost, and for that
            # it transposes the parameters of all layers ahead of their loop, a whole copy of them
            pieces = lax.all_gather(w, entry, axis=0)
            w = jnp.moveaxis(pieces, 0, axis).reshape(*w.shape[:axis], -1, *w.shape[axis + 1 :])
    return w


def _gather_bwd(spec, dtype, _, grad):
    del dtype
    return (scatter(grad.astype(jnp.float32), spec),)


def scatter(x: jax.Array, spec: P) -> jax.Array:
    """The transpose of gather: the sum over the devices of a whole array's parts, cut to this device's piece."""
    for axis, entry in enumerate(spec):
        if entry is not None:
            pieces = x.reshape(*x.shape[:axis], lax.axis_size(entry), -1, *x.shape[axis + 1 :])
            x = lax.psum_scatter(jnp.moveaxis(pieces, axis, 0), entry, scatter_dimension=0)
    return x


_gather.defvjp(lambda spec, dtype, w: (_gather(spec, dtype, w), None), _gather_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def whole(sharding: Sharding, names: tuple[str, ...], dtype: Any, w: jax.Array) -> jax.Array:
    """Outside of shard_map: a parameter cut by its logical axes -> the whole one on every device, float32, rounded to
    `dtype` before it travels.

    For a shard_map that takes it as P(): the sum of its gradients over the devices stays float32.
    """
    w = lax.with_sharding_constraint(w.astype(dtype), NamedSharding(sharding.mesh, P()))
    return w.astype(jnp.float32)


whole.defvjp(
    lambda sharding, names, dtype, w: (whole(sharding, names, dtype, w), None),
    lambda sharding, names, dtype, _, grad: (sharding.constrain(grad, *names),),
)


def param(value: jax.Array, *names: str) -> nnx.Param:
    """A parameter that remembers its logical axes. It is placed by `parameter_shardings`, not when it is made."""
    return nnx.Param(value, out_sharding=names, eager_sharding=False)


def parameter_shardings(state: nnx.State, sharding: Sharding) -> nnx.State:
    """The NamedSharding of every parameter of a (possibly abstract) state, as a state of the same structure."""

    def one(variable):
        return variable.replace(sharding.named(variable.get_metadata("out_sharding"), variable.get_value().shape))

    return jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def abstract_state(make: Callable[[nnx.Rngs], nnx.Module]) -> tuple[nnx.GraphDef, nnx.State]:
    """The structure of the model that `make(rngs)` builds, and its parameters as shapes: nothing is computed."""
    return nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)


def init_state(
    make: Callable[[nnx.Rngs], nnx.Module], sharding: Sharding, key: jax.Array
) -> tuple[nnx.GraphDef, nnx.State]:
    """Build the model `make(rngs)` with every parameter drawn on the devices that keep it.

    The values depend on the key only, never on the mesh. `nnx.merge(graphdef, state)` is the model.
    """
    graphdef, shapes = abstract_state(make)
    draw = jax.jit(
        lambda key: nnx.split(make(nnx.Rngs(key)), nnx.Param)[1], out_shardings=parameter_shardings(shapes, sharding)
    )
    return graphdef, draw(key)
