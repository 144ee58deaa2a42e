"""Hopper's kernels on a CPU: what they compute, that they wait for what they read, and for nothing in vain.

jax has an interpreter of Pallas Mosaic GPU: threads for warpgroups, arrays for memory, callbacks for what is done to
it. It does not know what a kernel spells out in PTX, nor accumulators that begin with a value, wgmma with A in
registers, TMA that adds, and warps that go each their own way, and it does at once what a GPU does when it likes; this
file teaches it. All of it is private to jax: an update may break it, and then these tests say so.

Here a wgmma reads its operands and a copy to global memory its source as late as they may: when they are waited for.
What a kernel overwrites before that, it multiplies. Copies to shared memory are there at once. Threads stand about for
random times before a barrier. Blocks run one after the other. Swizzles, the proxies' fences and registers are not
modelled: for those there are the GPU tests and the compiled ones.
"""

# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportAbstractUsage=false, reportOptionalMemberAccess=false, reportCallIssue=false

import collections
import contextlib
import dataclasses
import functools
import inspect
import random
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax._src import callback
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu import core as mosaic_core
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret, params
from jax._src.pallas.mosaic_gpu.interpret import shared_memory as simulated
from jax._src.state import indexing
from jax._src.state import primitives as state_primitives

from zigzag_jax.kernels.flash import mosaic_bwd, mosaic_chunks, mosaic_items, mosaic_walk, mosaic_zeros
from zigzag_jax.kernels.grouped import mosaic_pipeline

MULTIPROCESSORS = 3
PATIENCE = 60  # seconds; a kernel of these tests takes a few
PAUSE = 1e-3  # seconds, at most, before a barrier
NONE = np.int32(0)

_changed = threading.Condition(threading.RLock())  # held by whoever reads and writes memory in one go


@contextlib.contextmanager
def interpreted(warps_apart: bool, own_claims: bool = True) -> Iterator[None]:
    """Kernels for Hopper are interpreted here, for a card of MULTIPROCESSORS.

    warps_apart: the last warpgroup's warps go each their own way, as the backward's producer does. own_claims: a block
    of the backward gets all of its own item's chunks, as it runs alone; else none but the first, and helpers the rest.
    """
    # XLA's pool has a thread for each device: of two consumers and four warps all may be waiting
    assert jax.local_device_count() >= 8, "conftest.py makes eight devices"
    cls = jaxpr_interpret.JaxprInterpreter
    interpret = cls.interpret
    replaced = [
        (cls, "_interpret_inline_mgpu_p", functools.partialmethod(_inline, own_claims)),
        (gpu_callbacks, "wgmma", _begin_wgmma),
        (
            gpu_callbacks,
            "wgmma_accumulator_deref",
            functools.partial(_read_accumulator, gpu_callbacks.wgmma_accumulator_deref),
        ),
        (gpu_callbacks, "wait_smem_to_gmem", _wait_for_copies),
        (plgpu, "wgmma_wait", _wgmma_wait),
        (plgpu, "commit_smem_to_gmem_group", _commit_group),
        (gpu_callbacks, "copy_smem_to_gmem", functools.partial(_begin_copy, gpu_callbacks.copy_smem_to_gmem)),
        (mosaic_core.WGMMAAbstractAccumulatorRef, "_setitem", _set_accumulator),
        (pl, "run_state", _run_state),
        *[
            (simulated.Barrier, name, _unobserved(getattr(simulated.Barrier, name)))
            for name in ("arrive", "deallocate")
        ],
        *[
            (module, "sm_count", lambda: MULTIPROCESSORS)
            for module in (mosaic_bwd, mosaic_items, mosaic_walk, mosaic_zeros, mosaic_pipeline)
        ],
    ]
    if warps_apart:
        replaced += [
            (cls, "_interpret_run_scoped_p", _outermost(cls._interpret_run_scoped_p)),
            (cls, "_interpret_mpmd_map_p", functools.partialmethod(_warp_map, interpret)),
            (cls, "interpret", _apart(interpret)),
        ]
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, value in replaced:
            patch.setattr(owner, name, value)
        jax.clear_caches()  # the kernels' functions are jitted: what was traced stays
        try:
            with params.force_gpu_interpret_mode(params.InterpretGPUParams()):
                yield
            jax.effects_barrier()  # a call returns before it has ended, and what it runs in must last
        finally:
            jax.clear_caches()
            gpu_callbacks.reset_gpu_interpret_mode_state()


