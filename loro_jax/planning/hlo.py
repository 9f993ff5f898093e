"""Parser for the text of compiled programs (HLO): which instructions run, and how often.

In a compiled program, XLA's partitioner has inserted the collectives, and all shapes are those on
one device. Programs can be compiled for any number of simulated devices.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

# The text has one computation per block: a header "%name (parameters) -> result {", then one
# instruction per line, "%name = shape operation(%operand, ...), attributes".
# A layout may follow a shape: "{1,0:T(8,128)S(1)}", where S(1) is a TPU's memory on the chip.
_SHAPE = re.compile(
    r"\b(pred|bf16|f8e4m3fn|f8e5m2|c64|c128|[fsu]\d+)\[([\d,]*)\](?:\{[^{}]*?(?:S\((\d+)\))?\})?"
)
_HEADER = re.compile(r"^(ENTRY )?%(\S+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*)$")
_OPERATION = re.compile(r"(?:^|[\s)}])([a-z][a-z0-9-]*)\(")
_ITEM_BYTES = {"pred": 1, "bf16": 2, "f8e4m3fn": 1, "f8e5m2": 1, "c64": 8, "c128": 16}


class Shape(NamedTuple):
    """Shape and dtype of an array on one device.

    Attributes:
        dtype: XLA's name of it.
        sizes: sizes of the axes.
        space: number of the memory that it is in; 0 is the device's main memory.
    """

    dtype: str
    sizes: tuple[int, ...]
    space: int = 0

    @property
    def entries(self) -> int:
        """Number of entries."""
        return math.prod(self.sizes)

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return self.entries * (_ITEM_BYTES.get(self.dtype) or max(int(self.dtype[1:]) // 8, 1))


class Instruction(NamedTuple):
    """An instruction of a compiled program.

    Attributes:
        operation: name of the operation, such as "dot", "all-reduce" or "custom-call".
        results: shapes of the results.
        operands: shapes of the operands.
        inputs: names of the instructions whose results are the operands.
        text: the whole line.
        times: executions per call of the program; a loop whose trip count is unknown counts once.
    """

    operation: str
    results: tuple[Shape, ...]
    operands: tuple[Shape, ...]
    inputs: tuple[str, ...]
    text: str
    times: int


class Program:
    """The computations of a compiled program.

    Attributes:
        entry: name of the computation that a call of the program executes.
    """

    def __init__(self, hlo: str, branch: Callable[[Sequence[int]], int] = max):
        """Parses a program.

        Args:
            hlo: ``compiled.as_text()``.
            branch: as for :func:`read_instructions`.
        """
        self._lines, self.entry = _computations(hlo)
        self._branch = branch
        # Cached, because a computation may be called from several places.
        self.instructions = functools.cache(self._instructions)
        self._size = functools.cache(self._size_of)

    def lines(self, computation: str) -> dict[str, str]:
        """Returns the lines of a computation by the names of their results; {} if unknown."""
        return self._lines.get(computation, {})

    def calls(self, line: str) -> Iterator[tuple[str, int]]:
        """Yields the computations that a line calls, and how often."""
        operation = operation_of(line)
        if operation == "while":
            called = dict(re.findall(r"\b(body|condition)=%([^\s,)]+)", line))
            trips = self._trips(line, called.get("condition", ""))
            yield from ((name, trips) for name in called.values())
        elif operation == "conditional":
            names = re.findall(r"(?:true|false)_computation=%([^\s,)]+)", line)
            listed = re.search(r"branch_computations=\{([^}]*)\}", line)
            names += re.findall(r"%([^\s,}]+)", listed[1]) if listed else []
            sizes = [self._size(name) for name in names]
            # XLA has conditionals of its own, for steps of a product that is shared by devices.
            scope = re.search(r'op_name="([^"]*)"', line)
            added = scope and not scope[1].endswith("cond")
            yield names[sizes.index(max(sizes) if added else self._branch(sizes))], 1
        else:
            # Fusions and calls; the reducers of all-reduce and reduce are read too, harmlessly.
            for name in re.findall(r"\b(?:to_apply|calls)=%([^\s,)}]+)", line):
                yield name, 1

    def _trips(self, line: str, condition: str) -> int:
        """Returns the trip count of a loop: the one noted, or n of "counter < n" (on a TPU)."""
        noted = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', line)
        if noted:
            return int(noted[1])
        lines = self.lines(condition)
        root = list(lines.values())[-1] if lines else ""
        compared = re.search(r" compare\(%\S+, %([^\s,)]+)\), direction=LT", root)
        limit = re.search(r" constant\((\d+)\)", lines.get(compared[1], "")) if compared else None
        return int(limit[1]) if limit else 1

    def _size_of(self, name: str) -> int:
        """Counts the instructions of a computation and of those that it calls: ranks branches."""
        lines = self.lines(name).values()
        return len(lines) + sum(self._size(called) for x in lines for called, _ in self.calls(x))

    def _instructions(self, name: str) -> dict[str, Instruction]:
        """Returns the instructions of a computation, without those that it calls, by name."""
        lines = self.lines(name)
        return {key: _instruction(operation_of(line), line, lines) for key, line in lines.items()}


def read_instructions(
    hlo: str, operations: Sequence[str], branch: Callable[[Sequence[int]], int] = max
) -> list[Instruction]:
    """Reads the instructions that one call of a program executes, counting those in loops.

    Args:
        hlo: ``compiled.as_text()``.
        operations: names of the operations to read.
        branch: which branch of the program's conditionals to read: that with the most (``max``) or
            the fewest (``min``) instructions. An exact step of LORO takes the former. Of a
            conditional that XLA adds, the larger is read.

    Returns:
        One entry per instruction and call site.

    Example:
        >>> hlo = '''
        ... ENTRY %main (x: f32[8,4]) -> f32[8,8] {
        ...   %x = f32[8,4]{1,0} parameter(0)
        ...   ROOT %y = f32[8,8] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
        ... }'''
        >>> (found,) = read_instructions(hlo, ["dot"])
        >>> found.results[0].sizes, found.operands[0].sizes, found.times
        ((8, 8), (8, 4), 1)
    """
    program = Program(hlo, branch)

    @functools.cache
    def inside(name: str) -> tuple[Instruction, ...]:
        lines = program.lines(name)
        found = []
        for line in lines.values():
            operation = operation_of(line)
            if operation in operations:
                found.append(_instruction(operation, line, lines))
            for called, times in program.calls(line):
                found += [one._replace(times=one.times * times) for one in inside(called)]
        return tuple(found)

    return list(inside(program.entry))


def _computations(hlo: str) -> tuple[dict[str, dict[str, str]], str]:
    """Splits a program into lines by computation and result; returns them and the entry's name."""
    found: dict[str, dict[str, str]] = {}
    entry, current = "", ""
    for line in hlo.splitlines():
        header = _HEADER.match(line)
        if header:
            current = header[2]
            found[current] = {}
            entry = current if header[1] else entry
            continue
        instruction = _INSTRUCTION.match(line)
        if instruction and current:
            found[current][instruction[1]] = re.sub(r"/\*.*?\*/", "", instruction[2])
    return found, entry


def operation_of(line: str) -> str:
    """Returns the name of a line's operation; "" without one."""
    found = _OPERATION.search(line)
    return found[1] if found else ""


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(
        Shape(dtype, tuple(int(n) for n in sizes.split(",") if n), int(space or 0))
        for dtype, sizes, space in _SHAPE.findall(text)
    )


def _instruction(operation: str, line: str, lines: dict[str, str]) -> Instruction:
    result, _, rest = line.partition(f" {operation}(")
    operands: list[Shape] = []
    # Operands are given by name: their shapes are those in their definitions.
    inputs = re.findall(r"%([^\s,()]+)", rest.partition(")")[0])
    for name in inputs:
        definition = lines.get(name, "")
        operands += _shapes(definition.partition(f" {operation_of(definition)}(")[0])
    return Instruction(operation, _shapes(result), tuple(operands), tuple(inputs), line, 1)
