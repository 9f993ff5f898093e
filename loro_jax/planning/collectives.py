"""Collectives in compiled programs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from loro_jax.planning.hlo import Instruction, read_instructions

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """A collective operation.

    Attributes:
        kind: one of :data:`KINDS`.
        bytes: size of the array on one device: the result of an all-gather, the operand of the
            others.
        groups: groups of devices, one row per group; of a permute, the pairs (from, to) of
            different devices.
        times: executions per step; a loop whose trip count XLA does not know counts once.
    """

    kind: str
    bytes: int
    groups: tuple[tuple[int, ...], ...]
    times: int

    @property
    def sent(self) -> float:
        """Bytes that one device sends in total, with algorithms that send the least (rings)."""
        if self.kind == "collective-permute":
            return float(self.bytes * self.times)
        size = max(map(len, self.groups))
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.bytes * self.times * (size - 1) / size


def read_collectives(
    hlo: str, devices: int, branch: Callable[[Sequence[int]], int] = max
) -> list[Collective]:
    """Reads the collectives in one call of a compiled program.

    Args:
        hlo: ``compiled.as_text()``.
        devices: number of devices that it was compiled for.
        branch: as for :func:`loro_jax.planning.hlo.read_instructions`.

    Returns:
        One entry per instruction in which more than one device takes part.

    Example:
        >>> hlo = '''
        ... ENTRY %main (x: f32[8]) -> f32[8] {
        ...   %x = f32[8]{0} parameter(0)
        ...   ROOT %y = f32[8]{0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
        ... }'''
        >>> (found,) = read_collectives(hlo, 4)
        >>> found.kind, found.bytes, found.groups, found.sent
        ('all-reduce', 32, ((0, 1), (2, 3)), 32.0)
    """
    # An asynchronous collective is two instructions, of which the first has all information.
    operations = (*KINDS, *(f"{kind}-start" for kind in KINDS))
    read = [_collective(one, devices) for one in read_instructions(hlo, operations, branch)]
    return [one for one in read if one is not None]


def _collective(instruction: Instruction, devices: int) -> Collective | None:
    kind, text = instruction.operation.removesuffix("-start"), instruction.text
    if kind == "collective-permute":
        listed = re.search(r"source_target_pairs=\{(.*?\})\}", text)
        groups = tuple(pair for pair in _listed(listed[1] if listed else "") if pair[0] != pair[1])
    else:
        groups = _groups(text, devices)
    if max(map(len, groups), default=1) == 1:
        return None
    if kind == "all-gather":
        size = sum(shape.bytes for shape in instruction.operands) * len(groups[0])
    else:
        size = sum(shape.bytes for shape in instruction.operands)
    return Collective(kind, size, groups, instruction.times)


def _listed(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(
        tuple(int(n) for n in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", text)
    )


def _groups(line: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Parses ``replica_groups=``, in any of XLA's three notations."""
    mesh = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", line)
    if mesh:
        return _groups_of_axes(*mesh.groups())
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=(\S+?)(?:, |$)", line)
    if iota:
        rows, columns = (int(n) for n in iota[1].split(","))
        return _rows(_iota(iota[2]).reshape(rows, columns))
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", line)
    return _listed(listed[1]) if listed else (tuple(range(devices)),)


def _groups_of_axes(mesh: str, ids: str | None, axes: str) -> tuple[tuple[int, ...], ...]:
    """Returns groups along axes of a mesh, or along parts ``axis:(before)size`` of axes."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    wanted = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes)
    shape: list[int] = []
    chosen: list[int] = []
    # Split every mesh axis into (before, part, rest) for each part that is named, remember the axes
    # of the parts, and move these last: every row is then one group.
    for name, size in sizes.items():
        parts = [(int(before), int(part)) for n, before, part in wanted if n == name and before]
        if any(n == name and not before for n, before, _ in wanted):
            parts = [(1, size)]
        done = 1
        for before, part in sorted(parts):
            shape += [before // done, part]
            chosen.append(len(shape) - 1)
            done = before * part
        shape.append(size // done)
    numbers = _iota(ids) if ids else np.arange(math.prod(sizes.values()))
    rest = [i for i in range(len(shape)) if i not in chosen]
    ways = math.prod(shape[i] for i in chosen)
    return _rows(numbers.reshape(shape).transpose(rest + chosen).reshape(-1, ways))


def _iota(text: str) -> np.ndarray:
    """Parses ``[4,2]T(1,0)``: the numbers from 0 in that shape, transposed and flattened."""
    shape = [int(n) for n in re.findall(r"\d+", text.split("T")[0])]
    numbers = np.arange(math.prod(shape)).reshape(shape)
    if "T" in text:
        numbers = numbers.transpose([int(n) for n in re.findall(r"\d+", text.split("T")[1])])
    return numbers.reshape(-1)


def _rows(groups: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in groups.tolist())