def cases(table: dict[str, Any], *quick: str):
    """A test's parameters: all of a table, those but the named ones marked as slow."""
    mark = lambda name: () if name in quick else pytest.mark.slow
    return [pytest.param(case, marks=mark(name), id=name) for name, case in table.items()]


# ---------------------------------------------------------------- what a kernel spells out in PTX


def _inline(self, own_claims: bool, eqn, token, get_invals):
    """As the interpreter's `_interpret_inline_mgpu_p`: (token, results)."""
    function = eqn.params["mgpu_fn"]
    around = inspect.getclosurevars(function).nonlocals
    count, values = eqn.params["pytree_args"].num_leaves, get_invals()
    args = values[:count]
    parts = eqn.params["pytree_ref_transforms"].unflatten(values[count:])  # which of each reference is meant

    def begin() -> np.int32:
        """Where the first reference's part of an array of numbers begins."""
        slices = [transform.indices[0].start for transform in parts[0]]
        return np.int32(sum(slices))

    def call(effect: Callable, *args, result: bool = False, **kwargs):
        effect = gpu_callbacks.fail_on_exception(functools.wraps(effect)(functools.partial(effect, **kwargs)))
        token_type = gpu_callbacks.TOKEN_SHAPE_DTYPE
        types = (token_type, jax.ShapeDtypeStruct((), jnp.int32)) if result else token_type
        found = callback.io_callback(effect, types, token, self.mesh_location, self.thread, *args)
        return (found[0], [found[1]]) if result else (found, [])

    match function.__qualname__.replace(".<locals>", ""):
        case "_named_barrier.static" | "_named_barrier.traced":
            number = jnp.int32(args[0] if args else around["barrier"])
            return call(_named_barrier, number, what=around["what"], threads=around["threads"])
        case "fence_smem.fence":
            return call(_fence)
        case "_wgmma_wait.wait":
            return call(_finish_wgmma, left=around["n"])
        case "_commit_group.commit":
            return call(_close_group)
        case "any_below.vote":
            bounds = [struct.unpack(">f", bytes.fromhex(bound))[0] for bound in around["bounds"]]
            found = [jnp.any(x < bound) for x, bound in zip(args, bounds, strict=True)]
            return token, [jnp.stack(found).any().astype(jnp.int32)]  # of a warpgroup, where a GPU asks each warp
        case "where_between.select":
            x, first, end = args
            column = jnp.arange(x.shape[1])[None]
            seen = (column >= first[:, None]) & (column < end[:, None])
            return token, [jnp.where(seen, x, jnp.asarray(around["other"], x.dtype))]
        case "draw.take":
            return call(_change, args[0], begin(), change=lambda x: x + 1, result=True)
        case "raise_to.at_least":
            return call(_change_to, args[0], begin(), args[1])
        case "_count_up.up":
            return call(_change, args[0], args[1] + begin(), change=lambda x: x + 1, result=True)
        case "next_turn.signal":
            return call(_change, args[0], args[1] + begin(), change=lambda x: x + 1, result=True)[0], []
        case "wait_turn.wait":
            return call(_wait_turn, args[0], args[1] + begin(), args[2])
        case "zero_rows.zero":
            return call(_zero_rows, args[0], parts[0], *args[1:])
        case "store_rows.write":
            return call(_store_rows, args[0], parts[0], args[1], parts[1], *args[2:])
        case "store_row_values.write":
            at, row, first, end = args[2:]
            return call(_store_rows, args[0], parts[0], args[1], parts[1], at, row, first, end, across=True)
        case "_claim.claim":
            sizes = dict(begin=int(begin()), items=around["items"], pitch=around["pitch"])
            return call(_claim, *args, **sizes, own_claims=own_claims)
    raise NotImplementedError(f"what {function.__qualname__} does is not known here")


def _wait_until(true: Callable[[], bool], what: str) -> None:
    """Wait, with _changed held, until it is so; TimeoutError after a while, and where another thread has failed."""
    while not true():
        if not _changed.wait(timeout=PATIENCE):
            raise TimeoutError(what)
        gpu_callbacks._get_shared_memory().check_failed()


