"""Where a checkpoint comes from: the command, the code, and the commit of a checkout."""

import subprocess
from pathlib import Path

from zigzag_jax.train.config import Config
from zigzag_jax.train.origin import origin, revision


def test_a_commit_and_whether_files_were_changed_since(tmp_path: Path):
    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", "-C", str(tmp_path), *who, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "a.py").write_text("1\n")
    git("add", "a.py")
    git("commit", "-qm", "a")
    git("tag", "-am", "a tag is no revision", "v1")
    commit = git("rev-parse", "HEAD")
    assert len(commit) == 40
    assert revision(tmp_path) == commit
    (tmp_path / "a.py").write_text("2\n")
    assert revision(tmp_path) == f"{commit}-dirty"
    (tmp_path / "inside").mkdir()
    assert revision(tmp_path / "inside") is None  # a package that is installed below somebody else's checkout


def test_what_a_person_may_want_to_know():
    found = origin(Config(seq_len=64))
    assert found["command"] == "python -m zigzag_jax.train --seq-len 64"
    assert found["seq-len"] == "64"
    assert found["code of zigzag_jax"]
