"""What the tests of compiled kernels share."""

import jax
import pytest


@pytest.fixture
def compiler_says(capfd, monkeypatch):
    """A function that compiles f for its arguments and returns what ptxas reported, and the PTX."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")

    def run(f, *args) -> str:
        lowered = jax.jit(f).lower(*args)
        capfd.readouterr()
        lowered.compile()
        return "".join(capfd.readouterr())

    return run
