"""H100s that are not there, for tests that compile for them (.venv-aot)."""

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from zigzag_jax.train.memory.topology import described_mesh


def h100s(count: int, axis_name: str = "cp") -> Mesh:
    """A mesh of H100s in one host."""
    return described_mesh("h100", (count,), (axis_name,))


def on(mesh: Mesh, shape, dtype, spec: P = P()) -> jax.ShapeDtypeStruct:  # noqa: B008 (immutable)
    """An array on them that is only described."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
