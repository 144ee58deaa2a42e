"""What the Pallas Mosaic kernels for Hopper share: the launch, barriers between warpgroups, shared memory tiles.

A kernel here is *warp specialised* (FlashAttention-3, Shah et al. 2024, section 3): one warpgroup only moves data (the
producer, TMA), the others only compute (the consumers, wgmma). "Full" signals are mbarriers, which TMA arrives at by
itself; "free" signals are named barriers, which cost one instruction and no memory.
"""

# Pallas' annotations do not know refs, layouts and the inline_mgpu decorator; the compile tests check these calls
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportGeneralTypeIssues=false

import ctypes.util
import functools
import importlib.metadata
import logging
import struct
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir.dialects import arith, vector

log = logging.getLogger(__name__)

WARPGROUP = 128  # threads
WARP = 32

ACC = plgpu.Layout.WGMMA  # how a [64, n] accumulator lies in a warpgroup's registers
ROW = plgpu.Layout.WGMMA.reduce(1)  # one value for each of its rows
COLUMN = plgpu.Layout.WGMMA.reduce(0)  # one value for each of its columns

_FIRST_NAMED_BARRIER = 4  # Mosaic itself takes those below
_NAMED_BARRIERS = 16  # of a block
_REGISTERS = 65536  # of a multiprocessor

# p: whether this is the first thread of its warpgroup
_FIRST_THREAD = f"""
            .reg .pred p;
            .reg .b32 t;
            mov.u32 t, %tid.x;
            and.b32 t, t, {WARPGROUP - 1};
            setp.eq.u32 p, t, 0;"""


def sm_count() -> int:
    """Streaming multiprocessors of the default device; an H100's where the host compiles for a GPU that it lacks."""
    return getattr(jax.devices()[0], "core_count", None) or 132


def check_registers(consumers: int, registers: tuple[int, int]) -> None:
    """ValueError where (a consumer's, the producer's) registers a thread are more than a block was launched with.

    A warpgroup that asks for registers that are not there waits for them for ever.
    """
    launched = _REGISTERS // (WARPGROUP * (consumers + 1)) // 8 * 8  # a thread, by eights
    if consumers * registers[0] + registers[1] > (consumers + 1) * launched:
        raise ValueError(
            f"registers of {consumers} consumers and a producer must be at most {consumers + 1} x {launched}, "
            f"got {registers}"
        )


def _nvjitlink() -> str | None:
    """What brings nvJitLink, or None: the package beside CUDA's others, or a library of the system."""
    for name in ("nvidia-nvjitlink", "nvidia-nvjitlink-cu12"):
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return ctypes.util.find_library("nvJitLink")


@functools.cache
def warn_of_nvjitlink() -> None:
    """Warn once, in the log, where jax compiles these kernels so that they are slow.

    jax 0.12.0.1 has nvJitLink compile a kernel where it is there, for linking; then ptxas ignores setmaxnreg (C7504),
    the consumers lack the producer's registers, and every wgmma is serialised (C7512). jax 0.11 compiles without it.
    """
    if jax.__version_info__ >= (0, 12) and (library := _nvjitlink()):
        log.warning(
            "zigzag_jax: jax %s compiles the kernels for Hopper by nvJitLink (%s), which takes their registers away "
            "and makes them slow. Use jax 0.11: pip install 'jax[cuda12]<0.12' (or cuda13)",
            jax.__version__,
            library,
        )


def launch(
    body: Callable, *refs, out_type=(), scratch_types: dict, grid: Sequence[int], grid_names: Sequence[str],
    warpgroups: int, name: str,
) -> Any:  # fmt: skip
    """Run `body(*refs, *outputs, **scratch)` on every warpgroup (axis "wg") of every block of the grid.

    Refs (`jax.new_ref`) among the arguments are read and written in place. This is pl.kernel over a plgpu.Mesh because
    plgpu.kernel wraps a custom_vmap that jax.checkpoint does not run again: gradients would be wrong without a word.
    """
    warn_of_nvjitlink()
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
        if count < 0 or first < _FIRST_NAMED_BARRIER or first + count > _NAMED_BARRIERS:
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
            mgpu.utils.inline_ptx(f"bar.{what} {barrier}, {threads};", convergent=True)

        static()
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))
    def traced(_, b):
        mgpu.utils.inline_ptx(f"bar.{what} $0, {threads};", b.registers[()], convergent=True)

    traced(barrier)


def fence_smem() -> None:
    """Make this thread's stores to shared memory visible to wgmma and TMA; a barrier among the threads must follow."""

    @plgpu.inline_mgpu()
    def fence(_):
        mgpu.utils.inline_ptx("fence.proxy.async.shared::cta;")

    fence()


