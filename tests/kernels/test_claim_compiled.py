"""How blocks claim chunks of the backward's items (mosaic_chunks.py): by the PTX that ptxas gets, run in ptx.py."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import ptx
import pytest
from h100 import h100s, on

from zigzag_jax.kernels.flash import mosaic, mosaic_chunks
from zigzag_jax.kernels.flash.contract import Settings
from zigzag_jax.ranges import KeyRange

pytestmark = pytest.mark.aot

HEADS, ROWS = 27, 640
ITEMS, PITCH = HEADS * ROWS // 128, 136  # 135, more than multiprocessors: no head's group is split
LATE = range(120, ITEMS)  # owners that begin when all others have ended: helpers do what they leave
SHARES = 1 << 40  # where they lie in memory
OPERANDS = {  # by an instruction of _claim that has them
    "shared": r"mad\.wide\.s32 a, item, 4, (%\w+)",
    "records": rf"mad\.lo\.s32 i, %\w+, {4 * mosaic_chunks._FIELDS}, (%\w+)",
    "at": rf"mad\.lo\.s32 i, (%\w+), {4 * mosaic_chunks._FIELDS}, %\w+",
    "own": r"setp\.ne\.s32 owner, (%\w+), 0",
    "item": r"mov\.b32 item, (%\w+)",
    "done": r"write:\s+add\.s32 left, left, (%\w+)",
}


@pytest.fixture
def claim(compiler_says) -> tuple[ptx.Program, dict[str, str]]:
    """The PTX of a claim, and the registers that its operands are in."""
    array = lambda *shape, dtype=jnp.bfloat16: on(h100s(1), shape, dtype)
    x, stats = array(1, ROWS, HEADS, 128), array(1, HEADS, ROWS, dtype=jnp.float32)
    bounds, dq = array(1, ROWS, dtype=jnp.int32), array(1, ROWS, HEADS, 128, dtype=jnp.float32)

    def backward(x, stats, bounds, dq):
        keys, settings = KeyRange(bounds, bounds), Settings(0.1, None)
        return mosaic.flash_bwd(x, x, x, stats, stats, x, keys, settings, dq, deterministic=False)

    text = compiler_says(backward, x, stats, bounds, dq)
    blocks = re.findall(r"// begin inline asm\s*(\{.*?\})\s*// end", text, re.DOTALL)
    for block in [block for block in blocks if "search:" in block]:
        registers = {name: re.findall(pattern, block)[-1] for name, pattern in OPERANDS.items()}
        if len(set(registers.values())) == len(registers):  # a helper's first claim has constants, which share some
            return ptx.Program(block), registers
    pytest.fail("no claim whose operands are all registers of their own")


@dataclasses.dataclass(eq=False)
class Block:
    """The owner of an item, or a helper: -1."""

    number: int
    item: int
    done: int
    at: int = 0

    @property
    def records(self) -> int:
        """Where they lie in memory."""
        return 4096 + 4 * mosaic_chunks.SIZE * self.number


@pytest.mark.parametrize(("longest", "whole"), [(16, False), (60, False), (4096, False), (60, True)])
def test_every_tile_is_claimed_once(claim, longest, whole):
    program, names = claim
    rng = np.random.default_rng(longest)
    lengths = rng.integers(0, longest + 1, ITEMS) * (rng.random(ITEMS) < 0.9)
    shares = mosaic_chunks.shares(jnp.asarray(lengths, jnp.int32), jnp.float32(lengths.sum()), longest, 8, whole)
    before, chunk = np.asarray(shares), int(shares[-1])
    memory = {SHARES + 4 * i: int(x) for i, x in enumerate(before)}
    claimed: list[list[tuple[int, int]]] = [[(0, min(n, chunk))] for n in lengths.tolist()]  # the first: its owner's
    owners = [Block(item, item, tiles[0][1]) for item, tiles in enumerate(claimed)]
    waiting = owners + [Block(ITEMS + i, -1, 0) for i in range(16)]
    running = []

    def begin(block: Block):
        memory.update({block.records + 4 * i: -77 for i in range(mosaic_chunks.SIZE)})
        own = int(block.number < ITEMS)
        values = dict(shared=SHARES, records=block.records, at=block.at, own=own, item=block.item, done=block.done)
        return block, ptx.run(program, {names[name]: value for name, value in values.items()}, memory)

    def end(block: Block):
        records = [memory[block.records + 4 * i] for i in range(mosaic_chunks.SIZE)]
        item, first, done, _ = records[block.at * mosaic_chunks._FIELDS :][: mosaic_chunks._FIELDS]
        assert records.count(-77) == mosaic_chunks._FIELDS  # the other record is as it was
        if done == block.done:
            assert item == -1
            if block.item == -1:  # it looked for one, and what is left only shrinks
                assert all(memory[SHARES + 4 * i] < mosaic_chunks._LEFT for i in range(ITEMS))
            return
        assert block.item in (-1, item)
        claimed[item].append((first, first + done - block.done))
        block.item, block.done, block.at = item, done, 1 - block.at
        waiting.append(block)

    while waiting or running:
        awake = [block for block in waiting if not running or block.number not in LATE]
        if awake and len(running) < 20:
            waiting.remove(block := awake[int(rng.integers(len(awake)))])
            running.append(begin(block))
        at = int(rng.integers(len(running)))
        block, steps = running[at]
        if next(steps, "ended") == "ended":
            del running[at]
            end(block)
    for length, tiles in zip(lengths.tolist(), claimed, strict=True):
        assert len(tiles) == max(-(-length // chunk), 1)
        assert [at for part in sorted(tiles) for at in range(*part)] == list(range(length))
    after = np.asarray([memory[SHARES + 4 * i] for i in range(before.size)])
    np.testing.assert_array_equal(after[PITCH:], before[PITCH:])  # only the chunks left are counted
