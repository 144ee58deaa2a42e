"""The README's example runs as printed, and the layout it draws is the one the library uses."""

import re
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from zigzag_jax.layout import picture

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_the_example_runs_as_printed(tmp_path: Path):
    (code,) = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    (tmp_path / "example.py").write_text(code)
    names = runpy.run_path(str(tmp_path / "example.py"))
    q, k, v = names["q"], names["k"], names["v"]

    def dense(q, k, v):
        k, v = (jax.numpy.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
        s = jax.numpy.einsum("bqhd,bkhd->bhqk", q, k, precision="highest") * q.shape[3] ** -0.5
        s = jax.numpy.where(np.tri(s.shape[-1], dtype=bool)[None, None], s, -jax.numpy.inf)
        out = jax.numpy.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s, axis=-1), v, precision="highest")
        return jax.numpy.sum(out**2)

    value, dq = jax.jit(jax.value_and_grad(dense))(q, k, v)
    assert np.isclose(names["value"], value, rtol=1e-5)
    assert np.linalg.norm(names["dq"] - dq) <= 1e-5 * np.linalg.norm(dq)


def test_the_picture_is_the_layout():
    assert picture(cp=4) in README.read_text()


@pytest.mark.source
def test_the_library_is_as_long_as_it_says():
    assert "layout, ranges, ring and attention are a thousand lines" in README.read_text()
    files = [README.parent / "zigzag_jax" / f"{name}.py" for name in ("layout", "ranges", "hops", "ring", "attention")]
    assert 900 < sum(len(file.read_text().splitlines()) for file in files) < 1100


@pytest.mark.source
def test_every_file_it_names_is_there():
    for name in re.findall(r"\]\(([^)#:]+)\)|`((?:zigzag_jax|docs|examples)/[\w/.]+)`", README.read_text()):
        assert (README.parent / (name[0] or name[1])).exists(), name
