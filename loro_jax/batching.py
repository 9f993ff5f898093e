"""Mapping matrix factorisations over batches, safely on CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def one_by_one(fn: Callable, batch_axes: int) -> Callable:
    """Maps a function of single matrices over leading axes without batching LAPACK calls on CPU.

    jaxlib's CPU kernels for ``qr``, ``svd``, ``eigh`` and ``cholesky`` spread a *batched* call
    over XLA's own thread pool and block the calling thread of that pool until it is done. Two such
    calls in flight on a machine with two cores hold both threads, and the program hangs for ever.
    So on CPU any ``vmap``, also one around the whole optimizer, turns into a loop of single calls;
    on GPU and TPU batching stays.

    Args:
        fn: function of matrices (arrays without batch axes).
        batch_axes: number of leading axes that all arguments share.

    Returns:
        The mapped function.
    """

    def dispatch(*matrices: jax.Array) -> Any:
        return jax.lax.platform_dependent(
            *matrices, cpu=jax.custom_batching.sequential_vmap(fn), default=fn
        )

    mapped: Callable = dispatch
    for _ in range(batch_axes):
        mapped = jax.vmap(mapped)
    return mapped
