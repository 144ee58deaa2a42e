"""A Config as the flags of the command line that makes it."""

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

from zigzag_jax.train.config import Config


def flags_of(config: Config) -> dict[str, Any]:
    """All values by the names of their flags, `mesh.cp` and so on."""
    return _flat(dataclasses.asdict(config), "")


def command_line(config: Config) -> str:
    """The trainer's command for this Config, as a shell takes it: the flags that differ from the default.

    >>> command_line(Config(seq_len=4096, random_init=True))
    'python -m zigzag_jax.train --random-init --seq-len 4096'
    """
    given, words = flags_of(config), ["python", "-m", "zigzag_jax.train"]
    for name, default in flags_of(Config()).items():
        value = given[name]
        if value == default:
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        flag = prefix + name.replace("_", "-")
        found |= _flat(value, f"{flag}.") if isinstance(value, dict) else {flag: value}
    return found
