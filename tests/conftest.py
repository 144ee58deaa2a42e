"""Every test sees eight CPU devices, and a silent broadcast over ranks is an error.

Which tests run in which order: two workers take a file at a time, and what takes longest must not come last.
"""

import gc
from pathlib import Path

import jax
import pytest

gc.set_threshold(200_000, 20, 50)  # programs that are kept for later tests are many objects, and none is garbage
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

TESTS = Path(__file__).parent
LONGEST_FIRST = [
    "train/test_default_run.py",
    "train/test_soak.py",
    "train/test_processes.py",
    "train/test_command_line.py",
    "test_ring.py",
    "models/test_qwen3_moe.py",
    "train/test_step.py",
    "kernels/test_flash_triton.py",
    "models/test_hf_parity.py",
    "models/test_decode.py",
    "test_mla.py",
    "test_attention.py",
    "models/test_expert_parallel.py",
    "kernels/test_flash_mosaic_compiled.py",  # from here on: compiled for GPUs
    "test_schedule.py",
    "train/test_step_schedule.py",
    "kernels/test_grouped_mosaic_compiled.py",
    "kernels/test_flash_triton_compiled.py",
    "train/test_plan_compiled.py",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    about = "of the cases of a test that `-m` leaves, run the last only: each path through the code, and no sweeps"
    parser.addoption("--one-case", action="store_true", help=about)


@pytest.hookimpl(trylast=True)  # after what deselects by -m and -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("one_case"):
        last = {item.nodeid.split("[")[0]: item for item in items}  # usually the largest cp
        config.hook.pytest_deselected(items=[item for item in items if last[item.nodeid.split("[")[0]] is not item])
        items[:] = last.values()
    places = {TESTS / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
