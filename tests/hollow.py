"""Kernels without insides, for what asks only how XLA schedules their calls.

XLA sees of a kernel its name, its operands and its results. Compiling its insides takes most of a compile, and that all
of them do compile is tested where it belongs (kernels/test_*_compiled.py).
"""

import contextlib
from collections.abc import Iterator

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import pytest

from zigzag_jax.kernels import hopper
from zigzag_jax.kernels.flash import mosaic_bwd, mosaic_fwd, mosaic_zeros
from zigzag_jax.kernels.grouped import mosaic_pipeline


@contextlib.contextmanager
def hollow_kernels() -> Iterator[None]:
    """The Hopper kernels are empty here. What they write in place they still take to be written."""

    def launch(body, *arrays, **rest):
        del body
        in_place = [isinstance(x, jax.Ref) for x in jax.tree.leaves(arrays)]

        def nothing(*refs, **scratch):
            del scratch
            for ref, written in zip(jax.tree.leaves(refs), in_place, strict=False):  # results stand behind
                if written:
                    _touch(ref)

        return hopper.launch(nothing, *arrays, **rest)

    with pytest.MonkeyPatch.context() as patch:
        for module in (mosaic_fwd, mosaic_bwd, mosaic_zeros, mosaic_pipeline):
            patch.setattr(module, "launch", launch)
        jax.clear_caches()  # the kernels' functions are jitted: what was traced stays
        try:
            yield
        finally:
            jax.clear_caches()


def _touch(ref) -> None:
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def touch(_, ref):
        del ref

    touch(ref)  # pyright: ignore[reportCallIssue]: the decorator passes the context
