"""Perplexity: every token's loss, in natural order, is what one device makes of the row."""

import errno
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from zigzag_jax.models import generate
from zigzag_jax.models.hf import files
from zigzag_jax.models.hf.convert import to_hf
from zigzag_jax.models.presets import PRESETS
from zigzag_jax.models.sharding import Sharding, abstract_state
from zigzag_jax.models.tokenizer import read_tokenizer
from zigzag_jax.train import evaluate
from zigzag_jax.train.config import Config, MeshConfig
from zigzag_jax.train.data.tokenizer import train_tokenizer
from zigzag_jax.train.errors import MachineError, UserError
from zigzag_jax.train.models import fit_vocabulary, maker

TEXT = [f"Line {n}: a ring comes home after {n % 7} hops.\n" * (n % 5 + 1) for n in range(60)]


@pytest.fixture(autouse=True)
def running_devices(monkeypatch: pytest.MonkeyPatch):
    """The devices of this process are chosen already."""
    monkeypatch.setattr("zigzag_jax.train.mesh.on_cpu", lambda: True)
    monkeypatch.setattr("zigzag_jax.models.devices.on_cpu", lambda: False)
    monkeypatch.setattr(evaluate, "start_devices", lambda config: None)
    # compile time is what these tests take
    quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    monkeypatch.setattr(jax, "jit", quick)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    """A folder with a tiny random model and its tokenizer, a corpus, and the model on one device."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(TEXT, characters=sum(map(len, TEXT)), vocab_size=300)
    tokenizer.save(str(folder / "tokenizer.json"))
    sizes = fit_vocabulary(PRESETS["tiny-qwen3-moe"], "tiny-qwen3-moe", tokenizer.get_vocab_size())
    where = Sharding(jax.make_mesh((1,), ("cp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1]))
    graphdef, shapes = abstract_state(maker(Config(), sizes, where))
    rng = np.random.default_rng(5)
    state = jax.tree.map(lambda x: jnp.asarray(0.05 * rng.standard_normal(x.shape), jnp.float32), shapes)
    files.write(folder, [files.Tensor(k, x.dtype, x.shape, lambda x=x: [x]) for k, x in to_hf(state, sizes).items()])
    (folder / "config.json").write_text(json.dumps(sizes.to_hf()))
    data = tmp_path_factory.mktemp("data")
    (data / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXT))
    return folder, data, nnx.merge(graphdef, state)


def test_losses_in_natural_order(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, data, merged = model
    monkeypatch.setenv("ZIGZAG_CACHE", str(tmp_path / "cache"))
    said: list[str] = []
    config = evaluate.EvaluateConfig(
        folder, data=data, seq_len=62, batch=2, rows=5, dtype="float32", out=tmp_path / "x.npz", mesh=MeshConfig(cp=3)
    )
    mean = evaluate.evaluate(config, said.append)
    found = np.load(tmp_path / "x.npz")
    assert found["losses"].shape == (5, 62)
    hidden, _ = merged(jnp.asarray(found["tokens"]), jnp.asarray(found["positions"]))
    logits = np.asarray(merged.logits(hidden), np.float64)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    labels = found["labels"]
    want = np.where(labels >= 0, -np.take_along_axis(logits, np.maximum(labels, 0)[..., None], 2)[..., 0], 0.0)
    np.testing.assert_allclose(found["losses"], want, atol=1e-4)
    np.testing.assert_allclose(mean, want.sum() / (labels >= 0).sum(), rtol=1e-5)
    assert said[-1].split() == ["all", f"{(labels >= 0).sum():,}", f"{mean:.4f}", f"{np.exp(mean):.2f}"]
    assert any(line.split()[:3] == ["0", "..", "63"] for line in said)


def test_the_whole_text_is_scored_once(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, data, _ = model
    monkeypatch.setenv("ZIGZAG_CACHE", str(tmp_path / "cache"))
    counts = {}
    for part in ("all", "held-out"):
        said: list[str] = []
        config = evaluate.EvaluateConfig(folder, data=data, part=part, seq_len=256, batch=2, dtype="float32")
        evaluate.evaluate(config, said.append)
        counts[part] = int(said[-1].split()[1].replace(",", ""))
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    # each document predicts all its tokens but the first, and its end
    assert counts["all"] == sum(len(tokenizer.encode(text).ids) for text in TEXT)
    assert 0 < counts["held-out"] < counts["all"] / 4


def test_mistakes(model, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, _, _ = model
    for change, message in (
        ({"rows": 0}, "rows: must be >= 1, got 0"),
        ({"out": Path("x.txt")}, "out: must be a file that ends in .npz, in a folder that exists, got x.txt"),
        ({"out": Path("nowhere/x.npz")}, "out: must be a file that ends in .npz, in a folder that exists, got nowhere"),
        ({"seq_len": 1}, "seq-len: must be >= 2, got 1"),
        ({"folder": tmp_path}, "folder: must be a model with its weights .*, got"),
        ({"tokenizer": tmp_path / "no.json"}, "tokenizer: must be a tokenizer.json that exists"),
    ):
        values = {"folder": folder} | change
        with pytest.raises(UserError, match=f"^{message}"):
            evaluate.evaluate(evaluate.EvaluateConfig(**values), print)  # pyright: ignore[reportArgumentType]
    assert evaluate.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: folder: must be a model with its weights")


def test_a_tokenizer_of_another_model(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, data, _ = model
    monkeypatch.setenv("ZIGZAG_CACHE", str(tmp_path / "cache"))
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    size = tokenizer.get_vocab_size()
    tokenizer.add_tokens(["<more>"])
    tokenizer.save(str(tmp_path / "more.json"))
    config = evaluate.EvaluateConfig(folder, data=data, tokenizer=tmp_path / "more.json")
    with pytest.raises(UserError, match=rf"^tokenizer: must have at most the model's {size} tokens, got {size + 1}$"):
        evaluate.evaluate(config, print)


def test_what_is_found_out_late(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, data, _ = model
    monkeypatch.setenv("ZIGZAG_CACHE", str(tmp_path / "cache"))
    other = shutil.copytree(folder, tmp_path / "other")
    sizes = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(sizes | {"num_hidden_layers": sizes["num_hidden_layers"] + 1}))
    with pytest.raises(UserError, match=r"^folder: must hold the weights of its config \(.*\), got .*other$"):
        evaluate.evaluate(evaluate.EvaluateConfig(other, data=data), print)
    nothing = {name: np.full((1, 8), -1) for name in ("tokens", "labels", "positions", "losses")}
    monkeypatch.setattr(evaluate, "_losses", lambda *_: iter([nothing]))
    with pytest.raises(UserError, match=r"^data: must hold a token to predict in its part held-out, got "):
        evaluate.evaluate(evaluate.EvaluateConfig(folder, data=data, part="held-out"), print)
    (tmp_path / "x.npz").mkdir()
    with pytest.raises(UserError, match=r"^out: must be a file that can be written \(Is a directory\), got .*x\.npz$"):
        evaluate._write(tmp_path / "x.npz", nothing)


def test_storage_that_is_away_is_no_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def away(*arguments: object, **options: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(evaluate, "open_source", away)
    assert evaluate.main([str(tmp_path)]) == 70
    assert capsys.readouterr().err == f"error: {tmp_path}: storage does not answer (Stale file handle)\n"
    monkeypatch.setattr(np, "savez", away)
    with pytest.raises(MachineError, match="storage does not answer"):
        evaluate._write(tmp_path / "x.npz", {})


def test_generate_prints_the_prompt_and_what_follows(model, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, _, _ = model
    (tmp_path / "prompt.txt").write_text("Line 3: a ring")
    flags = ["--prompt-file", str(tmp_path / "prompt.txt"), "--tokens", "9", "--cp", "2", "--dtype", "float32"]
    assert generate.main([str(folder), *flags]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Line 3: a ring")
    assert printed.endswith(" tokens given, 9 written]\n")
    for flags, message in (
        ([str(tmp_path), "--prompt", "x"], "error: a model's folder must hold model*.safetensors"),
        ([str(folder), "--prompt", ""], "error: prompt: must hold a token, got ''"),
        ([str(folder), "--prompt", "x", "--tokens", "0"], "error: tokens: must be >= 1, got 0"),
        ([str(folder), "--prompt", "x", "--top-p", "0"], "error: top-p: must be > 0 and <= 1, got 0.0"),
        ([str(folder), "--prompt", "x", "--temperature", "-1"], "error: temperature: must be >= 0, got -1.0"),
        ([str(folder), "--prompt", "x", "--tokenizer", "no"], "error: tokenizer: must be a tokenizer.json that exists"),
        ([str(folder), "--prompt", "x", "--tokenizer", str(folder / "config.json")], "error: tokenizer: must be a"),
    ):
        assert generate.main(flags) == 2
        assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize(
    ("config", "generation", "want"),
    [
        ({}, None, []),
        ({"eos_token_id": 7}, None, [7]),
        ({"eos_token_id": None}, {"eos_token_id": 8}, [8]),
        ({"eos_token_id": 7}, {"eos_token_id": [8, 7]}, [7, 8]),
        ({"eos_token_id": [7, 9]}, {"temperature": 0.6}, [7, 9]),
    ],
)
def test_a_text_ends_where_either_config_says(config, generation, want, tmp_path: Path):
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert generate._ends(config, tmp_path) == want


def test_ends_that_are_no_tokens(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^eos_token_id must be a number or a list of numbers, got 'x'$"):
        generate._ends({"eos_token_id": [7, "x"]}, tmp_path)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"must be a JSON object, got .*generation_config\.json$"):
        generate._ends({}, tmp_path)


def test_the_text_ends_at_the_turns_end(model, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """What the model writes first is called an end in generation_config.json alone: it writes one token."""
    folder, _, merged = model
    other = shutil.copytree(folder, tmp_path / "other")
    ids = jnp.asarray([read_tokenizer(folder / "tokenizer.json").encode("Line 3").ids], jnp.int32)
    hidden, _ = merged(ids, jnp.arange(ids.shape[1], dtype=jnp.int32)[None])
    first = int(merged.logits(hidden)[0, -1].argmax())
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [first]}))
    assert generate.main([str(other), "--prompt", "Line 3", "--tokens", "9", "--dtype", "float32"]) == 0
    assert capsys.readouterr().out.endswith(f"[{ids.shape[1]} tokens given, 1 written]\n")


@pytest.mark.parametrize("name", ["JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_generate_refuses_to_be_several_processes(
    model, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv(name, "2")
    assert generate.main([str(model[0]), "--prompt", "x"]) == 2
    rule = "must be 1 or not set, this command runs in one process"
    assert capsys.readouterr().err == f"error: {name}: {rule}, got 2\n"


def test_characters_of_several_tokens_are_printed_when_they_are_whole(capsys: pytest.CaptureFixture[str]):
    tokenizer = train_tokenizer(TEXT, characters=sum(map(len, TEXT)), vocab_size=300)
    text, shown = "a é 中文 \U0001f600 b", []
    for token in tokenizer.encode(text).ids:
        generate._tell(tokenizer, shown, np.array([token]))
    assert capsys.readouterr().out == text


def test_a_text_begins_with_what_the_tokenizer_is_configured_for(tmp_path: Path):
    tokenizer = train_tokenizer(TEXT, characters=sum(map(len, TEXT)), vocab_size=300)
    assert generate._begin(tmp_path, tokenizer) == []
    for token, add, want in (
        ("<|endoftext|>", True, [0]),
        ({"content": "<|endoftext|>"}, True, [0]),
        ("<|endoftext|>", False, []),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": add, "bos_token": token}))
        assert generate._begin(tmp_path, tokenizer) == want
