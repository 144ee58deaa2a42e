"""What the layers of a step keep for its backward, read off the step's jaxpr.

A scan over layers that is differentiated yields, beside its results, one stacked array for each value that the backward
needs; they are the outputs that a later scan, which runs in reverse, takes in. So they can be told from all others
without knowing the model or how it is rematerialised.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr


class Kept(NamedTuple):
    """One kind of array that every layer of a stack keeps."""

    kind: str
    """Dtype and global shape of one layer's, as in bfloat16[1, 4096, 2048]."""
    on_host: bool
    """Whether it waits in the host's memory."""


def kept_by_layers(jaxpr: ClosedJaxpr, devices: int) -> Counter[Kept]:
    """Bytes a device of what the layers keep, all layers together, by kind.

    Activations are cut over all devices (rows over dp and fsdp, the sequence over cp), so a device has its share of
    each; the few small arrays that it has whole are counted as if they were cut too.
    """
    total: Counter[Kept] = Counter()
    for array in _kept(jaxpr.jaxpr):
        _, *shape = array.shape
        kind = Kept(f"{array.dtype}{shape}", array.memory_space.name == "Host")
        total[kind] += array.size * array.dtype.itemsize // devices
    return total


def _kept(jaxpr: Any) -> Iterator[Any]:
    """The stacked arrays as avals, of this jaxpr and those inside it."""
    scans = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    taken = {id(x) for eqn in scans if eqn.params["reverse"] for x in eqn.invars}
    for eqn in scans:
        if not eqn.params["reverse"]:
            body = eqn.params["jaxpr"].jaxpr.outvars
            # a stacked output has an axis more than the body's; a carry has not
            stacked = (x for x, one in zip(eqn.outvars, body, strict=True) if x.aval.ndim > one.aval.ndim)
            yield from (x.aval for x in stacked if id(x) in taken)
    for eqn in jaxpr.eqns:
        for inner in _inner(eqn.params.values()):
            yield from _kept(inner)


def _inner(values: Any) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _inner(value)
        elif isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