def wait_turn(turns, index, value) -> None:
    """Wait until turns[index] == value, then see all that was written to global memory before it was set.

    turns: int32 ref in global memory, one axis. Every warp that reads it, or tells others, calls it; TMA operations
    that follow are ordered too.
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
            mgpu.utils.memref_ptr(ref), i.registers[()], v.registers[()], convergent=True,
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
            mgpu.utils.memref_ptr(ref), i.registers[()], convergent=True,
        )  # fmt: skip

    signal(turns, index)


def with_numbers(numbers: jax.Array, *arrays) -> tuple[Any, ...]:
    """The arrays, and a reference to `numbers`, in which a kernel may count.

    A scan that is differentiated moves what does not depend on its turn out of the loop, also counters that begin at 0,
    and then refuses to hand a reference in: so they depend on all that the kernel reads.
    """
    numbers, *arrays = jax.lax.optimization_barrier((numbers, *arrays))
    return *arrays, jax.new_ref(numbers)


def draw(counter, box) -> jax.Array:
    """The next number of a counter in global memory, int32 [1]: the same for all threads of the calling warpgroup.

    box: int32 [1] in shared memory. A barrier of the warpgroup must stand between two draws.
    """
    result = plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()), return_type=result)
    def take(_, counter, box):
        box = mgpu.utils.memref_ptr(box)
        mgpu.utils.inline_ptx(
            f"""{{{_FIRST_THREAD}
            @p atom.global.add.u32 t, [$0], 1;
            @p st.shared.b32 [$1], t;
            }}""",
            mgpu.utils.memref_ptr(counter), box,
        )  # fmt: skip
        mgpu.utils.warpgroup_barrier()
        i32_type = mgpu.utils.dtype_to_ir_type(jnp.int32)
        number = mgpu.utils.inline_ptx("ld.shared.b32 $0, [$1];", box, result_types=i32_type, has_side_effects=True)
        return mgpu.FragmentedArray.splat(number, (), is_signed=True)

    return take(counter, box)


def any_below(*pairs) -> Any:
    """1 in the warps of which a thread holds a value below its array's bound, else 0: an int32 scalar for lax.cond.

    pairs: (float32 registers [64] or [64, n], bound); a nan is not below. It differs from warp to warp: no wgmma,
    barrier or store of a warpgroup may depend on it. ptxas does all work that the values need before the vote.
    """
    layouts = [ROW if x.ndim == 1 else ACC for x, _ in pairs]
    bounds = [struct.pack(">f", bound).hex() for _, bound in pairs]
    result = plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT)

    @plgpu.inline_mgpu(arg_types=layouts, return_type=result)
    def vote(_, *arrays):
        values, tests = [], ""
        for x, bound in zip(arrays, bounds, strict=True):
            for register in x.registers.flat:
                for lane in range(register.type.shape[0]):
                    values.append(vector.extract(register, [], [lane]))
                    tests += f"setp.lt.or.f32 p, ${len(values)}, 0f{bound}, p;\n"
        i32_type = mgpu.utils.dtype_to_ir_type(jnp.int32)
        found = mgpu.utils.inline_ptx(
            f"""{{
            .reg .pred p;
            setp.ne.b32 p, 0, 0;
            {tests}
            vote.sync.any.pred p, p, 0xffffffff;
            selp.b32 $0, 1, 0, p;
            }}""",
            *values, result_types=i32_type, has_side_effects=True, convergent=True,
        )  # fmt: skip
        return mgpu.FragmentedArray.splat(found, (), is_signed=True)

    return vote(*(x for x, _ in pairs))


def where_between(x, first, end, other: float) -> Any:
    """`x` in the columns from `first` to `end` of each row, `other` in the rest.

    x: [64, n] in an accumulator's layout, n a multiple of 8; first, end: int32 [64], at least -2^30, beyond the columns
    too. A thread's columns of a row become bits of a number, made of the two bounds by shifts, and one select an
    element is left (FlashAttention-4). Compared with the bounds, an element takes two comparisons and two selects, and
    every column a register.
    """
    result = plgpu.ShapeDtypeStruct(x.shape, x.dtype, ACC)

    @plgpu.inline_mgpu(arg_types=(ACC, ROW, ROW), return_type=result)
    def select(_, x, first, end):
        constant = lambda value: mgpu.utils.c(value, mgpu.utils.dtype_to_ir_type(jnp.int32))
        rest = mgpu.utils.c(other, x.mlir_dtype)
        registers = x.registers.reshape(-1, 2).copy()  # pairs of columns, eight apart, of a thread's two rows
        for row in range(2):
            bounds = [vector.extract(bound.registers.reshape(2)[row], [], [0]) for bound in (first, end)]
            for start in range(0, len(registers), 16):
                from_first, from_end = (_columns_from(bound, 8 * start) for bound in bounds)
                between = arith.andi(from_first, arith.xori(from_end, constant(-1)))
                for i in range(start, min(start + 16, len(registers))):
                    for column in range(2):
                        bit = arith.andi(between, constant(1 << (2 * (i - start) + column)))
                        kept = arith.cmpi(arith.CmpIPredicate.ne, bit, constant(0))
                        value = arith.select(kept, vector.extract(registers[i, row], [], [column]), rest)
                        registers[i, row] = vector.insert(value, registers[i, row], [], [column])
        return mgpu.FragmentedArray(
            _registers=registers.reshape(x.registers.shape), _layout=x.layout, _is_signed=x.is_signed
        )

    return select(x, first, end)


def _columns_from(bound, start: int):
    """Of the 32 columns that this thread has of 128 from `start` on: those that are not below the bound, as bits.

    Lane l has columns 8 j + 2 (l % 4) and the one after it, so those below the bound are two of every eight and, of
    the last ones, two at most. PTX because its shift by 32 and more gives 0, where LLVM's is undefined.
    """
    return mgpu.utils.inline_ptx(
        f"""{{
        .reg .b32 n, r;
        mov.u32 n, %laneid;
        and.b32 n, n, 3;
        mad.lo.s32 n, n, -2, {-start};
        add.s32 n, n, $1;
        max.s32 n, n, 0;
        and.b32 r, n, 7;
        min.s32 r, r, 2;
        shr.u32 n, n, 3;
        mad.lo.s32 n, n, 2, r;
        mov.b32 $0, -1;
        shl.b32 $0, $0, n;
        }}""",
        bound, result_types=mgpu.utils.dtype_to_ir_type(jnp.int32),
    )  # fmt: skip


def raise_to(counter, number) -> None:
    """Make a counter (see draw) at least `number`. The calling warpgroup's next draw sees it."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def at_least(_, counter, number):
        mgpu.utils.inline_ptx(
            f"""{{{_FIRST_THREAD}
            @p red.global.max.s32 [$0], $1;
            }}""",
            mgpu.utils.memref_ptr(counter), number.registers[()],
        )  # fmt: skip

    at_least(counter, number)


