"""Safetensors as the safetensors library reads and writes them, shards and their index, and what a broken file says."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from zigzag_jax.models.hf import files

TENSORS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b.bias": np.linspace(-1, 1, 5).astype(np.float16),
    "c": np.zeros((0, 3), np.float32),
}


def specs(tensors):
    """Each tensor in two pieces, where it has rows for it."""
    pieces = lambda x: lambda: [x[:1], x[1:]]
    return [files.Tensor(name, x.dtype, x.shape, pieces(x)) for name, x in tensors.items()]


def test_it_reads_what_the_library_writes(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    folder = files.Folder(tmp_path)
    assert folder.keys() == TENSORS.keys()
    assert len(folder) == 3
    for name, want in TENSORS.items():
        assert folder[name].dtype == want.dtype
        np.testing.assert_array_equal(folder[name], want)
    assert isinstance(folder["a.weight"].base, np.memmap) or isinstance(folder["a.weight"], np.memmap)


def test_the_library_reads_what_it_writes(tmp_path):
    files.write(tmp_path, specs(TENSORS))
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    got = load_file(tmp_path / "model.safetensors")
    assert got.keys() == TENSORS.keys()
    for name, want in TENSORS.items():
        np.testing.assert_array_equal(got[name], want)


def test_shards_and_bfloat16_come_back_bit_for_bit(tmp_path):
    wrote: list[int] = []
    tensors = {f"w{i}": np.random.default_rng(i).standard_normal((7, 5)).astype(ml_dtypes.bfloat16) for i in range(5)}
    files.write(tmp_path, specs(tensors), most=150, wrote=wrote.append)
    assert sum(wrote) == 5 * 70
    names = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert names == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / f"model{files.INDEX}").read_text())
    assert index["metadata"]["total_size"] == 5 * 70
    assert index["weight_map"].keys() == tensors.keys()
    assert not list(tmp_path.glob("*.tmp"))
    folder = files.Folder(tmp_path)
    for name, want in tensors.items():
        assert folder[name].dtype == want.dtype
        assert folder[name].tobytes() == want.tobytes()
    (tmp_path / names[1]).unlink()
    (tmp_path / names[2]).unlink()
    rule = r"^a saved model must hold all tensors of model.safetensors.index.json"
    with pytest.raises(ValueError, match=rf"{rule}, got 3 missing \(of {names[1]}, {names[2]}\): w2, w3, w4$"):
        files.Folder(tmp_path)


def test_a_long_list_is_told_by_its_beginning():
    names = [f"w{i}" for i in range(25)]
    assert files.listed(names[:20]) == ", ".join(names[:20])
    assert files.listed(names) == ", ".join(names[:20]) + " and 5 more"


def test_what_is_no_saved_model(tmp_path):
    with pytest.raises(ValueError, match=r"a saved model must hold model\*.safetensors, got the folder .* without any"):
        files.Folder(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"a safetensors file must hold the bytes of .*, got .* cut short"):
        files.Folder(tmp_path)
    file.write_bytes(whole[:20])
    with pytest.raises(ValueError, match="must hold its header of"):
        files.Folder(tmp_path)
    file.write_bytes((2).to_bytes(8, "little") + b"[]")
    with pytest.raises(ValueError, match=r"a safetensors file must have a header as the format says .*, got .*model"):
        files.Folder(tmp_path)
    save_file(TENSORS, file)
    (tmp_path / f"model{files.INDEX}").write_text("{}")
    with pytest.raises(ValueError, match=r"an index must be JSON with a weight_map .*, got .*index.json"):
        files.Folder(tmp_path)
    (tmp_path / f"model{files.INDEX}").unlink()
    save_file({"x": np.zeros(3, np.int32)}, file)
    with pytest.raises(ValueError, match="weights must be of F64, F32, F16, BF16, got x of I32"):
        files.Folder(tmp_path)
    with pytest.raises(ValueError, match=r"weights must be of .*, got x of int32"):
        files.write(tmp_path / "out", specs({"x": np.zeros(3, np.int32)}))
    save_file(TENSORS, file)
    save_file(TENSORS, tmp_path / "model-2.safetensors")
    with pytest.raises(ValueError, match=r"a tensor must be in one file, got .* in .* and another"):
        files.Folder(tmp_path)
