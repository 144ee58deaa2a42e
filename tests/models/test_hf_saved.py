"""Import and export: bit for bit there and back, nothing half-written, and errors that lose nothing."""

import errno
import json
import os
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from model_helpers import GOLDEN, TINY, drawn, flat, jit, maker, sharding
from safetensors.numpy import load_file, save_file

from zigzag_jax.models import generate
from zigzag_jax.models.hf import __main__ as command_line
from zigzag_jax.models.hf import convert, files, saved
from zigzag_jax.models.hf.golden import compare, distances, read_golden
from zigzag_jax.models.presets import PRESETS
from zigzag_jax.models.registry import read_config
from zigzag_jax.models.sharding import abstract_state

LITE = GOLDEN / "deepseek_v2_lite"
MIXED = GOLDEN / "qwen3_moe_mixed"


def raw(folder, stem="model"):
    """{name: (dtype, shape, bytes)} of all files."""
    return {name: (str(x.dtype), x.shape, x.tobytes()) for name, x in files.Folder(folder, stem).items()}


def halved(source, folder):
    """A copy of a golden model with bfloat16 weights in several files, spelled as on the hub, with a tokenizer."""

    folder.mkdir()
    tensors = {name: x.astype(ml_dtypes.bfloat16) for name, x in load_file(source / "model.safetensors").items()}
    specs = [files.Tensor(name, x.dtype, x.shape, lambda x=x: [x]) for name, x in tensors.items()]
    files.write(folder, specs, most=10_000)
    values = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"dtype": "bfloat16", "eos_token_id": 7}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.mark.parametrize("source", [LITE, MIXED], ids=lambda x: x.name)
def test_import_and_export_are_bit_for_bit(source, tmp_path):
    there, ours, back = halved(source, tmp_path / "hf"), tmp_path / "ours", tmp_path / "back"
    seen: list[tuple[int, int]] = []
    saved.import_model(there, ours, lambda *x: seen.append(x))
    total = sum(len(x[2]) for x in raw(there).values())
    assert seen[-1] == (total, total)
    saved.export_model(ours, back)
    assert raw(there) == raw(back)
    assert json.loads((there / "config.json").read_text()) == json.loads((back / "config.json").read_text())
    assert (back / "tokenizer.json").read_text() == "{}"
    assert sorted(x.name for x in tmp_path.iterdir()) == ["back", "hf", "ours"]


def test_export_rounds_where_told_to(tmp_path):
    saved.import_model(LITE, tmp_path / "ours")
    saved.export_model(tmp_path / "ours", tmp_path / "back", dtype="bfloat16")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    for name, (dtype, shape, _) in raw(tmp_path / "back").items():
        assert (dtype, shape) == ("bfloat16", raw(LITE)[name][1])


@pytest.mark.parametrize("source", [LITE, MIXED], ids=lambda x: x.name)
def test_both_folders_give_one_state_on_a_mesh(source, tmp_path):
    saved.import_model(source, tmp_path / "ours")
    config, where = read_config(source), sharding(fsdp=2, cp=2)
    shapes = abstract_state(maker(config, where))[1]
    one, other = (
        flat(saved.read_state(saved.open_source(folder), config, shapes, where))
        for folder in (source, tmp_path / "ours")
    )
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
    for folder in (source, tmp_path / "ours"):
        assert saved.has_weights(folder)
        saved.check_weights(saved.open_source(folder), config)
        with pytest.raises(ValueError, match="a saved model must"):
            saved.check_weights(saved.open_source(folder), PRESETS["tiny-qwen3-moe"])
    assert not saved.has_weights(tmp_path)


