"""`python -m zigzag_jax.train.tokenize --data PATH --out DIR`: text to tokens, once, by all cores.

DIR then goes to the trainer as --data, which reads, hashes and tokenises no text at its start. --data may be given
several times: one corpus, in the order given.

The work lies in DIR.unfinished until DIR is whole. Kill it whenever you like: the same command again goes on with the
shards that are missing (data/shards.py), and DIR is byte for byte what an undisturbed run, with any number of
--workers, would have made. What the work was begun with stands in its plan.json; other flags are refused. A file that
was mended since is read again, and shards without it are kept, unless a tokenizer trained on the text is another now.
"""

import contextlib
import functools
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from zigzag_jax.train.data.corpus import files
from zigzag_jax.train.data.dataset import FORMAT, META, TOKENIZER, is_dataset, read_meta, unfinished, write_whole
from zigzag_jax.train.data.digest import text_digest
from zigzag_jax.train.data.formats import TEXT_FIELD, Piece, read
from zigzag_jax.train.data.shards import SHARD, Shard, ShardWriter, Stats, changed, clean, cut, join, stats_of
from zigzag_jax.train.data.split import ends_held_out, parts, survey
from zigzag_jax.train.data.tokenizer import id_count, load_tokenizer, same_ids, train_tokenizer
from zigzag_jax.train.data.workers import run_tasks
from zigzag_jax.train.errors import DONE, INTERRUPTED, RunError, UserError, exit_code, may_come_back, refusal
from zigzag_jax.train.lock import locked
from zigzag_jax.train.logs.display import TokenDisplay

_PLAN = "plan.json"
_GOES_ON = "the same command again goes on"

Say = Callable[[str], None]


@dataclass(frozen=True)
class TokenizeConfig:
    """Tokenise text into a folder that the trainer takes as --data."""

    data: tyro.conf.UseAppendAction[tuple[Path, ...]]
    """A file or folder: text, .jsonl, .jsonl.gz, .parquet; once or several times."""
    out: Path
    """The new folder."""
    tokenizer: Path | None = None
    """A tokenizer.json or a folder that holds one; default: a byte-level BPE trained on the text."""
    vocab_size: int | None = None
    """Tokens of the one to train; default 1024."""
    text_field: str = TEXT_FIELD
    """The key of JSONL objects, the column of parquet files."""
    workers: int | None = None
    """Processes; default: one for each core that this one may use."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    config = tyro.cli(TokenizeConfig, args=arguments, prog="python -m zigzag_jax.train.tokenize")
    try:
        tokenize(config, Console(soft_wrap=True))
        return DONE
    except (UserError, RunError) as error:
        sys.stderr.write(f"error: {error}\n")
        return exit_code(error)
    except KeyboardInterrupt:
        sys.stderr.write(f"interrupted; {_GOES_ON}\n")
        return INTERRUPTED


def tokenize(config: TokenizeConfig, console: Console) -> None:
    """Make `config.out`, or go on with it. Raises UserError for what a person can mend, RunError for a lost worker."""
    say: Say = lambda text: console.print(text, highlight=False, markup=False)
    _check(config)
    found = _files(config)
    stats = stats_of(found)
    request = _request(config, stats)
    source = text_digest(json.dumps(request))
    out = config.out.expanduser().absolute()
    work = unfinished(out)

    def whole_already() -> bool:
        if made := _is_made(out, source):
            shutil.rmtree(work, ignore_errors=True)
            say(f"{out} is whole already")
        return made

    if whole_already():
        return
    try:
        with _alone(work, say):
            if whole_already():  # by another command, since the first look
                return
            ends, sizes = _begin(config, found, stats, request, work, say)
            how = [same_ids(load_tokenizer(work)), ends, config.text_field, FORMAT]
            shards = cut(found, stats, json.dumps(how), sizes)
            _work(config, shards, work, ends, console, say)
            if stats_of(_files(config)) != stats:
                raise UserError("data", f"must not change while it is read; {_GOES_ON}", "another size or date")
            meta = join(shards, work, work / "whole", source)
            os.rename(work / "whole", out)
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        rule = f"must be a folder with room to write in ({error.strerror or error}); then {_GOES_ON}"
        raise refusal(error, "out", rule, out) from None
    say(f"{out}: {meta['tokens']['train']:,} tokens to train on, {meta['tokens']['held_out']:,} held out")


def _check(config: TokenizeConfig) -> None:
    if config.workers is not None and config.workers < 1:
        raise UserError("workers", "must be >= 1", config.workers)
    if config.tokenizer is not None and config.vocab_size is not None:
        raise UserError("vocab-size", "must be left out where --tokenizer is given", config.vocab_size)
    out = config.out.expanduser().resolve()
    for path in config.data:
        if out.is_relative_to(path.expanduser().resolve()):
            raise UserError("out", f"must not lie in the data {path}", config.out)


def _files(config: TokenizeConfig) -> list[Path]:
    return [file for path in config.data for file in files(path.expanduser().absolute())]


def _request(config: TokenizeConfig, stats: Stats) -> dict[str, Any]:
    """All that decides the result, by the name of its flag."""
    given = None if config.tokenizer is None else same_ids(load_tokenizer(config.tokenizer))
    return {
        "data": [str(path.expanduser().absolute()) for path in config.data],
        "text-field": config.text_field,
        "tokenizer": given,
        "vocab-size": (1024 if config.vocab_size is None else config.vocab_size) if given is None else None,
        "files": text_digest(json.dumps(list(stats.items()))),
        "version": f"{FORMAT}, shards of {SHARD} by name",
    }


def _is_made(out: Path, source: str) -> bool:
    """Whether `out` is there and what was asked for. UserError where it is something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        if read_meta(out).get("source") == source:
            return True
    except (OSError, ValueError) as error:
        if may_come_back(error):
            raise refusal(error, "out", "must be a folder that can be read", out) from None
    what = f"which holds the tokens of another request or of data that has changed since ({META})"
    raise UserError("out", "must be a new folder", f"{out}, {what if is_dataset(out) else 'which is not empty'}")


