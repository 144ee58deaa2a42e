"""What the Pallas Mosaic kernels for Hopper share: the launch, barriers between warpgroups, shared memory tiles.

A kernel here is *warp specialised* (FlashAttention-3, Shah et al. 2024, section 3): one warpgroup only moves data (the
producer, TMA), the others only compute (the consumers, wgmma). "Full" signals are mbarriers, which TMA arrives at by
itself; "free" signals are named barriers, which cost one instruction and no memory.
"""

# Pallas' annotations do not know refs, layouts and the inline_mgpu decorator; the compile tests check these calls
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportGeneralTypeIssues=false

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu

WARPGROUP = 128  # threads
WARP = 32

ACC = plgpu.Layout.WGMMA  # how a [64, n] accumulator lies in a warpgroup's registers
ROW = plgpu.Layout.WGMMA.reduce(1)  # one value for each of its rows
COLUMN = plgpu.Layout.WGMMA.reduce(0)  # one value for each of its columns

_FIRST_NAMED_BARRIER = 4  # Mosaic itself takes those below
_NAMED_BARRIERS = 16  # of a block


def sm_count() -> int:
    """Streaming multiprocessors of the default device; an H100's where the host compiles for a GPU that it lacks."""
    return getattr(jax.devices()[0], "core_count", None) or 132


def launch(
    body: Callable, *refs, out_type=(), scratch_types: dict, grid: Sequence[int], grid_names: Sequence[str],
    warpgroups: int, name: str,
) -> Any:  # fmt: skip
    """Run `body(*refs, *outputs, **scratch)` on every warpgroup (axis "wg") of every block of the grid.

    Refs (`jax.new_ref`) among the arguments are read and written in place. This is pl.kernel over a plgpu.Mesh because
    plgpu.kernel wraps a custom_vmap that jax.checkpoint does not run again: gradients would be wrong without a word.
    """
    mesh = plgpu.Mesh(grid=grid, grid_names=grid_names, num_threads=warpgroups, thread_name="wg", kernel_name=name)

    def run(*refs):
        pl.run_scoped(functools.partial(body, *refs), collective_axes="wg", **scratch_types)

    params = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0)
    return pl.kernel(run, out_type=out_type, mesh=mesh, compiler_params=params, name=name)(*refs)


class NamedBarriers:
    """`count` hardware barriers in a row, each shared by `threads` threads of the block.

    `arrive` does not wait, `sync` does; a barrier falls when `threads` threads have done either. Arriving twice before
    it fell hangs the card.
    """

    def __init__(self, first: int, count: int, threads: int) -> None:
        if first < _FIRST_NAMED_BARRIER or first + count > _NAMED_BARRIERS:
            raise ValueError(f"named barriers must lie in {_FIRST_NAMED_BARRIER}..15, got {first}..{first + count - 1}")
        self.first, self.end, self.threads = first, first + count, threads

    def arrive(self, i=0) -> None:
        """Say that this thread has come to barrier i (int or traced)."""
        _named_barrier("arrive", self.first + i, self.threads)

    def sync(self, i=0) -> None:
        """Wait until all threads of barrier i (int or traced) have come."""
        _named_barrier("sync", self.first + i, self.threads)


def _named_barrier(what: str, barrier, threads: int) -> None:
    if isinstance(barrier, int):

        @plgpu.inline_mgpu()
        def static(_):
            mgpu.utils.inline_ptx(f"bar.{what} {barrier}, {threads};")

        static()
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))
    def traced(_, b):
        mgpu.utils.inline_ptx(f"bar.{what} $0, {threads};", b.registers[()])

    traced(barrier)


def fence_smem() -> None:
    """Make this thread's stores to shared memory visible to wgmma and TMA; a barrier among the threads must follow."""

    @plgpu.inline_mgpu()
    def fence(_):
        mgpu.utils.inline_ptx("fence.proxy.async.shared::cta;")

    fence()


def wait_turn(turns, index, value) -> None:
    """Wait until turns[index] == value, then see all that was written to global memory before it was set.

    turns: int32 ref in global memory, one axis. One warp calls it; TMA operations that follow are ordered too.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT))
    def wait(_, ref, i, v):
        mgpu.utils.inline_ptx(
            """{
            .reg .pred p;
            .reg .b64 a;
            .reg .b32 seen;
            mad.wide.s32 a, $1, 4, $0;
            again:
            ld.acquire.gpu.global.b32 seen, [a];
            setp.ne.b32 p, seen, $2;
            @p bra again;
            bar.warp.sync 0xffffffff;
            fence.proxy.async;
            }""",
            mgpu.utils.memref_ptr(ref), i.registers[()], v.registers[()],
        )  # fmt: skip

    wait(turns, index, value)


def next_turn(turns, index) -> None:
    """Add one to turns[index] after all that this warp, its finished TMA operations too, wrote to global memory."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def signal(_, ref, i):
        mgpu.utils.inline_ptx(
            """{
            .reg .pred p;
            .reg .b64 a;
            mad.wide.s32 a, $1, 4, $0;
            fence.proxy.async;
            elect.sync _|p, 0xffffffff;
            @p red.release.gpu.global.add.s32 [a], 1;
            }""",
            mgpu.utils.memref_ptr(ref), i.registers[()],
        )  # fmt: skip

    signal(turns, index)


def swizzle(columns: int, dtype) -> int:
    """Widest swizzle in bytes (128, 64 or 32) whose columns divide `columns`."""
    width = columns * jnp.dtype(dtype).itemsize
    if width % 32:
        raise ValueError(
            f"a tile's rows must be multiples of 32 bytes, got {columns} columns of {jnp.dtype(dtype).name}"
        )
    return next(s for s in (128, 64, 32) if width % s == 0)


def smem(shape: Sequence[int], dtype, columns: int | None = None):
    """A shared memory tile [..., rows, columns] for TMA and wgmma, without bank conflicts.

    columns: width of the narrowest slice of the last axis that a wgmma reads, default all of it.
    """
    s = swizzle(columns or shape[-1], dtype)
    tiling = plgpu.TilingTransform((8, s // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(tuple(shape), dtype, transforms=(tiling, plgpu.SwizzleTransform(s)))


def i32(x) -> jax.Array:
    """An int32 scalar: kernels compute indices in it."""
    return jnp.asarray(x, jnp.int32)


def across(x, columns: int):
    """A row vector [64] as [64, columns]."""
    return jax.lax.broadcast_in_dim(x, (64, columns), [0])


def down(x, columns: int):
    """A column vector [columns] as [64, columns]."""
    return jax.lax.broadcast_in_dim(x, (64, columns), [1])