@dataclasses.dataclass
class _NamedBarrier:
    threads: int
    came: set = dataclasses.field(default_factory=set)
    fell: int = 0


@dataclasses.dataclass
class _InFlight:
    """What a thread has begun and not waited for."""

    wgmma: collections.deque = dataclasses.field(default_factory=collections.deque)
    copies: list = dataclasses.field(default_factory=list)
    """Of the group that is open."""
    groups: collections.deque = dataclasses.field(default_factory=collections.deque)


def _of_call(where, kind: type, *key, **new):
    """The barrier or work in flight with that key, of the call and the block that run now."""
    known = gpu_callbacks._get_shared_memory().__dict__.setdefault("taught", {})
    return known.setdefault((kind, tuple(map(int, where.cluster_coords)), *key), kind(**new))


def _named_barrier(token, where, thread, number, *, what, threads):
    time.sleep(random.random() * PAUSE)
    size = lambda thread: 32 if isinstance(thread, simulated.Warp) else 128
    with _changed:
        barrier = _of_call(where, _NamedBarrier, int(number), threads=threads)
        assert barrier.threads == threads, f"barrier {number} is of {barrier.threads} and of {threads} threads"
        assert thread not in barrier.came, f"{thread} came to barrier {number} twice before it fell"
        barrier.came.add(thread)
        here, fell = sum(map(size, barrier.came)), barrier.fell
        assert here <= threads, f"{here} threads came to barrier {number} of {threads}"
        if here == threads:
            barrier.came, barrier.fell = set(), fell + 1
            _changed.notify_all()
        if what == "sync":
            _wait_until(lambda: barrier.fell > fell, f"barrier {number}: {barrier.came} came, of {threads} threads")
    return token


def _fence(token, where, thread):
    del where
    gpu_callbacks._get_shared_memory().commit_smem(thread)
    return token


def _unobserved(method):
    """A consumer looks at the first record's signal and never again, which the interpreter takes for a mistake.

    One that did wait again would wait for a phase that is over, and give up.
    """

    def forgetful(self, *args, **kwargs):
        with self.cv:
            seen = self.last_observed_phase_by_thread
            ends = method.__name__ == "deallocate"
            if self.ref_count == 1 if ends else self.arrivals_count + 1 == self.num_arrivals:
                for thread in [x for x, phase in seen.items() if phase < self.phase - (not ends)]:
                    del seen[thread]
        return method(self, *args, **kwargs)

    return forgetful


def _read(where, thread, ref) -> np.ndarray:
    return np.asarray(gpu_callbacks._get(NONE, where, thread, ref, ())[1])


def _write(where, thread, ref, length: int, start: int, values) -> None:
    index = indexing.NDIndexer((indexing.Slice(start, len(values)),), (length,), ())
    gpu_callbacks._swap(NONE, where, thread, ref, (index,), np.asarray(values, np.int32), None)


def _change(token, where, thread, ref, index, *, change):
    """ref[index] = change(ref[index]); returns what it was."""
    with _changed:
        now = _read(where, thread, ref)
        _write(where, thread, ref, now.size, int(index), [change(int(now[index]))])
        _changed.notify_all()
        return token, now[index]


def _change_to(token, where, thread, ref, index, number):
    return _change(token, where, thread, ref, index, change=lambda x: max(x, int(number)))[0]


def _wait_turn(token, where, thread, turns, index, value):
    with _changed:
        _wait_until(lambda: bool(_read(where, thread, turns)[index] == value), f"turn {index} never was {value}")
    return token


def _zero_rows(token, where, thread, tile, part, first, end):
    """See hopper.zero_rows. Each of the warpgroups that call it zeroes all of them here."""
    rows = np.asarray(gpu_callbacks._get(NONE, where, thread, tile, part)[1])
    at = np.arange(len(rows))
    rows = np.where(((at >= first) & (at < end))[:, None], rows, np.zeros((), rows.dtype))
    gpu_callbacks._swap(NONE, where, thread, tile, part, rows, None)
    return token


