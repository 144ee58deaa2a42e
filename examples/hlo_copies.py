"""What a scheduled program only moves: copies on one device, those that XLA hid in its fusions too.

A fusion is a copy where a result of it is an argument laid out anew, cut, joined, repeated or put into a larger array,
and nothing is computed on the way:

    %wrapped_slice = bf16[8192,512] fusion(%qkv), calls=%inside     inside: parameter, slice

Nothing of a `bitcast` is moved; and what a kernel reads through a slice that was fused into it is no copy.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from zigzag_jax.hlo import Array, Instruction, Program

# by how many of its operands an instruction passes on; the rest are places and fillers
_MOVES = dict.fromkeys(("copy", "copy-start", "transpose", "bitcast", "reshape", "slice", "dynamic-slice", "pad",
                        "reverse", "broadcast"), 1) | {"concatenate": None}  # fmt: skip


class Copy(NamedTuple):
    """An array that one launch copies."""

    array: Array
    """What arrives; of an update of a larger array, the part."""
    times: float
    """How often it runs."""
    name: str
    """Of the launch."""
    source: str
    """As Instruction.source."""


def copies(program: Program, least: int = 1) -> list[Copy]:
    """Every copy of an array of at least so many bytes, in loops and branches too."""
    return [
        Copy(array, times, x.name, x.source)
        for name, times in program.launched()
        for x in program.computations[name]
        for array in _copied(program, x)
        if array.size >= least
    ]


def _copied(program: Program, x: Instruction) -> Iterator[Array]:
    """The results of one launch that are nothing but its arguments."""
    if x.opcode in _MOVES and x.opcode not in ("bitcast", "broadcast"):
        yield x.arrays[0]
    if x.opcode not in ("fusion", "fusion-start"):
        return
    for called in x.calls:
        inside = {y.name: y for y in program.computations[called]}
        root = program.computations[called][-1]
        for result in root.operands if root.opcode == "tuple" else (root.name,):
            y = inside[result]
            while y.opcode == "bitcast":
                y = inside[y.operands[0]]
            part = y.operands[1] if y.opcode == "dynamic-update-slice" else result
            if any(arguments := list(_arguments(inside, part))) and None not in arguments:
                yield inside[part].arrays[0]


def _arguments(inside: Mapping[str, Instruction], name: str) -> Iterator[Array | None]:
    """The arguments of a fusion that one of its values is moved from; None among them where it is computed."""
    x = inside[name]
    if x.opcode == "parameter":
        yield x.arrays[0]
    elif x.opcode in _MOVES:
        for operand in x.operands[: _MOVES[x.opcode]]:
            yield from _arguments(inside, operand)
    elif x.opcode not in ("constant", "iota"):
        yield None


__all__ = ["Copy", "copies"]
