"""The matrices of a network's blocks: products B A, their factors, and dense weights."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from loro_jax.inspection import spectra

# Parts of a pair, in the order of spectra.of_pair.
PARTS = ("B A", "B", "A")
# Between a projection and its matrices, where it has an adapter.
_ADAPTED = ("base", "adapter")
# Arrays that stand between two factors, whose product is then another than B A.
_BETWEEN = {"S", "E", "gate"}


class Matrix(NamedTuple):
    """A matrix of one layer.

    Attributes:
        name: its projection, such as "attention/q".
        part: "B A", "B" or "A" of a pair; otherwise the name of its array, such as "W".
        layer: its layer.
        shape: (rows, columns).
        singular_values: in descending order.
    """

    name: str
    part: str
    layer: int
    shape: tuple[int, int]
    singular_values: np.ndarray

    def measures(self) -> dict[str, float]:
        """Returns condition number, Frobenius norm, stable rank, and the rank of 99% energy."""
        values = self.singular_values
        return {
            "condition": spectra.condition(values),
            "norm": spectra.norm(values),
            "stable_rank": spectra.stable_rank(values),
            "rank_99": spectra.rank_of_energy(values),
        }


def matrices_of(params: Any, dense: bool = True) -> list[Matrix]:
    """Computes the singular values of all matrices of a network's blocks.

    Embedding and head are left out. Products are never formed.

    Args:
        params: nested dicts of arrays, in which ``blocks`` has the stacked layers.
        dense: whether to include matrices that belong to no pair.

    Returns:
        The matrices; layers of one matrix follow each other.

    Example:
        >>> q = {"B": np.ones((2, 6, 1)), "A": np.ones((2, 1, 4))}
        >>> [(m.name, m.part, m.layer) for m in matrices_of({"blocks": {"q": q}})][:3]
        [('q', 'B A', 0), ('q', 'B A', 1), ('q', 'B', 0)]
    """
    found: list[Matrix] = []
    for name, arrays in _projections(params.get("blocks", {}), ()):
        pair = _pair(arrays)
        if pair is not None:
            found += _of_pair(name, *map(on_host, pair))
        if not dense:
            continue
        for part, array in sorted(arrays.items()):
            if _is_stack(array) and (pair is None or part not in PARTS):
                stack = on_host(array)
                values = _by_layer(spectra.of_dense, stack)
                found += [Matrix(name, part, i, stack.shape[1:], one) for i, one in values]
    return found


def small_tables(params: Any) -> dict[str, dict[str, list[float | None]]]:
    """Measures all products and factors, without their spectra.

    Args:
        params: as of :func:`matrices_of`; every process of a run calls this.

    Returns:
        Numbers by layer, by measure, by projection and part, such as "attention/q B A". A
        condition number that is infinite is None.

    Example:
        >>> q = {"B": np.ones((1, 4, 1)), "A": np.ones((1, 1, 4))}
        >>> small_tables({"blocks": {"q": q}})["q B A"]
        {'condition': [1.0], 'norm': [4.0], 'stable_rank': [1.0]}
    """
    found: dict[str, dict[str, list[float | None]]] = {}
    for matrix in matrices_of(params, dense=False):
        rows = found.setdefault(f"{matrix.name} {matrix.part}", {})
        for name, value in matrix.measures().items():
            if name != "rank_99":
                rows.setdefault(name, []).append(value if math.isfinite(value) else None)
    return found


def on_host(array: Any) -> np.ndarray:
    """Returns an array as NumPy's, gathered from all processes if it is spread over them."""
    if getattr(array, "is_fully_addressable", True):
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _projections(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name and the arrays of every node that has arrays."""
    arrays = {name: value for name, value in tree.items() if not isinstance(value, dict)}
    if arrays:
        yield "/".join(part for part in path if part not in _ADAPTED), arrays
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _projections(value, (*path, str(name)))


def _pair(arrays: dict[str, Any]) -> tuple[Any, Any] | None:
    B, A = arrays.get("B"), arrays.get("A")
    if _BETWEEN & arrays.keys():
        return None
    if B is None or A is None or not (_is_stack(B) and _is_stack(A)) or B.shape[-1] != A.shape[-2]:
        return None
    return B, A


def _is_stack(array: Any) -> bool:
    # Indices, such as those of sparse values, are no matrices. bfloat16 has NumPy's kind "V".
    return getattr(array, "ndim", 0) == 3 and np.dtype(array.dtype).kind in "fV"


def _by_layer(function: Callable[..., Any], *stacks: np.ndarray) -> Iterator[tuple[int, Any]]:
    """Yields numbered results of a function of one layer, with a core for each layer."""
    # LAPACK's own threads gain little on matrices of this size.
    with threadpool_limits(limits=1, user_api="blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from enumerate(pool.map(function, *stacks))


def _of_pair(name: str, B: np.ndarray, A: np.ndarray) -> Iterator[Matrix]:
    by_layer = [found for _, found in _by_layer(spectra.of_pair, B, A)]
    shapes = ((B.shape[1], A.shape[2]), B.shape[1:], A.shape[1:])
    for part, shape, values in zip(PARTS, shapes, zip(*by_layer, strict=True), strict=True):
        for layer, one in enumerate(values):
            yield Matrix(name, part, layer, shape, one)