def _store_rows(token, where, thread, tile, part, ref, to, row, column, first, end, *, across=False):
    """See hopper.store_rows and, `across`, store_row_values, whose rows are columns."""
    values = np.asarray(gpu_callbacks._get(NONE, where, thread, tile, part)[1])
    at, start = (column, row) if across else (row, column)
    low, high = max(int(at), int(first)), min(int(at) + len(values), int(end))
    if low >= high:
        return token
    values = values[low - at : high - at]
    shape = _access(ref, to)[1].shape
    rows = indexing.Slice(low, high - low)
    places = (indexing.Slice(int(start), 1), rows) if across else (rows, indexing.Slice(int(start), values.shape[1]))
    index = indexing.NDIndexer(places, shape, ())
    gpu_callbacks._swap(NONE, where, thread, ref, (*to, index), values[None] if across else values, None)
    return token


def _claim(token, where, thread, shared, records, at, own, item, done, *, begin, items, pitch, own_claims):
    """See mosaic_chunks._claim."""
    with _changed:
        numbers = _read(where, thread, shared)
        left = numbers[begin:]
        lengths, chunk = left[3 * pitch :][:items], left[3 * pitch + items]
        if item < 0 and left[:pitch].max() >= mosaic_chunks._LEFT:
            item = left[:pitch].argmax()
        record = -1, 0, done
        if item >= 0 and (own_claims or not own):
            place = left[item]
            _write(where, thread, shared, numbers.size, begin + int(item), [place - mosaic_chunks._LEFT + (own != 0)])
            number, first = divmod(int(place), mosaic_chunks._LEFT)
            if number > 0:
                start = (first if own else first + number - 1) * chunk
                record = item, start, min(lengths[item] - start, chunk) + done
        size = _read(where, thread, records).size
        _write(where, thread, records, size, int(at) * mosaic_chunks._FIELDS, [*record, 0])
    return token


# ---------------------------------------------------------------- memory


def _access(ref, transforms):
    """(what, where) the simulated memory knows a part of a reference by."""
    key = gpu_callbacks.HostAllocationKey.from_array(ref)
    transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
    return key, gpu_callbacks._get_shared_memory().access(key, transforms)


def _named_access(named: dict, name: str):
    return _access(named[f"{name}_allocation_key_as_array"], named[f"{name}_transforms"])


def _kept(named: dict) -> dict:
    """A callback's arguments, its arrays copied: they outlast it."""
    return {key: np.array(x) if key.endswith("_as_array") else x for key, x in named.items()}


def _wgmma_wait(n: int) -> None:
    """In the place of plgpu.wgmma_wait, which the interpreter leaves out."""

    @plgpu.inline_mgpu()
    def wait(_):
        return n

    wait()


def _commit_group() -> None:
    """In the place of plgpu.commit_smem_to_gmem_group, which the interpreter leaves out."""

    @plgpu.inline_mgpu()
    def commit(_):
        pass

    commit()


@gpu_callbacks.fail_on_exception
def _begin_wgmma(*, token, mesh_location, thread, **named):
    begun = functools.partial(_wgmma, mesh_location, thread, **_kept(named))
    _of_call(mesh_location, _InFlight, thread).wgmma.append(begun)
    return token


def _finish_wgmma(token, where, thread, *, left: int):
    """Until no more than so many are in flight."""
    begun = _of_call(where, _InFlight, thread).wgmma
    while len(begun) > left:
        begun.popleft()()
    return token


def _read_accumulator(plain, *, token, mesh_location, thread, wait_n, **named):
    if wait_n is not None:
        _finish_wgmma(token, mesh_location, thread, left=int(wait_n))
    return plain(token=token, mesh_location=mesh_location, thread=thread, wait_n=wait_n, **named)


def _wgmma(mesh_location, thread, source_info=None, **named) -> None:
    """As the interpreter's, with A in registers too; products of 2 byte numbers are exact, as in a tensor core."""
    shared = gpu_callbacks._get_shared_memory()
    info = simulated.GPULoggingInfo(mesh_location, thread, source_info)

    def value(name: str):
        given = np.asarray(named[f"{name}_allocation_key_as_array"])
        if given.ndim == 1:  # a reference
            given = shared.get_buffer_content(*_named_access(named, name), thread, logging_info=info)[0]
        return given.astype(np.float32)

    result = value("acc") + value("a") @ value("b")
    shared.store_buffer_content(*_named_access(named, "acc"), result, thread, logging_info=info)


