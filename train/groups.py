"""Parameters by name: which are decayed, which Muon takes, and what --optim.groups says of some of them.

A parameter's name is its path, its layers stacked: embedding.table, groups.0.attention.q.weight, groups.0.mlp.gate,
head.weight, norm.weight. A group is written

    PATTERN=LR_SCALE               '*norm*=0.5'           half the learning rate
    PATTERN=LR_SCALE,WEIGHT_DECAY  'embedding.*=1,0'      the same rate, no decay;  '*.route=0,0'  frozen

with shell wildcards. The first pattern that fits a name counts; a name that none fits has scale 1, and the run's weight
decay if it is a matrix. Weight decay is multiplied by the learning rate, and so by its scale too.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax

from zigzag_jax.models.balance import BIAS
from zigzag_jax.train.errors import UserError

_FIELD = "optim.groups"


class Group(NamedTuple):
    """What is done to the parameters whose name fits."""

    pattern: str
    """With the wildcards *, ? and [...]."""
    lr_scale: float
    """Multiplies the learning rate."""
    weight_decay: float | None
    """Replaces the run's; None: what the name has without the group."""


def parse(text: str) -> Group:
    """A group from its written form; UserError where it is none.

    >>> parse("embedding.*=0.5,0")
    Group(pattern='embedding.*', lr_scale=0.5, weight_decay=0.0)
    """
    pattern, found, values = text.rpartition("=")
    try:
        numbers = [float(x) for x in values.split(",")]
    except ValueError:
        numbers = []
    if not found or not pattern or len(numbers) not in (1, 2) or not all(0 <= x < float("inf") for x in numbers):
        raise UserError(_FIELD, "must be PATTERN=LR_SCALE or PATTERN=LR_SCALE,WEIGHT_DECAY, numbers >= 0", text)
    return Group(pattern, numbers[0], numbers[1] if len(numbers) == 2 else None)


def name_of(path: tuple[Any, ...]) -> str:
    """The name of the parameter at a path of jax.tree_util."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def names(params: Any) -> list[str]:
    """The names of all parameters."""
    return [name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def check_groups(texts: Iterable[str], params: Any) -> None:
    """UserError for a group that names no parameter, or none that an earlier one has left."""
    left = names(params)
    for text in texts:
        pattern = parse(text).pattern
        rest = [name for name in left if not fnmatchcase(name, pattern)]
        if len(rest) == len(left):
            raise UserError(_FIELD, f"must fit a name that no earlier group took, of {', '.join(left)}", text)
        left = rest


def is_vector(name: str) -> bool:
    """Whether a name is that of norms' weights or a router's biases: no matrix, though stacked over layers."""
    return any("norm" in part or part == BIAS for part in name.split("."))


def is_hidden_matrix(name: str) -> bool:
    """Whether Muon takes it: a matrix between hidden states. Embedding, head and routers are matrices of another kind,
    a row or a column for each token or expert, of which few have a gradient at a time.
    """
    return not is_vector(name) and not {"embedding", "head", "route"} & set(name.split("."))


def lr_and_decay(name: str, groups: tuple[Group, ...], weight_decay: float) -> tuple[float, float]:
    """(scale of the learning rate, weight decay) of a parameter."""
    own = 0.0 if is_vector(name) else weight_decay
    for group in groups:
        if fnmatchcase(name, group.pattern):
            return group.lr_scale, own if group.weight_decay is None else group.weight_decay
    return 1.0, own
