"""A plan of rows, kept in the cache: packing a hundred million pieces takes minutes, opening them a second or two.

    $ZIGZAG_CACHE / plans / KEY.plan

      512 bytes     JSON: format, key, pieces P, rows R, digest of all that follows
      int64         starts [P]   sizes [P]   columns [P]   bounds [R + 1]
      bool          ends [P]

KEY is a digest of all that decides a plan: the lengths of the documents, seq_len, the seed and the rule of packing. The
file is written under a temporary name and renamed when it is whole, so processes that pack at the same time, or on
hosts with a cache each, do no harm. It is mapped into memory: the processes of a host share one copy. Its digest is
looked at each time, since a row that points at the wrong tokens would train in silence; a file that is damaged, or
something else, is packed and written again.
"""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from zigzag_jax.train.data.digest import text_digest
from zigzag_jax.train.data.packing import RULE, Plan, make_plan
from zigzag_jax.train.data.store import cache_folder

_FORMAT = "zigzag_jax plan 1"  # another layout of the file gets another number
_FOLDER = "plans"
_HEAD = 512  # bytes, a multiple of 8
_ABANDONED = 3600.0  # seconds after which what is not whole counts as a killed process's
_INT64 = ("starts", "sizes", "columns", "bounds")


def kept_plan(lengths: np.ndarray, seq_len: int, *, seed: int, say: Callable[[str], None] = lambda text: None) -> Plan:
    """`make_plan(lengths, seq_len, seed=seed)`, found in the cache or made and kept there; raises what that raises.

    `say` gets a line where the file is damaged, or cannot be written: then the next start packs again.
    """
    lengths = np.ascontiguousarray(lengths, np.int64)
    content = hashlib.blake2b(lengths, digest_size=16).hexdigest()
    key = text_digest(json.dumps([_FORMAT, sys.byteorder, RULE, content, seq_len, seed]))
    file, damaged = cache_folder() / _FOLDER / f"{key}.plan", False
    try:
        return _read(file, key, seq_len, seed)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        damaged = not isinstance(error, OSError)  # else it may be whole, and mapped by another process
        say(f"the plan of rows {file} cannot be used ({error}): it is made again")
    plan = make_plan(lengths, seq_len, seed=seed)
    try:
        _write(file, key, plan, damaged)
    except OSError as error:
        say(f"the plan of rows cannot be kept in {file.parent} ({error.strerror}): the next start makes it again")
    return plan


def _read(file: Path, key: str, seq_len: int, seed: int) -> Plan:
    """Map a file. OSError, ValueError, KeyError or TypeError where it is not there or not what it should be."""
    raw = np.memmap(file, np.uint8, "r").view(np.ndarray)
    about: dict[str, Any] = json.loads(raw[:_HEAD].tobytes())
    if about["key"] != key:
        raise ValueError("it is another plan")
    pieces, rows = about["pieces"], about["rows"]
    sizes: dict[str, int] = {name: 8 * pieces for name in _INT64} | {"bounds": 8 * (rows + 1), "ends": pieces}
    if len(raw) != _HEAD + sum(sizes.values()):
        raise ValueError(f"it has {len(raw)} bytes")
    if _digest([raw[_HEAD:]]) != about["digest"]:
        raise ValueError("its digest is another")
    *starts, _ = np.cumsum([_HEAD, *sizes.values()]).tolist()
    parts = {name: raw[at : at + size] for at, (name, size) in zip(starts, sizes.items(), strict=True)}
    arrays = {name: part.view(np.bool_ if name == "ends" else np.int64) for name, part in parts.items()}
    return Plan(seq_len=seq_len, seed=seed, **arrays)


def _write(file: Path, key: str, plan: Plan, over: bool) -> None:
    """Write a file that is there whole or not at all, `over` a damaged one. OSError where it cannot be."""
    arrays = [*(np.ascontiguousarray(getattr(plan, name), np.int64) for name in _INT64), plan.ends]
    about = {"format": _FORMAT, "key": key, "pieces": len(plan.sizes), "rows": plan.rows, "digest": _digest(arrays)}
    file.parent.mkdir(parents=True, exist_ok=True)
    for old in file.parent.glob(f".{key}-*"):
        with contextlib.suppress(FileNotFoundError):  # its process finished between the two looks
            if time.time() - old.stat().st_mtime > _ABANDONED:
                old.unlink()
    number, name = tempfile.mkstemp(prefix=f".{key}-", dir=file.parent)
    try:
        with os.fdopen(number, "wb") as out:
            out.write(json.dumps(about).encode().ljust(_HEAD))
            for array in arrays:
                out.write(array.data)
            out.flush()
            os.fsync(out.fileno())
        _place(Path(name), file, over)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name)


def _place(new: Path, file: Path, over: bool) -> None:
    """Give a file its name. Not over one that is whole: another process may have mapped it, and NFS does not keep what
    is replaced for those who read it.
    """
    try:
        if not over:
            os.link(new, file)
    except FileExistsError:
        return  # another process was first
    except OSError:  # a file system without links
        over = not file.exists()
    if over:
        os.replace(new, file)


def _digest(arrays: list[np.ndarray]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for array in arrays:
        found.update(array.data)
    return found.hexdigest()
