"""Logical axes, rules, mesh; and the examples in the docstrings of the models."""

import dataclasses
import doctest
import importlib
import math
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from model_helpers import maker, sharding

import zigzag_jax.models
from zigzag_jax.models.presets import PRESETS
from zigzag_jax.models.sharding import Sharding, abstract_state, parameter_shardings, spec_axes, whole


def test_specs_of_the_docstring():
    where = sharding(2, 2, 2)
    assert where.spec(("batch", "sequence", "embed"), (4, 8, 16)) == P(("dp", "fsdp"), "cp", None)
    assert where.spec(("embed", "heads"), (16, 8)) == P(("fsdp", "cp"), None)
    assert where.spec(("layers", "experts", "embed", "mlp"), (3, 4, 8, 16)) == P(None, None, ("fsdp", "cp"), None)
    assert where.spec(("embed", "latent"), (16, 8)) == P(("fsdp", "cp"), None)
    assert where.spec(("latent", "heads"), (8, 16)) == P(("fsdp", "cp"), None)
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


# deepseek-ai/DeepSeek-V2, as far as it has other sizes than Lite
FULL_DEEPSEEK = dataclasses.replace(
    PRESETS["deepseek-v2-lite"],
    hidden_size=5120,
    intermediate_size=12288,
    moe_intermediate_size=1536,
    n_routed_experts=160,
    n_group=8,
    topk_group=3,
    num_attention_heads=128,
    num_hidden_layers=60,
    q_lora_rank=1536,
    routed_scaling_factor=16.0,
)


@pytest.mark.parametrize(
    ("sizes", "count"),
    [(PRESETS["qwen3-30b-a3b"], 30_532_122_624), (FULL_DEEPSEEK, 235_741_434_880)],
    ids=["qwen3-30b-a3b", "deepseek-v2"],
)
def test_the_real_model_is_cut_everywhere(sizes, count: int):
    """Nothing is computed: billions of parameters, of which a device of eight holds a quarter (dp holds copies)."""
    where = sharding(2, 2, 2)
    _, shapes = abstract_state(maker(sizes, where))
    leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(parameter_shardings(shapes, where)), strict=True)
    sizes = [(math.prod(x.shape), math.prod(named.shard_shape(x.shape))) for x, named in leaves]
    total, held = (sum(column) for column in zip(*sizes, strict=True))
    assert total == count
    assert held < 1.0001 * total / 4
    assert nnx.to_flat_state(shapes)  # still abstract: a state of shapes


def test_a_weight_made_whole_is_rounded_and_its_gradient_is_summed_in_float32():
    """Eight devices whose shares are of other sizes: a sum in bfloat16 would lose the small ones."""
    where, names = sharding(1, 2, 4), ("latent", "heads")
    w = jnp.asarray(np.random.default_rng(0).standard_normal((16, 8)), jnp.float32)
    w = jax.device_put(w, where.named(names, w.shape))
    shares = jnp.asarray(16.0 ** -np.arange(8) / 3, jnp.float32).reshape(2, 4)

    def loss(w):
        specs = {"in_specs": (P(), P("fsdp", "cp")), "out_specs": P("fsdp", "cp"), "check_vma": False}
        run = jax.shard_map(lambda w, share: jnp.sum(w) * share, mesh=where.mesh, **specs)
        rounded = whole(where, names, jnp.bfloat16, w)
        return jnp.sum(run(rounded, shares)), rounded

    gradient, rounded = jax.jit(jax.grad(loss, has_aux=True))(w)
    np.testing.assert_array_equal(rounded, w.astype(jnp.bfloat16).astype(jnp.float32))
    assert gradient.sharding.spec == where.spec(names, w.shape)
    np.testing.assert_allclose(gradient, np.full(w.shape, np.sum(shares)), rtol=1e-6)


def test_examples_in_docstrings():
    for module in pkgutil.iter_modules(zigzag_jax.models.__path__):
        found = doctest.testmod(importlib.import_module(f"zigzag_jax.models.{module.name}"))
        assert found.failed == 0, module.name