@gpu_callbacks.fail_on_exception
def _begin_copy(plain, *, token, mesh_location, thread, commit_group, **named):
    in_flight = _of_call(mesh_location, _InFlight, thread)
    in_flight.copies.append(functools.partial(_copy_out, plain, token, mesh_location, thread, **_kept(named)))
    return _close_group(token, mesh_location, thread) if commit_group else token


def _close_group(token, where, thread):
    in_flight = _of_call(where, _InFlight, thread)
    in_flight.groups.append(in_flight.copies)
    in_flight.copies = []
    return token


@gpu_callbacks.fail_on_exception
def _wait_for_copies(*, token, mesh_location, thread, n, wait_read_only, source_info=None):
    """Both kinds of waits: what has been read is written here, too."""
    del wait_read_only, source_info
    groups = _of_call(mesh_location, _InFlight, thread).groups
    while len(groups) > n:
        for copy in groups.popleft():
            copy()
    return token


def _copy_out(plain, token, mesh_location, thread, source_info=None, reduction_op=None, **named) -> None:
    """As the interpreter's `copy_smem_to_gmem`, which cannot add."""
    if reduction_op is None:
        call = dict(token=token, mesh_location=mesh_location, thread=thread, source_info=source_info)
        plain(**call, reduction_op=None, commit_group=True, **named)
        return
    assert reduction_op == "add"
    shared = gpu_callbacks._get_shared_memory()
    info = simulated.GPULoggingInfo(mesh_location, thread, source_info)
    with _changed:
        value = shared.get_buffer_content(*_named_access(named, "src"), thread, logging_info=info)[0]
        key, access = _named_access(named, "dst")
        shape, _ = shared.get_buffer_content(key, shared.access(key, ()), thread, logging_info=info)[1]
        if inside := gpu_callbacks._clip_store_to_shape(access, value, shape):
            access, value = inside
            value = value + shared.get_buffer_content(key, access, thread, logging_info=info)[0]
            shared.store_buffer_content(key, access, value, thread, logging_info=info)


def _set_accumulator(_, tracer, idx, value) -> None:
    state_primitives.ref_set(tracer, idx, value)


def _run_state(body):
    """As pl.run_state, of accumulators and values in registers, by what the interpreter knows."""

    def run(values):
        values = [x._init if isinstance(x, plgpu.ACC) else jnp.asarray(x) for x in values]

        def scoped(*refs):
            for ref, value in zip(refs, values, strict=True):
                ref[...] = value
            body(refs)
            return [ref[...] for ref in refs]

        return pl.run_scoped(scoped, *(plgpu.ACC(x.shape, x.dtype) for x in values))

    return run


# ---------------------------------------------------------------- warps


def _outermost(run_scoped):
    """Marks where the kernel's own memory has been allocated: what follows is the kernel."""

    def marked(self, eqn, *args):
        if eqn.params["collective_axes"]:
            object.__setattr__(self, "_begins", True)
        return run_scoped(self, eqn, *args)

    return marked


def _apart(interpret):
    """Warps are threads from the start: else they would wait for each other at the end of every warp_map."""

    def interpret_apart(self, jaxpr, token, *args):
        if not self.__dict__.pop("_begins", False):
            return interpret(self, jaxpr, token, *args)

        def warp(i, token):
            where = dataclasses.replace(self.mesh_location, warp_id=i)
            one = dataclasses.replace(self, mesh_location=where, thread=self.thread.warp(i))
            return interpret(one, jaxpr, token, *args)[0]

        token = lax.cond(
            self.thread.warpgroup_id == self.num_threads_per_block - 1,
            lambda token: thread_map.thread_map(warp, 4, token, on_exception=gpu_callbacks.fail),
            lambda token: interpret(self, jaxpr, token, *args)[0],
            token,
        )
        return token, []

    return interpret_apart


def _warp_map(self, interpret, eqn, token, get_invals):
    if isinstance(self.thread, simulated.Warp):  # else a consumer, who does not come here
        (mesh,), (jaxpr,) = eqn.params["meshes"], eqn.params["jaxprs"]
        token, _ = interpret(dataclasses.replace(self, warp_mesh=mesh), jaxpr, token, *get_invals())
    return token, []