def store(ref, value) -> None:
    """Write registers to global memory as they lie: of an accumulator's layout a few bytes a thread, half a sector.

    jax 0.12 has plgpu.store for it, and refuses `ref[...] = value` where that does not fill whole sectors. 0.11 has no
    plgpu.store: the other branch goes when pyproject.toml asks for 0.12.
    """
    if newer := getattr(plgpu, "store", None):
        newer(ref, value, optimized=False)
    else:
        ref[...] = value


def zero_rows(tile, first, end, threads: int) -> None:
    """Zero the rows of a tile [64, columns] (see smem; 128 byte swizzle) that are not in [first, end).

    The first `threads` threads of the block call it. Stores only, 16 bytes each: a swizzle moves bytes inside a row.
    """
    rows, width = tile.shape[0], tile.shape[1] * jnp.dtype(tile.dtype).itemsize
    lanes, parts = width // 16, width // 128  # a row lies in pieces of 128 bytes, eight rows of a piece together
    step = threads // lanes
    if step % 8 or rows % step or width % 128:
        raise ValueError(f"{threads} threads must zero {rows} rows of {width} bytes by multiples of 8 rows")
    passes = "".join(
        f"""
            setp.lt.s32 p, r, $1;
            setp.ge.or.s32 p, r, $2, p;
            @p st.shared.v4.b32 [a + {start // 8 * parts * 1024}], {{z, z, z, z}};
            add.s32 r, r, {step};"""
        for start in range(0, rows, step)
    )

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(_transforms(128, tile.dtype)), *[plgpu.Layout.WG_SPLAT] * 2))
    def zero(_, tile, first, end):
        mgpu.utils.inline_ptx(
            f"""{{
            .reg .pred p;
            .reg .b32 a, b, r, t, z;
            mov.b32 z, 0;
            mov.u32 t, %tid.x;
            and.b32 t, t, {threads - 1};
            shr.u32 r, t, {lanes.bit_length() - 1};
            and.b32 t, t, {lanes - 1};
            shr.u32 a, r, 3;
            mad.lo.s32 a, a, {parts * 1024}, $0;
            and.b32 b, r, 7;
            mad.lo.s32 a, b, 128, a;
            shr.u32 b, t, 3;
            mad.lo.s32 a, b, 1024, a;
            and.b32 b, t, 7;
            mad.lo.s32 a, b, 16, a;{passes}
            }}""",
            mgpu.utils.memref_ptr(tile), first.registers[()], end.registers[()],
        )  # fmt: skip

    zero(tile, i32(first), i32(end))


