"""Every value that no run can have is refused by name, and the flags are those that other people's scripts use."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from zigzag_jax.train.config import Config, HostsConfig, MeshConfig, OptimConfig, RouterConfig, check
from zigzag_jax.train.errors import UserError

BAD = {
    "steps": Config(steps=0),
    "model": Config(model=""),
    "seq-len": Config(seq_len=1),
    "batch": Config(batch=0),
    "seed": Config(seed=-1),
    "seed of more than 32 bits": Config(seed=2**32),
    "save-every": Config(save_every=0),
    "eval-every": Config(eval_every=0),
    "keep": Config(keep=0),
    "cpu-devices": Config(cpu_devices=0),
    "mesh.cp": Config(mesh=MeshConfig(cp=0)),
    "mesh.dp": Config(mesh=MeshConfig(dp=-2)),
    "mesh.fsdp": Config(mesh=MeshConfig(fsdp=0)),
    "mesh.ep": Config(mesh=MeshConfig(cp=4, ep=3)),
    "hosts.num-processes": Config(hosts=HostsConfig(num_processes=0)),
    "hosts.num-processes with a coordinator": Config(hosts=HostsConfig("127.0.0.1:1")),
    "hosts.process-id": Config(hosts=HostsConfig("127.0.0.1:1", num_processes=2, process_id=2)),
    "hosts.coordinator": Config(hosts=HostsConfig(num_processes=2)),
    "hosts.timeout": Config(hosts=HostsConfig(timeout=0)),
    "optim.learning-rate": Config(optim=OptimConfig(learning_rate=0.0)),
    "optim.clip": Config(optim=OptimConfig(clip=float("nan"))),
    "optim.final-fraction": Config(optim=OptimConfig(final_fraction=1.5)),
    "optim.b1": Config(optim=OptimConfig(b1=-0.1)),
    "optim.b2": Config(optim=OptimConfig(b2=1.0)),
    "optim.weight-decay": Config(optim=OptimConfig(weight_decay=-1.0)),
    "router.bias-rate": Config(router=RouterConfig(bias_rate=float("inf"))),
    "router.aux-coefficient": Config(router=RouterConfig(aux_coefficient=-1.0)),
    "optim.decay-fraction": Config(optim=OptimConfig(decay_fraction=0.0)),
    "optim.muon-momentum": Config(optim=OptimConfig(muon_momentum=1.0)),
    "optim.z-loss": Config(optim=OptimConfig(z_loss=-1e-4)),
    "optim.groups": Config(optim=OptimConfig(groups=("*norm*",))),
    "accumulate": Config(accumulate=0),
    "profile": Config(profile="3:2"),
    "profile beyond the end": Config(steps=9, profile="8:10"),
    "optim.warmup": Config(optim=OptimConfig(warmup=-1)),
}


@pytest.mark.parametrize("case", BAD)
def test_a_value_out_of_range_is_named(case: str):
    field = case.split(maxsplit=1)[0]
    with pytest.raises(UserError, match=rf"^{field}: must .*, got ") as info:
        check(BAD[case])
    assert info.value.field == field


def test_a_trace_up_to_the_last_step():
    check(Config(steps=9, profile="8:9"))
    with pytest.raises(UserError, match=r"^profile: must be steps that are trained, 1 .. 9 of --steps, got 10$"):
        check(Config(steps=9, profile="10"))


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_rates_are_finite(name: str):
    with pytest.raises(UserError, match=r"must be >=? 0 and finite, got inf"):
        check(Config(optim=dataclasses.replace(OptimConfig(), **{name: float("inf")})))


def test_the_defaults_pass():
    check(Config())
    check(Config(seed=2**32 - 1))


def test_default_folder_is_runs_model():
    assert Config(model="some/where/my-model").folder == Path("runs/my-model")
    assert Config(out=Path("x")).folder == Path("x")


def every_dataclass(kind: type) -> list[type]:
    inner = [f.default_factory for f in dataclasses.fields(kind) if dataclasses.is_dataclass(f.default_factory)]
    return [kind, *inner]  # type: ignore[list-item]


def test_help_names_every_flag_and_explains_it():
    command = [sys.executable, "-m", "zigzag_jax.train", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    flags = [
        "--model",
        "--random-init",
        "--data",
        "--tokenizer",
        "--out",
        "--steps",
        "--seq-len",
        "--batch",
        "--seed",
        "--dtype",
        "--save-every",
        "--eval-every",
        "--cpu-devices",
        "--dry-run",
        "--mesh.dp",
        "--mesh.fsdp",
        "--mesh.ep",
        "--mesh.cp",
        "--hosts.coordinator",
        "--hosts.num-processes",
        "--hosts.process-id",
        "--hosts.timeout",
        "--optim.learning-rate",
        "--optim.name",
        "--optim.groups",
        "--optim.z-loss",
        "--accumulate",
        "--wandb",
        "--profile",
        "--remat",
    ]
    assert [flag for flag in flags if flag not in text] == []
