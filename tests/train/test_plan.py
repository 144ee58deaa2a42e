"""What the plan says, of compiled programs that are made up; that one is compiled for GPUs: test_plan_compiled.py."""

import dataclasses
from collections import Counter
from typing import Any

import jax
import pytest
from jax.sharding import AxisType

from zigzag_jax.models.stack import REMAT
from zigzag_jax.train import plan as module
from zigzag_jax.train.config import Config, MeshConfig, OptimConfig
from zigzag_jax.train.errors import MachineError, UserError
from zigzag_jax.train.memory.footprint import Footprint
from zigzag_jax.train.memory.kept import Kept
from zigzag_jax.train.memory.traffic import Travel
from zigzag_jax.train.plan import GIB, PlanConfig, checked_mesh, main, plan

INPUT = "bfloat16[1, 4096, 2048]"
A_TOKEN = GIB // 4096  # made up: 1 GiB more for 4096 tokens
TRAVELS = (Travel("collective-permute", 32 << 20, 46, 40, 38), Travel("all-gather", 1 << 20, 96, 96, 0))


def made_up(config: Config, program: Any) -> Footprint:
    """18 GiB of state; without rematerialisation twice the activations; with offload what is kept is on the host."""
    del program
    activations = config.seq_len * A_TOKEN * (2 if config.remat == "none" else 1)
    kept, on_host = activations // 2, config.remat == "offload"
    temporary = 6 * GIB + activations - kept * on_host
    return Footprint(6 * GIB, 12 * GIB, 0, temporary, kept * on_host, Counter({Kept(INPUT, on_host): kept}), TRAVELS)


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """CPU devices pose as the GPUs, and nothing is compiled; the cards that were asked for."""
    asked = []

    def mesh(name, shape, axis_names, pool):
        asked.append((name, pool))
        return jax.make_mesh(shape, axis_names, axis_types=(AxisType.Auto,) * len(shape))

    monkeypatch.setattr(module, "described_mesh", mesh)
    monkeypatch.setattr(module, "check_compiler", lambda: None)
    monkeypatch.setattr(module, "measure", made_up)
    return asked


def said(**flags: Any) -> tuple[int, str]:
    """Exit code and text for four GPUs in a ring."""
    lines: list[str] = []
    code = plan(dataclasses.replace(PlanConfig(gpus=4, batch=1), **flags), lines.append)
    return code, "\n".join(lines)


def test_a_run_that_fits(cards):
    code, text = said(seq_len=4096, longest=False)
    assert code == 0
    for size, what in [("6.00", "parameters"), ("12.00", "optimiser"), ("7.00", "temporary"), ("25.00", "peak")]:
        assert f"{size}  {what}" in text
    assert f"0.50  kept by the layers, from each {INPUT} in all" in text
    assert "46 hops a step, 40 asynchronous, 38 above a kernel" in text
    assert "46 x     32.000 MiB  collective-permute, 40 asynchronous, 38 above a kernel" in text
    # 79.10 GiB * 0.92 = 72.77; 18 of it are taken, and a twentieth of the rest is XLA's
    assert "fits, 45.03 GiB left (memory alone: " in text
    assert text.endswith("JAX's own 75% of a card will do")
    assert text.count("compiling") == 1
    assert cards == [("h100", 0.92)]


def test_a_run_that_does_not_fit_says_by_how_much_and_what_would(cards):
    code, text = said(seq_len=262144)
    assert code == 1
    assert "does not fit: 17.97 GiB too much a device" in text  # 18 + 6 + 64 of 70.03
    end = (70.03 - 24) * 4096
    answer = int(text.rpartition("longest seq-len that fits into 92% of a card, to 3%: ")[2])
    assert end * 31 / 32 < answer <= end
    assert answer % (8 * 128) == 0
    assert text.count("compiling") <= 3


def test_the_h200_and_the_share_of_it(cards):
    code, text = said(seq_len=262144, gpu="h200", memory_fraction=0.75, longest=False)
    assert code == 0
    assert "104.85  what JAX has of a card's 139.80" in text
    assert cards == [("h200", 0.75)]


