"""Logical axes, rules, mesh; and the examples in the docstrings of the models."""

import doctest
import importlib
import math
import pkgutil

import jax
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from model_helpers import maker, sharding

import zigzag_jax.models
from zigzag_jax.models.presets import PRESETS
from zigzag_jax.models.sharding import Sharding, abstract_state, parameter_shardings, spec_axes


def test_specs_of_the_docstring():
    where = sharding(2, 2, 2)
    assert where.spec(("batch", "sequence", "embed"), (4, 8, 16)) == P(("dp", "fsdp"), "cp", None)
    assert where.spec(("embed", "heads"), (16, 8)) == P(("fsdp", "cp"), None)
    assert where.spec(("layers", "experts", "embed", "mlp"), (3, 4, 8, 16)) == P(None, None, ("fsdp", "cp"), None)
    assert spec_axes(P(("dp", "fsdp"), None, "cp")) == ("dp", "fsdp", "cp")


def test_a_parameter_that_does_not_divide_stays_whole():
    assert sharding(1, 2, 3).spec(("embed", "heads"), (128, 8)) == P("fsdp", None)
    assert sharding(1, 1, 3).spec(("embed", "heads"), (128, 8)) == P("fsdp", None)
    assert sharding(1, 2, 3).spec(("embed",), (15,)) == P(None)


def test_tokens_that_do_not_divide_raise():
    with pytest.raises(ValueError, match="the sequence must be divisible by cp = 3, got 16"):
        sharding(cp=3).spec(("batch", "sequence"), (4, 16))
    with pytest.raises(ValueError, match="one logical axis for every dimension"):
        sharding(cp=3).spec(("batch",), (4, 16))


def test_a_mesh_may_have_fewer_axes():
    mesh = jax.make_mesh((2,), ("cp",), axis_types=(AxisType.Auto,))
    assert Sharding(mesh).spec(("batch", "sequence", "embed"), (3, 8, 16)) == P(None, "cp", None)


def test_explicit_axes_raise():
    with pytest.raises(ValueError, match="must have Auto axes"):
        Sharding(jax.make_mesh((2,), ("cp",), axis_types=(AxisType.Explicit,)))


def test_the_real_model_is_cut_everywhere():
    """Nothing is computed: 30.5 billion parameters, of which a device of eight holds a quarter (dp holds copies)."""
    where = sharding(2, 2, 2)
    _, shapes = abstract_state(maker(PRESETS["qwen3-30b-a3b"], where))
    leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(parameter_shardings(shapes, where)), strict=True)
    sizes = [(math.prod(x.shape), math.prod(named.shard_shape(x.shape))) for x, named in leaves]
    total, held = (sum(column) for column in zip(*sizes, strict=True))
    assert total == 30_532_122_624
    assert held < 1.0001 * total / 4
    assert nnx.to_flat_state(shapes)  # still abstract: a state of shapes


def test_examples_in_docstrings():
    for module in pkgutil.iter_modules(zigzag_jax.models.__path__):
        found = doctest.testmod(importlib.import_module(f"zigzag_jax.models.{module.name}"))
        assert found.failed == 0, module.name
