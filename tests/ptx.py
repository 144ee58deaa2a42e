"""PTX of a warp, run instruction by instruction: what a kernel spells out, which interpreted.py replaces by Python.

As much of PTX as `mosaic_chunks._claim` needs; another instruction is an error, and so are an address that is not
aligned or not there and lanes that do not all come to the same `.sync`. A register that was never set holds rubbish.
"""

import operator
import re
from collections.abc import Iterator
from typing import NamedTuple

LANES = 32
RUBBISH = -0x2BADBEEF
Memory = dict[int, int]
"""Words by their addresses."""
Registers = dict[str, int]

_COMPARE = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "ge", "gt")}
_COMPUTE = {
    "mov": lambda a: a,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "min": min,
    "max": max,
    "and": operator.and_,
    "shl": operator.lshift,
    "shr": operator.rshift,
    "mad": lambda a, b, c: a * b + c,
    "bfind": lambda a: (a & 0xFFFFFFFF).bit_length() - 1,
}


class Instruction(NamedTuple):
    """One of a program: `@!guard name.modifier args`."""

    guard: str
    name: str
    modifiers: list[str]
    args: list[str]


class Program:
    """The instructions of a block `{ .. }` of PTX."""

    def __init__(self, text: str) -> None:
        self.labels: dict[str, int] = {}
        self.instructions: list[Instruction] = []
        for statement in re.findall(r"\w+:|[^;:]+;", re.sub(r"\.reg[^;]*;", "", text.strip()[1:-1])):
            if statement.endswith(":"):
                self.labels[statement[:-1]] = len(self.instructions)
                continue
            (found,) = re.findall(r"^\s*(@!?\w+)?\s*(\S+)\s*(.*);$", statement, re.DOTALL)
            guard, operation, args = found
            name, *modifiers = operation.split(".")
            args = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", args)
            self.instructions.append(Instruction(guard, name, modifiers, args))


def run(program: Program, registers: Registers, memory: Memory) -> Iterator[None]:
    """Run it in a warp whose registers these are; stops wherever the lanes meet, for other warps to go on."""
    lanes = [_Lane(program, registers | {"%laneid": number}, memory) for number in range(LANES)]
    while lanes[0].step():
        for lane in lanes[1:]:
            lane.step()
        assert len({lane.place for lane in lanes}) == 1, "lanes came to different barriers"
        _together(program.instructions[lanes[0].place], lanes)
        yield
    assert not any(lane.step() for lane in lanes[1:]), "lanes wait at a barrier for one that has ended"


class _Lane:
    def __init__(self, program: Program, registers: Registers, memory: Memory) -> None:
        self.program, self.registers, self.memory, self.place = program, registers, memory, 0

    def step(self) -> bool:
        """Go on to where lanes meet, or to the end; whether it is not the end."""
        while self.place < len(self.program.instructions):
            instruction = self.program.instructions[self.place]
            if "sync" in instruction.modifiers:
                return True
            self.place += 1
            guard = instruction.guard.lstrip("@!")
            if not guard or bool(self.registers[guard]) != ("!" in instruction.guard):
                self._do(instruction)
        return False

    def value(self, arg: str) -> int:
        return int(arg, 0) if re.match(r"-?\d", arg) else self.registers.get(arg, RUBBISH)

    def _address(self, arg: str, words: int = 1) -> int:
        found = sum(self.value(part.strip()) for part in arg[1:-1].split("+"))
        assert found % (4 * words) == 0, f"{arg} is {found}, which is not aligned for {words} words"
        return found

    def _do(self, instruction: Instruction) -> None:
        _, name, modifiers, args = instruction
        if name == "bra":
            self.place = self.program.labels[args[0]]
        elif name == "ld":
            names = re.findall(r"\w+", args[0])
            address = self._address(args[1], len(names))
            self.registers |= {x: self.memory[address + 4 * i] for i, x in enumerate(names)}
        elif name == "st":
            values = [self.value(x.strip()) for x in args[1].strip("{}").split(",")]
            address = self._address(args[0], len(values))
            for i, value in enumerate(values):
                assert address + 4 * i in self.memory, f"{args[0]} is not there"
                self.memory[address + 4 * i] = value
        elif name == "atom":
            assert "add" in modifiers
            address = self._address(args[1])
            self.registers[args[0]] = self.memory[address]
            self.memory[address] = _signed(self.memory[address] + self.value(args[2]))
        elif name == "setp":
            self.registers[args[0]] = _COMPARE[modifiers[0]](*map(self.value, args[1:]))
        elif name == "selp":
            self.registers[args[0]] = self.value(args[1] if self.registers[args[3]] else args[2])
        else:
            found = _COMPUTE[name](*map(self.value, args[1:]))
            self.registers[args[0]] = found if "wide" in modifiers else _signed(found)


def _together(instruction: Instruction, lanes: list[_Lane]) -> None:
    """What all lanes do at once."""
    _, name, modifiers, args = instruction
    of_all = lambda: [lane.value(args[1]) for lane in lanes]
    match [name, *modifiers[:2]]:
        case ["bar", "warp", "sync"]:
            found = []
        case ["redux", "sync", "max"]:
            found = [max(of_all())] * LANES
        case ["vote", "sync", "ballot"]:
            found = [_signed(sum(1 << i for i, x in enumerate(of_all()) if x))] * LANES
        case ["shfl", "sync", "idx"]:
            found = [lanes[lane.value(args[2])].value(args[1]) for lane in lanes]
        case _:
            raise NotImplementedError(f"{name}.{'.'.join(modifiers)}")
    for lane in lanes:
        lane.place += 1
    for lane, value in zip(lanes, found, strict=False):
        lane.registers[args[0]] = value


def _signed(x: int) -> int:
    return (x + (1 << 31)) % (1 << 32) - (1 << 31)