def test_the_separate_form_of_a_state_is_what_import_stacks():
    ours = convert.to_hf(drawn(TINY), TINY)
    stacked = {x.name: np.concatenate([p.reshape(-1) for p in x.pieces()]) for x in convert.stack(ours, TINY)}
    for name, value in flat(drawn(TINY)).items():
        np.testing.assert_array_equal(stacked[name], value.reshape(-1))


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_that_was_written_is_read_again(name):
    config = PRESETS[name]
    assert read_config(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize("folder", sorted(GOLDEN.iterdir()), ids=lambda x: x.name)
def test_a_config_of_transformers_is_written_and_read_again(folder):
    config = read_config(folder)
    assert read_config(json.loads(json.dumps(config.to_hf()))) == config


def test_what_cannot_be_imported_or_exported(tmp_path):
    with pytest.raises(ValueError, match=r"a model's folder must hold a config.json, got .*nowhere"):
        saved.import_model(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ValueError, match=r"a model's folder must hold model\*.safetensors, .* checkpoints, got .*now"):
        saved.export_model(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "checkpoints" / "3" / "state").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"a checkpoint must hold its model's config, got .*3 without config/metadata"):
        saved.export_model(tmp_path, tmp_path / "out")
    mixed = {name: x if "layers.0" in name else x.astype(np.float16) for name, x in files.Folder(MIXED).items()}
    # layers 0 and 2 of this model are alike in kind but not neighbours; both experts' matrices of one layer must agree
    one = "model.layers.2.mlp.experts.1.up_proj.weight"
    mixed[one] = mixed[one].astype(np.float32)
    with pytest.raises(ValueError, match=r"equal layers must have one dtype, got float16 and float32 for groups.*up"):
        convert.stack(mixed, read_config(MIXED))
    with pytest.raises(ValueError, match=r"the source must be an imported model, a run or a checkpoint, got Hugging"):
        saved.export_model(LITE, tmp_path / "out")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep me")
    for move in (saved.import_model, saved.export_model):
        with pytest.raises(ValueError, match=r"the output must be a new folder, or an empty one .*, got .*full"):
            move(LITE, full)
    assert (full / "mine.txt").read_text() == "keep me"
    assert not (tmp_path / "out").exists()


def test_a_head_that_copies_the_embedding(tmp_path):
    """Files of tied models may hold it; it is dropped. Another matrix is an error."""
    tensors = dict(files.Folder(MIXED).items())
    table = tensors["model.embed_tokens.weight"]
    names = {x.name for x in convert.stack(tensors | {"lm_head.weight": table}, read_config(MIXED))}
    assert names == {x.name for x in convert.stack(tensors, read_config(MIXED))}
    with pytest.raises(ValueError, match=r"lm_head.weight must equal model.embed_tokens.weight where tie_word_embed"):
        convert.stack(tensors | {"lm_head.weight": table + 1}, read_config(MIXED))


