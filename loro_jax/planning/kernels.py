"""Kernels of programs compiled for a GPU or a TPU: what each must compute and move.

A kernel is an instruction outside fusions: a fusion, a product, a copy. It moves at least its
operands and its results once, and of an operand only the part that it uses: a loop over layers
slices the weights of one layer off those of all, inside fusions. Collectives are not kernels, see
:mod:`loro_jax.planning.collectives`.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from loro_jax.planning.accelerators import Accelerator
from loro_jax.planning.collectives import KINDS
from loro_jax.planning.hlo import Instruction, Program, Shape

# Named scopes of the model and the step; "rest" is norms, embedding, clipping, and what the
# compiler adds.
PARTS = ("attention", "mlp", "loss", "optimizer", "rest")

# Instructions that execute others, which are kernels themselves.
_CALLS = ("while", "conditional", "call", "async-start")
# Instructions that take no time.
_NOTHING = (
    *("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "iota", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "domain"),
)
# Instructions that need all of their operands for any of their results.
_WHOLE = ("reduce", "reduce-window", "dot", "convolution", "custom-call", "tuple")
_SLICES = ("dynamic-slice", "slice", "gather")


class Kernel(NamedTuple):
    """A kernel, with all its calls in a step.

    Attributes:
        part: one of :data:`PARTS`.
        flops: operations of its matrix products.
        bytes: bytes read from and written to the device's main memory.
        precision: of the products: "bfloat16", "float32" (JAX's default for it) or "exact".
        calls: calls per step.
    """

    part: str
    flops: float
    bytes: float
    precision: str
    calls: int

    def seconds(self, accelerator: Accelerator) -> float:
        """Returns a lower bound on the time, at an accelerator's peaks."""
        peak = {
            "bfloat16": accelerator.flops,
            "float32": accelerator.float32_flops,
            "exact": accelerator.exact_flops,
        }[self.precision]
        return max(self.flops / peak, self.bytes / accelerator.memory_bandwidth)


def read_kernels(hlo: str, branch: Callable[[Sequence[int]], int] = max) -> list[Kernel]:
    """Reads the kernels that one call of a compiled program executes.

    Args:
        hlo: ``compiled.as_text()`` of a program for a GPU or a TPU.
        branch: as for :func:`loro_jax.planning.hlo.read_instructions`.

    Returns:
        One entry per instruction and call site.

    Example:
        >>> hlo = '''
        ... ENTRY %main (x: bf16[8,4]) -> bf16[8,8] {
        ...   %x = bf16[8,4]{1,0} parameter(0)
        ...   ROOT %y = bf16[8,8] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
        ... }'''
        >>> read_kernels(hlo)
        [Kernel(part='rest', flops=512.0, bytes=256, precision='bfloat16', calls=1)]
    """
    program = Program(hlo, branch)
    on_tpu = ":T(" in hlo  # only TPUs tile arrays, and keep some in memory on the chip

    def visit(name: str, times: int) -> Iterator[Kernel]:
        instructions = program.instructions(name)
        for one in instructions.values():
            operation = one.operation
            if operation in _CALLS:
                for called, count in program.calls(one.text):
                    # Counting a loop's calls is no kernel.
                    if not re.search(rf"condition=%{re.escape(called)}[,\s]", one.text):
                        yield from visit(called, times * count)
            elif not _takes_no_time(program, one):
                found = list(_products(program, one))
                yield Kernel(
                    _part(program, one),
                    times * sum(flops for flops, _ in found),
                    times * _traffic(program, one, instructions, on_tpu),
                    # The product with the most operations, of the rare kernels with several.
                    max(found, default=(0.0, "bfloat16"))[1],
                    times,
                )

    return list(visit(program.entry, 1))


def part_of(line: str) -> str:
    """Returns the part of the step, one of :data:`PARTS`, that an instruction's line belongs to."""
    scopes = re.search(r'op_name="([^"]*)"', line)
    return part_of_scopes(scopes[1] if scopes else "")


def part_of_scopes(scopes: str) -> str:
    """Returns the part of the step, one of :data:`PARTS`, that nested scopes belong to.

    Example:
        >>> part_of_scopes("jit(f)/transpose(jvp(mlp))/dot_general")
        'mlp'
    """
    names = re.findall(r"\w+", scopes)  # a transformed scope reads transpose(jvp(mlp))
    return next((part for part in PARTS if part in names), "rest")


def _part(program: Program, one: Instruction) -> str:
    """Returns the part of a kernel; of a fusion without scope, that of an instruction in it."""
    if one.operation != "fusion" or "op_name=" in one.text:
        return part_of(one.text)
    lines = [
        line for called, _ in program.calls(one.text) for line in program.lines(called).values()
    ]
    found = {part_of(line) for line in lines}
    return next(part for part in PARTS if part in found or part == "rest")


def _takes_no_time(program: Program, one: Instruction) -> bool:
    if one.operation == "custom-call" and not one.inputs:  # allocates, or hints to the compiler
        return True
    inside = [one.operation]
    if one.operation == "fusion":  # on a TPU, it may be the start of a collective
        inside += _operations(program, one)
    return (
        any(operation.removesuffix("-start") in KINDS for operation in inside)
        or one.operation in _NOTHING
        or one.operation.endswith("-done")
    )


def _operations(program: Program, fusion: Instruction) -> list[str]:
    called = [name for name, _ in program.calls(fusion.text)]
    return [one.operation for name in called for one in program.instructions(name).values()]


# Memory traffic.


def _traffic(
    program: Program, one: Instruction, instructions: dict[str, Instruction], on_tpu: bool
) -> int:
    """Returns the bytes of main memory that one call of a kernel reads and writes."""

    def size(shapes: Sequence[Shape]) -> int:
        return sum(shape.bytes for shape in shapes if not (on_tpu and shape.space))

    def given(name: str) -> tuple[Shape, ...]:
        return instructions[name].results if name in instructions else ()

    if one.operation.endswith("-start"):
        # An asynchronous copy, or slice: its results are the target and the source, in any order.
        moved = min(one.results[:2], key=lambda shape: shape.entries).sizes
        return size([shape._replace(sizes=moved) for shape in one.results[:2]])
    if one.operation in _SLICES:
        return 2 * size(one.results)
    if one.operation == "dynamic-update-slice":
        return 2 * size(given(one.inputs[1]))
    if one.operation == "scatter":
        return 2 * size(given(one.inputs[-1]))
    if one.operation != "fusion":
        return size(one.operands) + size([x for x in one.results if not _is_workspace(one, x)])
    (called,) = (name for name, _ in program.calls(one.text))
    read = 0
    for name, share in zip(one.inputs, _used(program, called), strict=True):
        read += round(share * size(given(name)))
    written = zip(one.results, _written(program, called, len(one.results)), strict=True)
    return read + sum(
        round(share * size([shape])) for shape, share in written if not _is_workspace(one, shape)
    )


def _is_workspace(one: Instruction, shape: Shape) -> bool:
    """Returns whether a result of a kernel is scratch memory of a library's, such as cuBLAS'."""
    return len(one.results) > 1 and shape.dtype in ("s8", "u8") and len(shape.sizes) == 1


def _used(program: Program, computation: str) -> list[float]:
    """Returns the share of each parameter of a fused computation that is read."""
    instructions = program.instructions(computation)
    # From the last instruction to the first: how many entries of each are used by later ones. What
    # computes entry by entry needs as many entries of its operands as of its result.
    needed = dict.fromkeys(instructions, 0)
    root = list(instructions)[-1]
    needed[root] = _entries(instructions[root])
    for name in reversed(instructions):
        one = instructions[name]
        shares = _used_by(program, one, needed[name]) if needed[name] else []
        for operand, entries in zip(one.inputs, shares, strict=False):
            whole = _entries(instructions[operand])
            needed[operand] = min(needed[operand] + min(round(entries), whole), whole)
    parameters = {
        int(found[1]): needed[name] / max(_entries(one), 1)
        for name, one in instructions.items()
        if (found := re.search(r" parameter\((\d+)\)", one.text))
    }
    return [parameters[i] for i in sorted(parameters)]


def _used_by(program: Program, one: Instruction, needed: int) -> list[float]:
    """Returns how many entries of each operand are needed for that many entries of the result."""
    operands = [shape.entries for shape in one.operands]
    if one.operation in (*_SLICES, "get-tuple-element"):
        return [needed, *operands[1:]]
    if one.operation == "dynamic-update-slice":  # in place: the rest is not touched
        return [0, *operands[1:]]
    if one.operation == "fusion":
        (called,) = (name for name, _ in program.calls(one.text))
        shares = zip(_used(program, called), operands, strict=True)
        share = needed / max(_entries(one), 1)
        return [share * used * whole for used, whole in shares]
    if one.operation in _WHOLE:
        return [float(whole) for whole in operands]
    return [min(whole, needed) for whole in operands]


def _written(program: Program, computation: str, count: int) -> list[float]:
    """Returns the share of each of ``count`` results of a fused computation that is written."""
    instructions = program.instructions(computation)
    root = list(instructions.values())[-1]
    results = [instructions[name] for name in root.inputs] if root.operation == "tuple" else [root]
    if len(results) != count:
        return [1.0] * count
    shares = []
    for one in results:
        whole = max(_entries(one), 1)
        while one.operation == "bitcast":
            one = instructions[one.inputs[0]]
        if one.operation == "dynamic-update-slice":
            shares.append(_entries(instructions[one.inputs[1]]) / whole)
        elif one.operation == "fusion":
            (called,) = (name for name, _ in program.calls(one.text))
            shares.append(_written(program, called, len(one.results))[0])
        else:
            shares.append(1.0)
    return shares


def _entries(one: Instruction) -> int:
    return sum(shape.entries for shape in one.results)


# Matrix products.


def _products(program: Program, one: Instruction) -> Iterator[tuple[float, str]]:
    """Yields operations and precision of the products in a kernel."""
    if one.operation == "fusion":
        for called, _ in program.calls(one.text):
            for inner in program.instructions(called).values():
                yield from _products(program, inner)
        return
    flops = product_flops(one)
    if flops:
        yield flops, _precision(one)


def product_flops(one: Instruction) -> float:
    """Counts the operations of a matrix product, in any of XLA's forms; 0 for other operations."""
    if one.operation == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.text)
    elif one.operation == "custom-call" and re.search(
        r'target="__cublas\S*(matmul|gemm)', one.text
    ):
        contracted = re.search(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]', one.text)
    elif one.operation == "convolution":  # a product on a TPU
        return 2.0 * _multiplications(one)
    elif "__cudnn$fmha" in one.text:
        return _attention_flops(one)
    else:
        return 0.0
    axes = [int(n) for n in re.findall(r"\d+", contracted[1])] if contracted else []
    return 2.0 * one.results[0].entries * math.prod(one.operands[0].sizes[axis] for axis in axes)


