"""What a program sends between ranks, read from its jaxpr: each collective weighted by the trips of its loops."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

COLLECTIVES = ("ppermute", "all_gather", "reduce_scatter", "all_to_all", "psum", "psum_invariant")


class Collective(NamedTuple):
    """One equation of a program, or several alike."""

    name: str
    dtype: str
    size: int
    """Bytes that one rank sends."""
    times: float


def equations(jaxpr: Any, trips: float = 1) -> Iterator[tuple[Any, float]]:
    """Every equation of a jaxpr and of those inside it, with the number of times it runs (nan: not known)."""
    for eqn in (jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr).eqns:
        yield eqn, trips
        inner = trips * {"scan": eqn.params.get("length", 1), "while": math.nan}.get(eqn.primitive.name, 1)
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: isinstance(x, (ClosedJaxpr, Jaxpr))):
            if isinstance(value, (ClosedJaxpr, Jaxpr)):
                yield from equations(value, inner)


def collectives(f, *args) -> list[Collective]:
    """All collectives that f(*args) runs."""
    found = []
    for eqn, trips in equations(jax.make_jaxpr(f)(*args)):
        if eqn.primitive.name in COLLECTIVES:
            for x in (v.aval for v in eqn.invars):
                size = math.prod(x.shape) * np.dtype(x.dtype).itemsize
                found.append(Collective(eqn.primitive.name, str(x.dtype), size, trips))
    return found


def count(found: list[Collective], name: str) -> float:
    """How many arrays travel by `name`."""
    return sum(c.times for c in found if c.name == name)


def sent(found: list[Collective], name: str = "ppermute") -> dict[str, float]:
    """Bytes that travel by `name`, by dtype."""
    total: dict[str, float] = {}
    for c in found:
        if c.name == name:
            total[c.dtype] = total.get(c.dtype, 0) + c.size * c.times
    return total