def test_the_output_may_be_a_link_to_an_empty_folder_and_neighbours_are_left_alone(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    (tmp_path / "there.partial").mkdir()
    (tmp_path / "there.partial" / "mine.txt").write_text("keep me")
    saved.import_model(LITE, tmp_path / "link")
    assert saved.has_weights(tmp_path / "there")
    assert (tmp_path / "there.partial" / "mine.txt").exists()
    assert sorted(x.name for x in tmp_path.iterdir()) == ["link", "there", "there.partial"]


class Counted(dict):
    """Tensors that say how much of them was read."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.read = 0

    def __getitem__(self, name):
        outer, x = self, super().__getitem__(name)

        class One:
            shape, dtype = x.shape, x.dtype

            def __getitem__(self, index):
                outer.read += x[index].nbytes
                return x[index]

        return One()


@pytest.mark.parametrize("mesh", [(1, 2, 2), (2, 1, 2)])
def test_every_value_is_read_once_for_all_devices_that_keep_it(mesh):
    tensors, config, where = Counted(files.Folder(LITE)), read_config(LITE), sharding(*mesh)
    shapes = abstract_state(maker(config, where))[1]
    state = convert.from_hf(tensors, config, shapes, where)
    assert tensors.read == sum(x.nbytes for x in files.Folder(LITE).values())
    kept = dict(nnx.to_flat_state(state))["head", "weight"].get_value()
    assert len(kept.addressable_shards) == len(kept.sharding.device_set) == 4


def test_a_failed_import_leaves_nothing(tmp_path):
    source = tmp_path / "hf"
    shutil.copytree(LITE, source)
    tensors = load_file(source / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"^a saved model must hold .*, got 1 missing: model\.norm\.weight$"):
        saved.import_model(source, tmp_path / "out")
    assert [x.name for x in tmp_path.iterdir()] == ["hf"]


def test_a_golden_file_that_is_none(tmp_path):
    golden = load_file(LITE / "golden.safetensors")
    file = tmp_path / "golden.safetensors"
    with pytest.raises(ValueError, match=r"golden: must be a safetensors file \(.*\), got "):
        read_golden(file)
    for change, message in (
        ({"logits": None}, r"must hold input_ids, logits and cotangent, got .* without \['logits'\]"),
        ({"cotangent": golden["cotangent"][:1]}, r"logits and cotangent \[B, S, vocab\], got \(2, 48\), \(2, 48, 96\)"),
        ({"positions": np.zeros(3, np.int32)}, r"positions must be \[B, S\] like input_ids \(2, 48\), got \(3,\)"),
    ):
        save_file({name: x for name, x in (golden | change).items() if x is not None}, file)
        with pytest.raises(ValueError, match=message):
            read_golden(file)
    save_file(golden | {"input_ids": golden["input_ids"] + 96}, file)
    with pytest.raises(ValueError, match=r"golden: must be of the model's 96 tokens, got ids 9\d .. 1\d\d and"):
        compare(LITE, file, 1, print)


def test_a_spoiled_golden_file_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jax, "jit", jit)
    golden = load_file(LITE / "golden.safetensors")
    name = "grad.model.layers.1.self_attn.kv_b_proj.weight"
    save_file(golden | {name: golden[name] * 1.0001}, tmp_path / "spoiled.safetensors")
    assert command_line.main(["check", str(LITE), "--golden", str(tmp_path / "spoiled.safetensors")]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("1 FAIL: model.layers.1.self_attn.kv_b_proj.weight")
    save_file(golden | {"grad.model.nothing": np.zeros(1, np.float32)}, tmp_path / "more.safetensors")
    assert command_line.main(["check", str(LITE), "--golden", str(tmp_path / "more.safetensors")]) == 2
    assert "golden: gradients must be of the model's tensors, got grad.model.nothing" in capsys.readouterr().err
    save_file({name: x for name, x in golden.items() if "grad" not in name}, tmp_path / "none.safetensors")
    assert command_line.main(["check", str(LITE), "--golden", str(tmp_path / "none.safetensors")]) == 2
    assert "golden: must hold gradients (grad.NAME), got" in capsys.readouterr().err


def test_gradients_that_are_zero():
    """Most tensors of a real model are experts that a short batch does not reach."""
    want = {"a": np.zeros(2), "b": np.zeros(2), "c": np.zeros(2), "d": np.ones(2)}
    got = want | {"b": np.array([0, 1e-9]), "d": np.array([1, 1.1])}
    found = distances(got, want)
    assert (found["a"], found["b"], found["c"]) == (0, np.inf, 0)
    np.testing.assert_allclose(found["d"], 0.1 / 2**0.5)


@pytest.fixture(autouse=True)
def running_devices(monkeypatch):
    """The devices of this process are chosen already."""
    monkeypatch.setattr("zigzag_jax.models.devices.on_cpu", lambda: False)


def test_mistakes_are_one_line(tmp_path, capsys):
    for arguments, message in (
        (["import", str(tmp_path), str(tmp_path / "out")], "error: a model's folder must hold a config.json"),
        (["export", str(tmp_path), str(tmp_path / "out")], "error: a model's folder must hold model*.safetensors"),
        (["check", str(LITE), "--golden", "none", "--cp", "0"], "error: cp: must be >= 1, got 0"),
        (["check", str(LITE), "--golden", "none", "--cp", "99"], "error: cp: must be at most the 8 devices there are"),
    ):
        assert command_line.main(arguments) == 2
        assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize("program", [command_line, generate])
def test_storage_that_is_away_is_no_mistake(tmp_path, capsys, monkeypatch, program):
    def away(*args: object, **options: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle", "w")

    for name in ("zigzag_jax.models.hf.__main__.import_model", "zigzag_jax.models.generate.open_source"):
        monkeypatch.setattr(name, away)
    arguments = {command_line: ["import", "a", "b"], generate: [str(tmp_path), "--prompt", "x"]}[program]
    assert program.main(arguments) == 70
    assert capsys.readouterr().err == "error: [Errno 116] Stale file handle: 'w'\n"


def test_a_golden_file_whose_storage_is_away(tmp_path, capsys, monkeypatch):
    def away(*args: object, **options: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("zigzag_jax.models.hf.golden.load_file", away)
    assert command_line.main(["check", str(LITE), "--golden", "x"]) == 70
    assert capsys.readouterr().err == "error: [Errno 5] Input/output error\n"


def test_the_command_line_on_five_devices_with_padding(tmp_path):
    golden = load_file(LITE / "golden.safetensors")
    flags = ["check", str(LITE), "--golden", str(LITE / "golden.safetensors"), "--cp", "5"]
    done = subprocess.run(
        [sys.executable, "-m", "zigzag_jax.models.hf", *flags],
        capture_output=True, text=True, check=False, timeout=300, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("the bar 1e-05: all within it")
    assert len(done.stdout.splitlines()) == 3 + sum(name.startswith("grad.") or name == "logits" for name in golden)
