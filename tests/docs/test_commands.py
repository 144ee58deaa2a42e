"""The command lines of the README and the pages would be taken: programs that are there, with flags that they have."""

import re
import shlex

import pytest
import tyro
from pages import ROOT, TEXTS, relative

from zigzag_jax.train.config import Config
from zigzag_jax.train.evaluate import EvaluateConfig
from zigzag_jax.train.launch import LaunchConfig, split

pytestmark = pytest.mark.source
PARSED = {"zigzag_jax.train": Config, "zigzag_jax.train.evaluate": EvaluateConfig}
COMMAND = re.compile(r"^ *((?:\S*/)?python (?:[^\n\\]|\\\n)*)", re.MULTILINE)  # on lines of their own


def commands() -> list[tuple[str, list[str]]]:
    """(page, the words after `python`) of every command line."""
    found = []
    for page in TEXTS:
        for line in COMMAND.findall(page.read_text()):
            line = re.sub(r"(\\\n|[][|]|\.\.\.|\s#.*)", " ", line)  # what may be left out, and remarks
            found.append((relative(page), shlex.split(line)[1:]))
    return found


def check(words: list[str]) -> None:
    """SystemExit or AssertionError where the command would not be taken."""
    program, rest = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
    if program == "zigzag_jax.train.launch":
        own, rest = split(rest)
        tyro.cli(LaunchConfig, args=["1" if word == "N" else word for word in own])
        program = "zigzag_jax.train"
    if program in PARSED:
        number = {"N": "1", "I": "0"}
        tyro.cli(PARSED[program], args=[number.get(word, word) for word in rest if word != "FLAGS"])
    elif program.startswith(("examples/", "docs/", "zigzag_jax.")):
        path = ROOT / (program if "/" in program else program.replace(".", "/"))
        folder = path if path.is_dir() else path.parent  # a benchmark's flags stand in a file beside it
        assert path.is_dir() or path.with_suffix(".py").is_file(), program
        known = "".join(file.read_text() for file in folder.glob("*.py")).replace("_", "-")
        unknown = [w for w in rest if w.startswith("--") and not re.search(rf"\b{w[2:].split('=')[0]}\b", known)]
        assert not unknown, f"{program} has no {unknown}"


def test_every_command_would_be_taken():
    found = commands()
    assert len(found) > 30
    for page, words in found:
        try:
            check(words)
        except SystemExit:
            pytest.fail(f"{page}: {' '.join(words)}")


def test_a_flag_that_is_not_there_is_noticed():
    with pytest.raises(SystemExit):
        check(["-m", "zigzag_jax.train", "--context", "4"])
    with pytest.raises(AssertionError, match="has no"):
        check(["examples/balance.py", "--no-such-flag"])
