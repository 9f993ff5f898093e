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
_SHAPE = re.compile(r"\b(pred|bf16|f8e4m3fn|f8e5m2|c64|c128|[fsu]\d+)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%(\S+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*)$")
_OPERATION = re.compile(r"(?:^|[\s)}])([a-z][a-z0-9-]*)\(")
_ITEM_BYTES = {"pred": 1, "bf16": 2, "f8e4m3fn": 1, "f8e5m2": 1, "c64": 8, "c128": 16}


class Shape(NamedTuple):
    """Shape and dtype of an array on one device."""

    dtype: str
    sizes: tuple[int, ...]

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
        text: the whole line.
        times: executions per call of the program; a loop whose trip count XLA does not know
            counts once.
    """

    operation: str
    results: tuple[Shape, ...]
    operands: tuple[Shape, ...]
    text: str
    times: int


def read_instructions(
    hlo: str, operations: Sequence[str], branch: Callable[[Sequence[int]], int] = max
) -> list[Instruction]:
    """Reads the instructions that one call of a program executes, counting those in loops.

    Args:
        hlo: ``compiled.as_text()``.
        operations: names of the operations to read.
        branch: which branch of a conditional to read: that with the most (``max``) or the fewest
            (``min``) instructions. An exact step of LORO takes the former.

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
    computations, entry = _computations(hlo)

    # Number of instructions of a computation, with those that it calls: ranks branches.
    @functools.cache
    def size(name: str) -> int:
        lines = computations.get(name, {}).values()
        return len(lines) + sum(size(called) for line in lines for called, _ in calls(line))

    def calls(line: str) -> Iterator[tuple[str, int]]:
        """Yields the computations that a line calls, and how often."""
        operation = _operation(line)
        if operation == "while":
            count = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', line)
            for name in re.findall(r"(?:body|condition)=%([^\s,)]+)", line):
                yield name, int(count[1]) if count else 1
        elif operation == "conditional":
            names = re.findall(r"(?:true|false)_computation=%([^\s,)]+)", line)
            listed = re.search(r"branch_computations=\{([^}]*)\}", line)
            names += re.findall(r"%([^\s,}]+)", listed[1]) if listed else []
            yield names[[size(n) for n in names].index(branch([size(n) for n in names]))], 1
        else:
            # Fusions and calls; the reducers of all-reduce and reduce are read too, harmlessly.
            for name in re.findall(r"\b(?:to_apply|calls)=%([^\s,)}]+)", line):
                yield name, 1

    # Cached, because a computation may be called from several places.
    @functools.cache
    def inside(name: str) -> tuple[Instruction, ...]:
        lines = computations.get(name, {})
        found = []
        for line in lines.values():
            operation = _operation(line)
            if operation in operations:
                found.append(_instruction(operation, line, lines))
            for called, times in calls(line):
                found += [one._replace(times=one.times * times) for one in inside(called)]
        return tuple(found)

    return list(inside(entry))


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


def _operation(line: str) -> str:
    found = _OPERATION.search(line)
    return found[1] if found else ""


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(
        Shape(dtype, tuple(int(n) for n in sizes.split(",") if n))
        for dtype, sizes in _SHAPE.findall(text)
    )


def _instruction(operation: str, line: str, lines: dict[str, str]) -> Instruction:
    result, _, rest = line.partition(f" {operation}(")
    operands: list[Shape] = []
    # Operands are given by name: their shapes are those in their definitions.
    for name in re.findall(r"%([^\s,()]+)", rest.partition(")")[0]):
        definition = lines.get(name, "")
        operands += _shapes(definition.partition(f" {_operation(definition)}(")[0])
    return Instruction(operation, _shapes(result), tuple(operands), line, 1)
