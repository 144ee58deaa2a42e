"""--data of trainer and evaluation: text, a folder of tokens, or a mixture of such folders.

    nothing, text files      tokenised into the cache, found again        zigzag_jax.train.data.store
    a folder of tokens       opened                                       zigzag_jax.train.data.dataset
    mix.json                 {"sources": [{"path": "A", "weight": 0.7}, {"path": "B", "weight": 0.3}]}

The sources of a mixture are folders of tokens made with the same tokenizer; paths are seen from where mix.json lies.
Weights are shares of the tokens and need not add up to 1.
"""

import json
from pathlib import Path
from typing import Any

from zigzag_jax.train.data.dataset import Dataset, is_dataset, read_dataset, read_meta, unfinished
from zigzag_jax.train.data.digest import text_digest
from zigzag_jax.train.data.mixture import MixedStore
from zigzag_jax.train.data.store import Say, Working, open_dataset
from zigzag_jax.train.data.token_file import Tokens, TokenStore
from zigzag_jax.train.data.tokenizer import load_tokenizer, same_ids
from zigzag_jax.train.errors import UserError, may_come_back, refusal

_LARGEST = 1e300  # so that the sum of all weights is finite
_EXAMPLE = '{"sources": [{"path": "FOLDER", "weight": 0.7}, ..]}'


def open_data(
    data: Path | None,
    tokenizer: Path | None,
    *,
    process_index: int = 0,
    say: Say = lambda text: None,
    working: Working = lambda: None,
    wait_s: float = 3000.0,
) -> Dataset[Tokens]:
    """Find, open or build the tokens of `data`.

    `tokenizer` may be given beside tokens, and must then be the one that they were made with; the rest is for text, as
    `open_dataset` takes it. Raises UserError: "data"
    and "tokenizer" for what is not there, damaged, or does not go together, and what `open_dataset` raises.
    """
    path = None if data is None else data.expanduser()
    if path is not None and path.is_file() and path.suffix == ".json":
        return _open_mixture(path, tokenizer)
    if path is not None and is_dataset(path):
        return _open_folder(path, tokenizer)
    if path is not None and not path.exists() and unfinished(path.absolute()).exists():
        rule = "must be tokenised to its end (the same command of zigzag_jax.train.tokenize again goes on)"
        raise UserError("data", rule, path)
    return open_dataset(path, tokenizer, process_index=process_index, say=say, working=working, wait_s=wait_s)


def tokens_digest(data: Path | None) -> str:
    """What decides which tokens `data` gives, where it names tokens: cheap, and the same on hosts that see the same.

    Text is left out: all processes find its tokens in one cache, under its digest.
    """
    path = None if data is None else data.expanduser()
    if path is not None and path.is_file() and path.suffix == ".json":
        return f"{data} (digest {_mixed([(_digest(folder), weight) for folder, weight in _read_mixture(path)])[:12]})"
    if path is not None and is_dataset(path):
        return f"{data} (digest {_digest(path)[:12]})"
    return str(data)


def _digest(folder: Path) -> str:
    """What meta.json says; of a damaged folder, which is opened and refused later, the reason.

    MachineError where storage does not answer: the reason of one host would be taken for other data than the others'.
    """
    try:
        return str(read_meta(folder).get("digest"))
    except (OSError, ValueError) as error:
        if may_come_back(error):
            raise refusal(error, "data", "must be there", folder) from None
        return str(error)


def _mixed(sources: list[tuple[str, float]]) -> str:
    """Digest of a mixture of (digest, weight)."""
    return text_digest(json.dumps(sources))


def _open_folder(path: Path, tokenizer: Path | None) -> Dataset[TokenStore]:
    found = read_dataset(path, field="data", remedy="tokenise the text again")
    if tokenizer is not None and same_ids(load_tokenizer(tokenizer)) != same_ids(found.tokenizer):
        raise UserError("tokenizer", f"must be the one that {path} was tokenised with, its tokenizer.json", tokenizer)
    return found


def _open_mixture(file: Path, tokenizer: Path | None) -> Dataset[Tokens]:
    wanted = _read_mixture(file)
    for path, _ in wanted:
        if not is_dataset(path):
            rule = f"each source of {file} must be a folder of tokens, made by zigzag_jax.train.tokenize"
            raise UserError("data", rule, path)
    first, *others = sources = [_open_folder(path, tokenizer) for path, _ in wanted]
    for other in others:
        if same_ids(other.tokenizer) != same_ids(first.tokenizer):
            rule = f"the sources of {file} must have one tokenizer, that of {first.folder}"
            raise UserError("data", rule, f"another in {other.folder}")
    weights, names = tuple(weight for _, weight in wanted), tuple(str(path) for path, _ in wanted)
    return Dataset(
        train=MixedStore(tuple(source.train for source in sources), weights, names),
        held_out=MixedStore(tuple(source.held_out for source in sources), weights, names),
        tokenizer=first.tokenizer,
        vocab_size=first.vocab_size,
        end_of_document=first.end_of_document,
        digest=_mixed([(source.digest, weight) for source, weight in zip(sources, weights, strict=True)]),
        folder=first.folder,
    )


def _read_mixture(file: Path) -> list[tuple[Path, float]]:
    """(folder, weight) of each source."""
    try:
        sources = json.loads(file.read_text("utf-8"))["sources"]
        found = [(_folder(file, source), source["weight"]) for source in sources]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise refusal(error, "data", f"a .json file must be a mixture, {_EXAMPLE} ({what})", file) from None
    if not found:
        raise UserError("data", "a mixture must have a source", file)
    for path, weight in found:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < _LARGEST:
            raise UserError("data", f"the weight of {path} in {file} must be a positive number", weight)
    if len({path.resolve() for path, _ in found}) < len(found):
        raise UserError("data", "each source of a mixture must be named once", file)
    return found


def _folder(file: Path, source: Any) -> Path:
    if unknown := source.keys() - {"path", "weight"}:
        raise ValueError(f"a source has no {', '.join(sorted(unknown))}")
    return file.parent / Path(source["path"]).expanduser()
