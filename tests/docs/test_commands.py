"""The command lines of the README and the pages would be taken: programs that are there, with flags that they have."""

import re
import shlex

import pytest
import tyro
from pages import ROOT, TEXTS, relative

from zigzag_jax.train.config import Config
from zigzag_jax.train.evaluate import EvaluateConfig
from zigzag_jax.train.launch import LaunchConfig, split
from zigzag_jax.train.plan import PlanConfig
from zigzag_jax.train.tokenize import TokenizeConfig

pytestmark = pytest.mark.source
PARSED = {
    "zigzag_jax.train": Config,
    "zigzag_jax.train.evaluate": EvaluateConfig,
    "zigzag_jax.train.plan": PlanConfig,
    "zigzag_jax.train.tokenize": TokenizeConfig,
}
# on lines of their own, after any NAME=VALUE
COMMAND = re.compile(r"^ *(?:[A-Z]\w*=\S+ +)*((?:\S*/)?python (?:[^\n\\]|\\\n)*)", re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """The words after `python` of every command line."""
    lines = (re.sub(r"(\\\n|[][|]|\.\.\.|\s#.*)", " ", line) for line in COMMAND.findall(text))  # options, remarks
    return [shlex.split(line)[1:] for line in lines]


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
    elif program == "pytest":
        missing = [word for word in rest if word.startswith("tests/") and not (ROOT / word.split("::")[0]).exists()]
        assert not missing, f"there is no {missing}"
    elif program.startswith(("examples/", "docs/", "zigzag_jax.")):
        path = ROOT / (program if "/" in program else program.replace(".", "/"))
        folder = path if path.is_dir() else path.parent  # a benchmark's flags stand in a file beside it
        assert path.is_dir() or path.with_suffix(".py").is_file(), program
        known = "".join(file.read_text() for file in folder.glob("*.py")).replace("_", "-")
        unknown = [w for w in rest if w.startswith("--") and not re.search(rf"\b{w[2:].split('=')[0]}\b", known)]
        assert not unknown, f"{program} has no {unknown}"


def test_every_command_would_be_taken():
    found = [(relative(page), words) for page in TEXTS for words in commands(page.read_text())]
    assert len(found) > 40
    for page, words in found:
        try:
            check(words)
        except SystemExit:
            pytest.fail(f"{page}: {' '.join(words)}")


def test_a_flag_that_is_not_there_is_noticed():
    with pytest.raises(SystemExit):
        check(["-m", "zigzag_jax.train", "--context", "4"])
    with pytest.raises(SystemExit):
        check(["-m", "zigzag_jax.train.plan", "--cards", "4"])
    with pytest.raises(AssertionError, match="there is no"):
        check(["-m", "pytest", "tests/test_nothing.py"])
    with pytest.raises(AssertionError, match="has no"):
        check(["examples/balance.py", "--no-such-flag"])


def test_commands_are_found_after_settings_and_over_several_lines():
    text = "prose python -m nothing\n    JAX_PLATFORMS=cpu A=--x=1 .venv/bin/python a.py \\\n  --flag [4]  # so\n"
    assert commands(text) == [["a.py", "--flag", "4"]]