@contextlib.contextmanager
def _alone(work: Path, say: Say) -> Iterator[None]:
    """The work folder, with nobody else in it. The lock goes with the process, however that ends."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        if not locked(lock, say):
            raise UserError("out", "must be written by one command at a time", work)
        yield


def _begin(
    config: TokenizeConfig, found: list[Path], stats: Stats, request: dict[str, Any], work: Path, say: Say
) -> tuple[bool, dict[str, int]]:
    """Tokenizer and plan, made or found in the work folder: (whether ends are held out, the sizes to cut by)."""
    plan = json.loads((work / _PLAN).read_text()) if (work / _PLAN).exists() else {}
    for name, value in request.items():
        if plan and name != "files" and plan[name] != value:
            field = "out" if name == "version" else name
            raise UserError(field, f"must stay what {work} was begun with, {plan[name]} (or delete that)", value)
    if plan:
        say(f"going on with {work}{changed(plan['stats'], stats)}")
        if plan["files"] == request["files"]:
            return plan["ends"], plan["sizes"]
        write_whole(work / _PLAN, json.dumps(plan | {"files": None}))  # till the tokenizer is that of these files
    texts = lambda: itertools.chain.from_iterable(read(Piece(file), config.text_field) for file in found)
    if config.tokenizer is not None:
        tokenizer, ends = load_tokenizer(config.tokenizer), ends_held_out(texts())
    else:
        say("reading all text to train a tokenizer, in one process")
        whole = survey(texts())
        ends = whole.ends
        kept = (part for text in texts() for held_out, part in parts(text, ends) if not held_out)
        tokenizer = train_tokenizer(kept, characters=whole.characters, vocab_size=request["vocab-size"])
        say(f"trained a tokenizer of {id_count(tokenizer)} tokens")
    sizes = {file: size for file, (size, _) in stats.items()} | plan.get("sizes", {})
    write_whole(work / TOKENIZER, tokenizer.to_str(pretty=True))
    write_whole(work / _PLAN, json.dumps(request | {"ends": ends, "stats": stats, "sizes": sizes}, indent=1))
    return ends, sizes


def _work(config: TokenizeConfig, shards: list[Shard], work: Path, ends: bool, console: Console, say: Say) -> None:
    """Tokenise the shards that are missing."""
    clean(work, shards)
    missing = [shard for shard in shards if not shard.folder(work).is_dir()]
    if kept := len(shards) - len(missing):
        say(f"{kept} of {len(shards)} shards are kept")
    total, left = sum(shard.size for shard in shards), sum(shard.size for shard in missing)
    make = functools.partial(ShardWriter, work, config.text_field, ends)
    with TokenDisplay(total, total - left, console) as display:
        run_tasks(make, missing, config.workers or len(os.sched_getaffinity(0)), display.show)


if __name__ == "__main__":
    sys.exit(main())
