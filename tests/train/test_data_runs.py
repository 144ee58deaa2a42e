"""Runs on folders of tokens and on a mixture: what is said, what is seen, and that a resumed run sees the same."""

import dataclasses
import functools
import json
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np
import pytest

from zigzag_jax.train import ending, loop
from zigzag_jax.train.config import Config, MeshConfig, OptimConfig
from zigzag_jax.train.data.dataset import finish, write_sides
from zigzag_jax.train.data.tokenizer import train_tokenizer
from zigzag_jax.train.errors import UserError
from zigzag_jax.train.mesh import make_mesh
from zigzag_jax.train.models import model_config
from zigzag_jax.train.setup import set_up

TEXTS = [f"Line {n}: a ring is a line that comes home after {n % 7} hops.\n" * (1 + n % 5) for n in range(90)]
CONFIG = Config(
    seq_len=32, batch=4, steps=3, save_every=2, seed=3, mesh=MeshConfig(cp=2),
    optim=OptimConfig(warmup=0, schedule="constant"),
)  # fmt: skip


@pytest.fixture(autouse=True)
def running_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The devices of this process are chosen already; compile time is what a run of few steps takes."""
    monkeypatch.setenv("ZIGZAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("zigzag_jax.train.mesh.on_cpu", lambda: True)
    monkeypatch.setattr(loop, "start_devices", lambda config: None)
    monkeypatch.setattr(loop, "use_cpu_without_gpu", lambda: None)
    quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    monkeypatch.setattr(jax, "jit", quick)


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of two folders of tokens: 3 parts of one, 1 of the other."""
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = train_tokenizer(TEXTS, characters=sum(map(len, TEXTS)), vocab_size=280)
    for name, texts in (("a", TEXTS), ("b", TEXTS[:9])):
        (folder / name).mkdir()
        with write_sides(folder / name, tokenizer) as writers:
            for n, text in enumerate(texts):
                writers[n % 9 == 0].add(np.array(tokenizer.encode(text).ids))
        finish(folder / name, tokenizer, writers, "")
    sources = [{"path": "a", "weight": 3}, {"path": "b", "weight": 1}]
    (folder / "mix.json").write_text(json.dumps({"sources": sources}))
    return folder / "mix.json"


def losses(out: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.parametrize(("name", "sources"), [("a", 0), ("mix.json", 2)])
def test_what_a_run_is_set_up_with(mix: Path, tmp_path: Path, name: str, sources: int):
    config, said = dataclasses.replace(CONFIG, data=mix.parent / name, out=tmp_path), []
    phases: list[str] = []
    with ExitStack() as stack:
        this = set_up(config, model_config(config), make_mesh(config), stack, said.append, phases.append)
        assert phases == ["reading the data", "preparing the model", "packing the rows"]
        assert this.dataset.folder == mix.parent / "a"  # whose tokenizer.json goes beside the checkpoints
        assert this.sizes.vocab_size == 280
        batch = this.batches.at(0)
        assert batch["tokens"].shape == (4, 32)
        assert np.asarray(batch["real"]).sum() > 64
        assert this.held_out.count >= 1
        unigram, bigram = this.held_out.baselines(this.dataset)
        assert len(list((tmp_path / "cache" / "plans").glob("*.plan"))) == 2 * max(1, sources)  # of both sides
        assert 0 < bigram < unigram < np.log(280)
        assert this.identity["data"] == f"{config.data} (digest {this.dataset.digest[:12]})"
        assert this.identity["tokenizer"].startswith("of the data (digest ")
        lengths = this.dataset.train.lengths
    long = lengths[lengths > 32]
    pieces = sum(-(-length // 32) for length in long.tolist())
    assert 0 < len(long) < len(lengths) <= 88
    assert f"{len(long)} of {len(lengths)} documents are longer than a row: cut into {pieces} pieces" in said
    assert sum("in 3 steps, source" in line for line in said) == sources
    assert sum(f"in the held-out loss, of {this.held_out.rows} rows, source" in line for line in said) == sources


@pytest.mark.slow
def test_a_run_on_a_mixture_goes_on_with_the_same_rows_on_another_mesh(
    mix: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ending, "write", lambda writer, params, prompts, count, **how: prompts)  # it compiles for long
    whole, broken = (dataclasses.replace(CONFIG, data=mix, out=tmp_path / name) for name in ("whole", "broken"))
    assert loop.run(whole) == 0
    said = capsys.readouterr().out
    # what it will have, and has in the held-out loss, at the start; what it had, at the end
    assert said.count(f"source {mix.parent / 'a'}: ") == 3
    assert f"in 3 steps, source {mix.parent / 'b'}: " in said
    assert loop.run(dataclasses.replace(broken, steps=2)) == 0
    assert loop.run(dataclasses.replace(broken, mesh=MeshConfig(dp=2, cp=2))) == 0
    assert losses(tmp_path / "broken") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    other = mix.with_name("other.json")
    other.write_text(mix.read_text().replace("3", "2"))
    with pytest.raises(UserError, match=r"^data: must stay what the run was begun with"):
        loop.run(dataclasses.replace(broken, data=other))
