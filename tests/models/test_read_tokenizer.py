"""A tokenizer.json as models read it: a text becomes all of its tokens; special tokens stay special in a prompt."""

import pytest
from tokenizers import AddedToken, Tokenizer, models

from zigzag_jax.models.errors import UserError
from zigzag_jax.models.tokenizer import read_tokenizer


@pytest.fixture
def folder(tmp_path):
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "<": 2, ">": 3}, []))
    tokenizer.add_special_tokens([AddedToken("<b>", special=True)])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_a_file_or_its_folder_without_cutting_or_padding(folder):
    for path in (folder, folder / "tokenizer.json", str(folder)):
        assert read_tokenizer(path).encode("ab<b>aaa").ids == [0, 1, 4, 0, 0, 0]


@pytest.mark.parametrize(("content", "rule"), [(None, "that exists"), ("{not json", r"\(.+\)")])
def test_what_is_no_tokenizer_is_named(tmp_path, content, rule):
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=rf"^tokenizer: must be a tokenizer\.json {rule}, got .*tokenizer\.json$"):
        read_tokenizer(file)