def test_offload_is_told_apart(cards):
    text = said(seq_len=8192, remat="offload", longest=False)[1]
    assert "kept by the layers ON THE HOST" in text
    assert "1.00  pinned memory of the host, for each device" in text


def test_no_length_fits_where_the_state_alone_does_not(cards):
    code, text = said(memory_fraction=0.25)
    assert code == 1
    assert "no seq-len fits: parameters, optimiser and gradients alone take 24.00 GiB" in text


def test_remat_policies_side_by_side(cards):
    code, text = said(seq_len=131072, compare_remat=True)
    assert code == 0
    rows = {
        line.split()[0]: line.split()[1:] for line in text.splitlines() if line.split()[:1] and line.split()[0] in REMAT
    }
    assert list(rows) == list(REMAT)
    assert rows["none"] == ["88.00", "70.00", "32.00", "0.00", "no"]
    assert rows["attention"] == ["56.00", "38.00", "16.00", "0.00", "yes"]
    assert rows["offload"] == ["40.00", "22.00", "16.00", "16.00", "yes"]
    assert said(seq_len=1 << 20, compare_remat=True)[0] == 1


BAD = {
    "gpus": (PlanConfig(gpus=16, mesh=MeshConfig(fsdp=2, cp=4)), r"dp \* fsdp \* cp = 1 \* 2 \* 4 = 8, got 16"),
    "gpus-0": (PlanConfig(gpus=0), "must be >= 1, got 0"),
    "gpus-none": (PlanConfig(), "must be given, or a mesh, got None"),
    "memory-fraction": (PlanConfig(gpus=1, memory_fraction=1.5), "must be > 0 and <= 1, got 1.5"),
    "batch": (PlanConfig(gpus=4, batch=3, mesh=MeshConfig(fsdp=4)), r"divisible by dp \* fsdp = 4, got 3"),
    "steps": (PlanConfig(gpus=4, steps=0), "must be >= 1, got 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_no_run_can_have_is_named(name: str):
    config, rule = BAD[name]
    with pytest.raises(UserError, match=rf"^{name.removesuffix('-0').removesuffix('-none')}: .*{rule}"):
        checked_mesh(config)


def test_without_a_mesh_the_ring_takes_all():
    assert checked_mesh(PlanConfig(gpus=16)) == (1, 1, 16)
    assert checked_mesh(PlanConfig(mesh=MeshConfig(dp=2, cp=4))) == (2, 1, 4)


def test_mistakes_end_with_two_and_a_line(capsys: pytest.CaptureFixture[str]):
    assert main(["--gpus", "3", "--mesh.cp", "2"]) == 2
    assert capsys.readouterr().err == "error: gpus: must be dp * fsdp * cp = 1 * 1 * 2 = 2, got 3\n"
    with pytest.raises(SystemExit) as info:
        main(["--gpu", "h1000"])
    assert info.value.code == 2


def test_storage_that_is_away_is_no_mistake(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def away(*arguments: object) -> int:
        raise MachineError("m: storage does not answer")

    monkeypatch.setattr(module, "plan", away)
    assert main([]) == 70
    assert capsys.readouterr().err == "error: m: storage does not answer\n"


def test_how_a_run_gets_the_memory_it_was_planned_for(cards):
    """59.3 GiB of 79.1 are JAX's own: 57.3 may be filled."""
    flags = {"seq_len": 34 * 4096, "longest": False, "optim": OptimConfig(groups=("*norm*=0", "head.*=1,0"))}
    end = (
        "\nit needs more than JAX's own 75% of a card, on every host:\n"
        "    XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 python -m zigzag_jax.train --seq-len 139264 --batch 1 "
        "--optim.groups '*norm*=0' 'head.*=1,0'"
    )
    code, text = said(**flags)
    assert code == 0
    assert "fits, 12.03 GiB left" in text
    assert text.endswith(end)
    code, text = said(**flags, memory_fraction=0.75)
    assert code == 1
    assert "does not fit: 0.74 GiB too much" in text
    assert text.endswith(end)
    assert "MEM_FRACTION" not in said(seq_len=1 << 20, longest=False)[1]
