"""Logits, every gradient and the auxiliary loss as `transformers` computes them (make_golden.py made the files)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_helpers import GOLDEN, jit, maker, natural, put, sharding
from safetensors.numpy import load_file

from zigzag_jax.models.balance import load_balancing_loss
from zigzag_jax.models.hf.convert import from_hf, to_hf
from zigzag_jax.models.hf.files import Folder
from zigzag_jax.models.hf.golden import BAR, distances
from zigzag_jax.models.registry import read_config
from zigzag_jax.models.sharding import abstract_state


@functools.cache
def load(name, cp):
    """A saved model on a mesh: (config, where, graphdef, state)."""
    where = sharding(cp=cp)
    config = read_config(GOLDEN / name)
    graphdef, shapes = abstract_state(maker(config, where))
    return config, where, graphdef, from_hf(Folder(GOLDEN / name), config, shapes, where)


@functools.cache
def passes(name, cp):
    """Jitted (state, batch) -> the gradient of sum(logits * cotangent), and (logits, auxiliary loss)."""
    _, _, graphdef, _ = load(name, cp)

    def forward(state, batch):
        model = nnx.merge(graphdef, state)
        hidden, stats = model(batch["input_ids"], batch["positions"], real=batch["real"])
        logits = model.logits(hidden)
        return jnp.sum(logits * batch["cotangent"]), (logits, load_balancing_loss(stats))

    return jit(jax.grad(forward, has_aux=True))


CASES = [
    ("qwen3_moe", "golden", 1),
    ("qwen3_moe", "golden", 4),
    ("qwen3_moe", "packed", 1),
    ("qwen3_moe", "packed", 4),
    ("qwen3_moe_mixed", "golden", 4),
    ("qwen3_moe_yarn", "golden", 4),
    ("qwen3_moe_linear", "golden", 1),
    ("deepseek_v2_lite", "golden", 1),
    ("deepseek_v2_lite", "golden", 4),
    pytest.param("deepseek_v2_full", "golden", 1, marks=pytest.mark.slow),
    ("deepseek_v2_full", "golden", 4),
    ("qwen3", "golden", 4),
]


def run(name, cp, golden):
    """(config, gradients, logits in natural order, auxiliary loss) of a golden file's batch."""
    config, where, _, state = load(name, cp)
    shape = golden["input_ids"].shape
    batch = {
        "input_ids": golden["input_ids"],
        "cotangent": golden.get("cotangent", np.zeros((*shape, config.vocab_size), np.float32)),
        "positions": golden.get("positions", np.broadcast_to(np.arange(shape[1], dtype=np.int32)[None], shape)),
        "real": golden.get("real", np.ones(shape)) > 0,
    }
    gradients, (logits, aux) = passes(name, cp)(state, put(batch, where))
    return config, gradients, natural(logits, where), aux


@pytest.mark.parametrize(("name", "file", "cp"), CASES, ids=lambda x: f"cp{x}" if isinstance(x, int) else x)
def test_logits_and_gradients(name, file, cp):
    golden = load_file(GOLDEN / name / f"{file}.safetensors")
    config, gradients, logits, _ = run(name, cp, golden)
    got = {f"grad.{key}": value for key, value in to_hf(gradients, config).items()} | {"logits": logits}
    want = {key: golden[key] for key in golden if key.startswith("grad.") or key == "logits"}
    assert got.keys() == want.keys()
    errors = distances(got, want)
    worst = max(errors, key=errors.__getitem__)
    print(f"{name} {file} cp={cp}: worst {worst} {errors[worst]:.2e}, logits {errors['logits']:.2e}")
    assert errors[worst] < BAR, worst


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_moe_mixed"])
def test_auxiliary_loss(name):
    """Two mixtures of experts: one product over all layers is not a mean of products. Without and with padding."""
    golden = load_file(GOLDEN / name / "aux.safetensors")
    padded = run(name, 4, golden)[-1]
    plain = run(name, 4, {"input_ids": golden["input_ids"]})[-1]
    np.testing.assert_allclose(plain, golden["plain"][0], rtol=2e-6)
    np.testing.assert_allclose(padded, golden["padded"][0], rtol=2e-6)
    assert abs(golden["padded"][0] / golden["plain"][0] - 1) > 1e-3  # the mask matters


def test_names_are_read_and_written_alike():
    config, where, _, state = load("qwen3_moe_mixed", 4)
    saved = load_file(GOLDEN / "qwen3_moe_mixed" / "model.safetensors")
    again = to_hf(state, config)
    assert again.keys() == saved.keys()
    for name in saved:
        np.testing.assert_array_equal(again[name], saved[name], err_msg=name)
    shapes = abstract_state(maker(config, where))[1]
    own = next(name for name in saved if name.endswith("q_proj.weight"))
    rule = "^a saved model must hold the tensors of its config and no others, got "
    missing, unexpected = "1 missing: model.norm.weight", "2 unexpected: model.norm.bias, model.norm.scale"
    wrong = rf"1 of another shape: {own} \(3,\) instead of \({', '.join(map(str, saved[own].shape))}\)"
    gone, more = {"model.norm.weight": None}, dict.fromkeys(("model.norm.scale", "model.norm.bias"), np.zeros(3))
    other = {own: np.zeros(3)}
    for change, found in (
        (gone, missing),
        (more, unexpected),
        (other, wrong),
        (gone | more | other, f"{missing}; {unexpected}; {wrong}"),
    ):
        tensors = {name: value for name, value in (saved | change).items() if value is not None}
        with pytest.raises(ValueError, match=f"{rule}{found}$"):
            from_hf(tensors, config, shapes, where)
