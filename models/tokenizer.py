"""A model's tokenizer.json, read so that a text becomes all of its tokens and no other."""

from pathlib import Path

from tokenizers import Tokenizer

from zigzag_jax.models.errors import UserError


def read_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or of the folder that holds one.

    Raises UserError("tokenizer", ...): no such file, or not a tokenizer.
    """
    file = Path(path).expanduser()
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise UserError("tokenizer", "must be a tokenizer.json that exists", file)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception for whatever is wrong with the file
        raise UserError("tokenizer", f"must be a tokenizer.json ({error})", file) from None
    tokenizer.no_truncation()  # the file may carry a maximum length or padding, which texts here do not have
    tokenizer.no_padding()
    return tokenizer


__all__ = ["read_tokenizer"]
