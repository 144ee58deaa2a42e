"""The flags of a Config make the same Config again."""

import shlex
from pathlib import Path

import tyro

from zigzag_jax.train.config import Config, MeshConfig, OptimConfig
from zigzag_jax.train.flags import command_line, flags_of


def test_the_command_line_makes_the_config():
    config = Config(
        model="a folder", random_init=True, data=Path("x y.json"), seq_len=4096, mesh=MeshConfig(cp=4),
        optim=OptimConfig(name="muon", learning_rate=1e-5, groups=("*norm*=0", "head.*=1,0")),
    )  # fmt: skip
    python, module, name, *flags = shlex.split(command_line(config))
    assert (python, module, name) == ("python", "-m", "zigzag_jax.train")
    assert tyro.cli(Config, args=flags) == config
    assert command_line(Config()) == "python -m zigzag_jax.train"


def test_names_are_those_of_the_flags():
    assert flags_of(Config(mesh=MeshConfig(cp=4)))["mesh.cp"] == 4
    assert {"seq-len", "hosts.process-id", "optim.z-loss"} <= flags_of(Config()).keys()