def store_rows(tile, ref, row, column, first, end) -> None:
    """Write a tile [64, columns] of 128 byte rows to ref[row :, column :], of its rows those in [first, end) of ref.

    The warpgroup that calls it has written the tile and passed a barrier. TMA cannot: its boxes are whole.
    """
    columns, itemsize = tile.shape[1], jnp.dtype(tile.dtype).itemsize
    pitch = ref.shape[1] * itemsize
    if columns * itemsize != 128:
        raise ValueError(f"a row of the tile must be 128 bytes, got {columns * itemsize}")
    copies = "".join(
        f"""
            setp.ge.s32 p, r, $4;
            setp.lt.and.s32 p, r, $5, p;
            @p ld.shared.v4.b32 {{w, x, y, z}}, [s + {at * 128}];
            @p st.global.v4.b32 [g + {at * pitch}], {{w, x, y, z}};
            add.s32 r, r, {WARPGROUP // 8};"""
        for at in range(0, tile.shape[0], WARPGROUP // 8)
    )

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(_transforms(128, tile.dtype)), plgpu.RefType(), *[plgpu.Layout.WG_SPLAT] * 4)
    )
    def write(_, tile, ref, *numbers):
        mgpu.utils.inline_ptx(
            f"""{{
            .reg .pred p;
            .reg .b32 c, r, s, w, x, y, z;
            .reg .b64 g, o;
            mov.u32 c, %tid.x;
            bfe.u32 r, c, 3, 4;
            and.b32 c, c, 7;
            xor.b32 s, c, r;
            and.b32 s, s, 7;
            mad.lo.s32 s, s, 16, $0;
            mad.lo.s32 s, r, 128, s;
            add.s32 r, r, $2;
            mad.wide.s32 g, r, {pitch}, $1;
            mad.wide.s32 g, $3, {itemsize}, g;
            mad.wide.s32 g, c, 16, g;{copies}
            }}""",
            mgpu.utils.memref_ptr(tile), mgpu.utils.memref_ptr(ref), *(x.registers[()] for x in numbers),
        )  # fmt: skip

    write(tile, ref, *(i32(x) for x in (row, column, first, end)))


def store_row_values(values, ref, at, row, first, end) -> None:
    """Write 4 byte values [n] in shared memory to ref[at, row :], of its columns those in [first, end).

    n is a power of two, 128 at most. The warpgroup that calls it has written them and passed a barrier.
    """
    count, pitch = values.shape[0], 4 * ref.shape[1]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), *[plgpu.Layout.WG_SPLAT] * 4))
    def write(_, values, ref, *numbers):
        mgpu.utils.inline_ptx(
            f"""{{
            .reg .pred p;
            .reg .b32 t, r, s, x;
            .reg .b64 g;
            mov.u32 t, %tid.x;
            and.b32 t, t, {WARPGROUP - 1};
            add.s32 r, t, $3;
            setp.lt.u32 p, t, {count};
            and.b32 t, t, {count - 1};
            setp.ge.and.s32 p, r, $4, p;
            setp.lt.and.s32 p, r, $5, p;
            mad.lo.s32 s, t, 4, $0;
            mad.wide.s32 g, $2, {pitch}, $1;
            mad.wide.s32 g, r, 4, g;
            ld.shared.b32 x, [s];
            @p st.global.b32 [g], x;
            }}""",
            mgpu.utils.memref_ptr(values), mgpu.utils.memref_ptr(ref), *(x.registers[()] for x in numbers),
        )  # fmt: skip

    write(values, ref, *(i32(x) for x in (at, row, first, end)))


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
    return plgpu.SMEM(tuple(shape), dtype, transforms=_transforms(swizzle(columns or shape[-1], dtype), dtype))


def _transforms(swizzled: int, dtype):
    return plgpu.TilingTransform((8, swizzled // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(swizzled)


def i32(x) -> jax.Array:
    """An int32 scalar: kernels compute indices in it."""
    return jnp.asarray(x, jnp.int32)


def remainder(i, count: int) -> Any:
    """The rest of i / count, of an int32 i that is not negative.

    By `&` where count is a power of two: of `rem` by one LLVM makes four instructions, for it does not know that.
    """
    return i & (count - 1) if count & (count - 1) == 0 else jax.lax.rem(i, i32(count))


def across(x, columns: int):
    """A row vector [64] as [64, columns]."""
    return jax.lax.broadcast_in_dim(x, (64, columns), [0])


def down(x, columns: int):
    """A column vector [columns] as [64, columns]."""
    return jax.lax.broadcast_in_dim(x, (64, columns), [1])
