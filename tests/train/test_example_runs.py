"""The runs in examples/ are runs, and need what their docstrings say."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from zigzag_jax.train.config import Config, check
from zigzag_jax.train.dry_run import describe
from zigzag_jax.train.models import model_config

pytestmark = pytest.mark.source
EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted([*EXAMPLES.glob("pretrain_*.py"), *EXAMPLES.glob("continue_*.py")])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_run(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config, about = module.RUN, str(module.__doc__)
    assert isinstance(config, Config)
    assert path.name in about
    if path.stem.startswith("continue"):
        assert config.model == ""  # a folder has to be given
        name = path.stem.removeprefix("continue_").replace("_", "-")
        config = dataclasses.replace(config, model=name)
    check(config)
    said: list[str] = []
    describe(config, model_config(config), said.append)
    devices = int(re.search(r"= (\d+) devices", said[0])[1])  # type: ignore[index]
    hosts = re.search(r"(\d+ hosts|one host) of (\d+) H100", about)
    assert hosts is not None
    assert devices == (1 if hosts[1] == "one host" else int(hosts[1].split()[0])) * int(hosts[2])
    slurm = re.search(r"srun -N (\d+) -n (\d+) --gpus-per-node=(\d+) python ", about)
    assert slurm is not None
    assert devices == int(slurm[2]) == int(slurm[1]) * int(slurm[3])  # one task a GPU
    for name, text in (("parameters", "float32 weights"), ("optimiser", "AdamW's moments")):
        gib = next(float(m[1]) for line in said if (m := re.match(rf"{name} +([\d.]+) GiB", line)))
        told = re.search(rf"([\d.]+) GiB of {text}", about)
        assert told is not None
        assert float(told[1]) == pytest.approx(gib, rel=0.03)


def test_there_are_four():
    assert len(SCRIPTS) == 4
