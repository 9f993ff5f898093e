"""Profile of a training step by JAX's profiler, summed by part of the step and kind of operation.

``products`` are matrix products (with operations fused into them), ``moves`` copy data or write
zeros, ``arithmetic`` is everything else. Parts are the named scopes of the model and the step:
attention, mlp, loss (with the head), optimizer; ``rest`` is norms, embedding, clipping and
operations added by the compiler, such as zero-filled buffers. Milliseconds are means over
``--rounds`` steps; operations may overlap, so their sum can differ from the time of the step,
``step ms``. On a GPU, kernels inside CUDA graphs can't be attributed to operations: set
``XLA_FLAGS=--xla_gpu_enable_command_buffer=`` for this benchmark.
"""

from __future__ import annotations

import collections
import pathlib
import re
import statistics
import tempfile
from collections.abc import Sequence
from typing import Any

import jax

from loro_jax.bench.steps import config_of_step
from loro_jax.bench.train_step import options_of_steps
from loro_jax.planning.kernels import PARTS, part_of, part_of_scopes
from loro_jax.planning.measured_step import Case, prepare
from loro_jax.planning.timing import rounds_in_turns
from loro_jax.tables import report

KINDS = ("products", "moves", "arithmetic")

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (?:\([^()]*\)|\S+) ([\w\-]+)\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_PRODUCT = re.compile(r"gemm|matmul|cublas|dot", re.IGNORECASE)
_MOVES = {
    *("broadcast", "copy", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate"),
    *("transpose", "pad", "reshape", "copy-start", "copy-done"),
}
# Operations without their own time: only their operands, or the operations inside, take time.
_NOTHING = {
    *("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "while", "conditional"),
    *("call", "iota"),
}


def main(arguments: Sequence[str]) -> None:
    """Runs the benchmark; see ``--help``."""
    options = options_of_steps("profile", __doc__, arguments)
    rows = []
    for model in options.models:
        cases = {
            method: prepare(config_of_step(model, method, options)) for method in options.methods
        }
        rows += _rows(model, cases, options.rounds)
    report(rows, options)


def _rows(model: str, cases: dict[str, Case], rounds: int) -> list[dict[str, Any]]:
    seconds = rounds_in_turns({name: case.step for name, case in cases.items()}, rounds)
    rows = []
    for method, case in cases.items():
        spent = _profile(case, rounds)
        total = sum(spent.values())
        for part in PARTS:
            by_kind = {kind: spent[part, kind] for kind in KINDS}
            rows.append(
                {
                    "model": model,
                    "method": method,
                    "part": part,
                    **{f"{kind} ms": 1e3 * by_kind[kind] for kind in KINDS},
                    "share": sum(by_kind.values()) / total if total else float("nan"),
                    "step ms": 1e3 * statistics.median(seconds[method]),
                }
            )
    return rows


def _profile(case: Case, rounds: int) -> dict[tuple[str, str], float]:
    """Profiles a step; returns seconds per step by part and kind."""
    known = classify(case.hlo())
    spent: dict[tuple[str, str], float] = collections.defaultdict(float)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(rounds):
                jax.block_until_ready(case.step())
        for path in pathlib.Path(folder).rglob("*.xplane.pb"):
            data = jax.profiler.ProfileData.from_file(str(path))
            for plane in data.planes:
                for line in plane.lines:
                    for event in line.events:
                        found = classify_event(event.name, dict(event.stats), known)
                        if found is not None:
                            spent[found] += event.duration_ns / 1e9 / rounds
    return spent


def classify_event(
    name: str, stats: dict[str, Any], known: dict[str, tuple[str, str]]
) -> tuple[str, str] | None:
    """Returns part and kind of an event in a trace; None if it is not one of the program.

    On a GPU, slices that XLA turns into copies by the driver have names that do not occur in the
    optimised program; they count as moves in the scope that they name.

    Args:
        name: name of the event.
        stats: its properties, including ``hlo_op`` and ``name`` (scopes).
        known: result of :func:`classify`.

    Returns:
        (part, kind), as the values of ``known``.

    Example:
        >>> classify_event("MemcpyD2D", {"hlo_op": "slice.7", "name": "jit(f)/mlp/while"}, {})
        ('mlp', 'moves')
        >>> classify_event("python call", {}, {}) is None
        True
    """
    operation = stats.get("hlo_op")
    # Other events are those of Python and of the runtime.
    if operation in known:
        return known[operation]
    if operation is not None and name.startswith(("Memcpy", "Memset")):
        return part_of_scopes(str(stats.get("name", ""))), "moves"
    return None


def classify(hlo: str) -> dict[str, tuple[str, str]]:
    """Returns part and kind of every instruction of a compiled program that takes time.

    Args:
        hlo: text of the optimised program.

    Returns:
        (one of :data:`PARTS`, one of :data:`KINDS`) by the instruction's name.

    Example:
        >>> classify('  %dot.1 = f32[2] dot(%a, %b), metadata={op_name="jit(f)/mlp/dot_general"}')
        {'dot.1': ('mlp', 'products')}
    """
    # The kind of a fusion follows from the operations in the computation that it calls.
    inside: dict[str, set[str]] = collections.defaultdict(set)
    instructions = []
    computation = ""
    for line in hlo.splitlines():
        if found := _COMPUTATION.match(line):
            computation = found[1]
        elif found := _INSTRUCTION.match(line):
            inside[computation].add(found[2])
            instructions.append((found[1], found[2], line))
    return {
        name: (part_of(line), _kind(opcode, line, inside))
        for name, opcode, line in instructions
        if opcode not in _NOTHING
    }


def _kind(opcode: str, line: str, inside: dict[str, set[str]]) -> str:
    called = re.search(r"calls=%?([\w.\-]+)", line)
    opcodes = (inside[called[1]] if called else {opcode}) - _NOTHING
    if "dot" in opcodes or (opcode == "custom-call" and _PRODUCT.search(line)):
        return "products"
    return "moves" if opcodes <= _MOVES else "arithmetic"
