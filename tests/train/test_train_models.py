"""From --model to a model, and what --dry-run says of it."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from zigzag_jax.models.deepseek_v2 import Attention
from zigzag_jax.models.hf.convert import separate, to_hf
from zigzag_jax.models.hf.files import Tensor, write
from zigzag_jax.models.hf.saved import Source, read_state
from zigzag_jax.models.presets import PRESETS
from zigzag_jax.models.sharding import Sharding, abstract_state
from zigzag_jax.train.config import Config, MeshConfig, RouterConfig
from zigzag_jax.train.dry_run import describe
from zigzag_jax.train.errors import UserError
from zigzag_jax.train.models import (
    config_json,
    first_parameters,
    fit_vocabulary,
    maker,
    model_config,
    tokenizer_file,
    weights_digest,
)

HF = {
    "model_type": "qwen3_moe", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "vocab_size": 256, "num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
    "intermediate_size": 96, "rope_theta": 1e6,
}  # fmt: skip


def folder(tmp_path: Path, **changes: object) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(HF | changes))
    return tmp_path


def test_a_name():
    assert model_config(Config(model="qwen3-30b-a3b")) == PRESETS["qwen3-30b-a3b"]


def test_a_name_that_is_none():
    with pytest.raises(UserError, match=r"^model: must be one of tiny-qwen3-moe, .*, got tiny-nothing"):
        model_config(Config(model="tiny-nothing"))


def test_sizes_of_a_folder(tmp_path: Path):
    assert model_config(Config(model=str(folder(tmp_path)), random_init=True)).expert_count == 8


def saved_model(tmp_path: Path, vocab_size: int = 300) -> tuple[Path, nnx.State]:
    """A tiny random model as a Hugging Face folder, and its parameters."""
    sizes = fit_vocabulary(PRESETS["tiny-deepseek-v2"], "tiny-deepseek-v2", vocab_size)
    made = tmp_path / "model"
    made.mkdir()
    where = Sharding(jax.make_mesh((1,), ("cp",), axis_types=(AxisType.Auto,)))
    shapes, rng = abstract_state(maker(Config(), sizes, where))[1], np.random.default_rng(3)
    state = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), shapes)
    tensors = [Tensor(name, x.dtype, x.shape, lambda x=x: [x]) for name, x in to_hf(state, sizes).items()]
    write(made, tensors)
    (made / "config.json").write_text(json.dumps(sizes.to_hf() | {"eos_token_id": 5}))
    return made, state


def test_a_folder_brings_its_weights_to_any_mesh(tmp_path: Path):
    made, want = saved_model(tmp_path)
    config = Config(model=str(made))
    sizes = model_config(config)
    assert config_json(config, sizes, 0)["eos_token_id"] == 5
    assert config_json(Config(), PRESETS["tiny-qwen3-moe"], 0)["eos_token_id"] == 0
    assert weights_digest(Config()) == weights_digest(Config(model=str(made), random_init=True)) == "random"
    before = weights_digest(config)
    devices = jax.devices()[:4]
    where = Sharding(jax.make_mesh((2, 2), ("fsdp", "cp"), axis_types=(AxisType.Auto,) * 2, devices=devices))
    shapes = abstract_state(maker(config, sizes, where))[1]
    told: list[tuple[int, int]] = []
    got = first_parameters(config, sizes, shapes, where, lambda done, total: told.append((done, total)))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    pieces = [{str(x.index): x.data.nbytes for x in array.addressable_shards} for array in jax.tree.leaves(got)]
    assert told[-1] == (sum(sum(sizes.values()) for sizes in pieces),) * 2
    assert len(told) == sum(map(len, pieces))
    tensors = {name: np.array(x) for name, x in to_hf(want, sizes).items()}
    tensors["model.norm.weight"][0] += 1
    write(made, [Tensor(name, x.dtype, x.shape, lambda x=x: [x]) for name, x in tensors.items()])
    assert weights_digest(config) != before
    fresh = first_parameters(Config(model=str(made), random_init=True), sizes, shapes, where)
    assert any(
        np.any(np.asarray(x) != np.asarray(y)) for x, y in zip(*map(jax.tree.leaves, (fresh, want)), strict=True)
    )


def test_a_router_bias_begins_at_zero_and_is_not_exported(tmp_path: Path):
    made, _ = saved_model(tmp_path)
    config = Config(model=str(made), router=RouterConfig(bias_rate=0.1))
    sizes = model_config(config)
    where = Sharding(jax.make_mesh((1,), ("cp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1]))
    shapes = abstract_state(maker(config, sizes, where))[1]
    state = first_parameters(config, sizes, shapes, where)
    named = {".".join(map(str, path)): np.array(x.get_value()) for path, x in nnx.to_flat_state(state)}
    np.testing.assert_array_equal(named["groups.1.mlp.routed.bias"], np.zeros((2, 8)))
    named["groups.1.mlp.routed.bias"] += 1
    source = Source({}, named, stacked=True, trained=True, beside=tmp_path)
    assert source.router_bias
    again = dict(nnx.to_flat_state(read_state(source, sizes, shapes, where)))
    np.testing.assert_array_equal(again["groups", 1, "mlp", "routed", "bias"].get_value(), 1)
    with pytest.raises(
        ValueError, match=r"a model must have no router bias to be written .*, got groups.1.mlp.routed.b"
    ):
        separate(named, sizes)
    named.pop("groups.1.mlp.routed.bias")
    again = dict(nnx.to_flat_state(read_state(source, sizes, shapes, where)))
    np.testing.assert_array_equal(again["groups", 1, "mlp", "routed", "bias"].get_value(), 0)


def test_a_folder_brings_its_tokenizer(tmp_path: Path):
    made, _ = saved_model(tmp_path)
    with pytest.raises(UserError, match=r"^tokenizer: must be given, .*model holds weights and no tokenizer.json"):
        tokenizer_file(Config(model=str(made)))
    assert tokenizer_file(Config(model=str(made), random_init=True)) is None
    assert tokenizer_file(Config(model=str(made), tokenizer=tmp_path / "mine.json")) == tmp_path / "mine.json"
    (made / "tokenizer.json").write_text("{}")
    assert tokenizer_file(Config(model=str(made))) == made / "tokenizer.json"
    assert tokenizer_file(Config()) is None


def test_a_folder_without_its_weights(tmp_path: Path):
    with pytest.raises(UserError, match=r"^model: must hold model\*.safetensors \(or give --random-init"):
        model_config(Config(model=str(folder(tmp_path))))
    made, _ = saved_model(tmp_path)
    changed = json.loads((made / "config.json").read_text()) | {"vocab_size": 301}
    (made / "config.json").write_text(json.dumps(changed))
    with pytest.raises(
        UserError, match=r"^model: must hold the weights of its config.json \(.*embed_tokens.*\(300, 128"
    ):
        model_config(Config(model=str(made)))
    assert model_config(Config(model=str(made), random_init=True)).vocab_size == 301


@pytest.mark.parametrize("changes", [{"model_type": "llama"}, {"hidden_size": None}, {"attention_bias": True}])
def test_a_folder_that_cannot_be_computed(tmp_path: Path, changes: dict):
    with pytest.raises(UserError, match=r"^model: must hold a config.json that can be computed"):
        model_config(Config(model=str(folder(tmp_path, **changes)), random_init=True))


def test_vocabulary():
    assert fit_vocabulary(PRESETS["tiny-qwen3-moe"], "tiny-qwen3-moe", 300).vocab_size == 300
    big = PRESETS["qwen3-30b-a3b"]
    assert fit_vocabulary(big, "qwen3-30b-a3b", 1024) == big
    with pytest.raises(UserError, match=r"^tokenizer: must have at most the model's 151936 tokens, got 200000"):
        fit_vocabulary(big, "qwen3-30b-a3b", 200000)


def test_a_folder_called_tiny_keeps_its_vocabulary():
    sizes = PRESETS["qwen3-30b-a3b"]
    assert fit_vocabulary(sizes, "tiny-of-mine", 300) == sizes


def test_dry_run_on_a_gpu_needs_a_mesh(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("zigzag_jax.train.dry_run.on_cpu", lambda: False)
    with pytest.raises(UserError, match=r"^mesh: must be given with --dry-run"):
        describe(Config(), PRESETS["tiny-qwen3-moe"], print)


def test_dry_run_counts_parameters_and_hops():
    said: list[str] = []
    config = Config(model="qwen3-30b-a3b", mesh=MeshConfig(cp=8), seq_len=262144, batch=1, dtype="bfloat16")
    describe(config, PRESETS["qwen3-30b-a3b"], said.append)
    text = "\n".join(said)
    assert "cp 8 = 8 devices" in text
    assert "30.532 billion" in text  # what the model's name and its card say
    # k and v: 32768 tokens * 2 * 4 heads * 128 * 2 bytes = 64 MiB; float32 gradients twice that
    assert "7 hops of 64.00 MiB" in text
    assert "7 of 128.00 MiB" in text
    # 30.532e9 * 4 bytes / 8 devices; the moments are twice the parameters
    assert "parameters    14.2" in text
    assert "optimiser     28.4" in text
    assert "exchange" not in text


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "payload       latent (by the cost rule, --payload overrides it)"),
        ({"payload": "expanded"}, "payload       expanded (by --payload)"),
        ({"strategy": "allgather"}, "payload       latent (by the cost rule, --payload overrides it)"),
        ({"mesh": MeshConfig(dp=4)}, None),  # nothing travels
    ],
    ids=["rule", "given", "allgather", "cp1"],
)
def test_dry_run_says_which_form_of_deepseeks_keys_travels(changes: dict, line: str | None):
    said: list[str] = []
    config = Config(model="deepseek-v2-lite", mesh=MeshConfig(cp=4), seq_len=32768, batch=4, dtype="bfloat16")
    config = dataclasses.replace(config, **changes)
    describe(config, PRESETS["deepseek-v2-lite"], said.append)
    assert [text for text in said if text.startswith("payload")] == ([line] if line else [])
    if line:  # of 4 rows of 8192 tokens; the latent and its rotary key are 576 values of 2 bytes
        way = "allgather     3 shards" if config.strategy == "allgather" else "ring          3 hops"
        assert f"{way} of 36.00 MiB (latent) a layer forward" in said
        assert f"{way} of 260.00 MiB (expanded) a layer forward" in said


def test_a_payload_that_the_model_has_not():
    config = Config(payload="latent", mesh=MeshConfig(cp=4))
    rule = "^payload: must be left out for a model whose keys are made of no latent, got latent$"
    with pytest.raises(UserError, match=rule):
        describe(config, PRESETS["tiny-qwen3-moe"], print)


@pytest.mark.parametrize("payload", [None, "latent", "expanded"])
def test_the_model_is_told_what_travels(payload: Literal["latent", "expanded"] | None):
    sharding = Sharding(jax.make_mesh((1,), ("cp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1]))
    build = maker(Config(payload=payload), PRESETS["tiny-deepseek-v2"], sharding)
    made = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    assert [m.options.payload for _, m in nnx.iter_modules(made) if isinstance(m, Attention)] == [payload] * 2


def test_dry_run_says_what_travels_to_the_experts():
    said: list[str] = []
    config = Config(mesh=MeshConfig(fsdp=2, cp=4, ep=8), seq_len=32768, batch=2, dtype="bfloat16")
    describe(config, PRESETS["qwen3-30b-a3b"], said.append)
    text = "\n".join(said)
    assert "16 of 128 a device (ep 8 over fsdp, cp)" in text
    assert "65536 routed rows a device, in rounds of 10240 rows to each of the 7 others" in text
    # 7 * 10240 rows of 2048 values of 2 bytes, there and back
    assert "560.27 MiB leave a device a layer forward" in text
    assert "840.55 MiB backward" in text  # one and a half times that, and two float32 a row
    assert f"{48 * (560.27 + 840.55) / 1024:.3f}"[:5] in text
    assert "7 rounds" in text  # 65536 rows to one device
    assert "parameters    14.2" in text  # whole experts or pieces of all: as many bytes