def _multiplications(one: Instruction) -> int:
    """Counts the multiplications of a convolution, without those with padding and holes.

    Batch axes of a product become spatial axes, with windows that see one position at a time.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.text)
    if labels is None:
        return 0
    left, right = one.operands[:2]
    shapes = (left.sizes, right.sizes, one.results[0].sizes)
    lhs, rhs, out = (
        dict(zip(names, sizes, strict=True))
        for names, sizes in zip(labels.groups(), shapes, strict=True)
    )
    window = re.search(r"window=\{([^}]*)\}", one.text)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    total = out["b"] * out["f"] * rhs["i"]
    groups = re.search(r"batch_group_count=(\d+)", one.text)
    total //= int(groups[1]) if groups else 1
    for axis, label in enumerate(sorted(name for name in lhs if name.isdigit())):

        def of(field: str, default: str, axis: int = axis) -> str:
            return fields[field].split("x")[axis] if field in fields else default

        total *= _positions(
            lhs[label],
            out[label],
            int(of("size", "1")),
            int(of("stride", "1")),
            int(of("pad", "0_0").split("_")[0]),
            int(of("lhs_dilate", "1")),
            int(of("rhs_dilate", "1")),
        )
    return total


@functools.cache
def _positions(
    given: int, results: int, size: int, stride: int, pad: int, holes: int, spread: int
) -> int:
    """Counts pairs of result and window position, along one axis, that meet an entry."""
    places = (
        result * stride - pad + at * spread for result in range(results) for at in range(size)
    )
    return sum(place % holes == 0 and 0 <= place // holes < given for place in places)


def _attention_flops(one: Instruction) -> float:
    """Counts the products of cuDNN's causal attention: half of 2, or of 5 in the backward pass."""
    scores = re.search(r'"intermediate_tensor_shape":.*?"dimensions":\s*\[([^\]]*)\]', one.text)
    sizes = [int(n) for n in re.findall(r"\d+", scores[1])] if scores else [0]
    products = 5 if "Backward" in one.text else 2
    return 0.5 * products * 2.0 * math.prod(sizes) * one.operands[0].sizes[-1]


def _precision(one: Instruction) -> str:
    if one.operands[0].dtype != "f32":
        return "bfloat16"
    return "exact" if re.search(r"operand_precision\W+highest", one.text, re.I) else "float32"
