"""Applies several projections to one input by a single product."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from loro_jax.layers.common import named
from loro_jax.layers.dense import Dense
from loro_jax.layers.low_rank import LowRankLinear

Array = jax.Array

# For fewer rows each A is multiplied separately.
ROWS_WORTH_PACKING = 64


class Shared(nnx.Module):
    """The concatenated first matrices (A, or dense W) of projections that share an input.

    For decoding, where products with few rows are bound by memory bandwidth, and a large matrix is
    read faster than several small ones. This removes `A` (or `W`) from the projections; from then
    on call them only through :func:`apply_together`.
    """

    def __init__(self, projections: Sequence[Dense | LowRankLinear]):
        dtype = projections[0].dtype
        self.sizes = tuple(projection.first().shape[-2] for projection in projections)
        # With or without a leading axis of layers, rows are the second to last axis.
        self.matrix = nnx.Param(jnp.concatenate([p.first() for p in projections], axis=-2))
        self.dtype = dtype
        # Otherwise every matrix would be in memory twice.
        for projection in projections:
            if isinstance(projection, LowRankLinear):
                del projection.A
            else:
                del projection.W

    def __call__(self, x: Array) -> list[Array]:
        """Maps (..., in) to the inputs of each projection's ``rest``."""
        return _pieces(x.astype(self.dtype) @ self.matrix[...].T, self.sizes)


def can_share(projections: Sequence[Dense | LowRankLinear]) -> bool:
    """Returns whether each projection's output depends on x only through its first matrix."""
    return all(isinstance(p, Dense) or p.through_rank for p in projections)


def _pieces(y: Array, sizes: Sequence[int]) -> list[Array]:
    return jnp.split(y, list(itertools.accumulate(sizes))[:-1], axis=-1)


def apply_together(
    projections: Sequence[Dense | LowRankLinear],
    x: Array,
    *,
    shared: Shared | None = None,
    latent: Sequence[bool] | None = None,
) -> list[Array]:
    """Applies several projections to one input.

    If all are low-rank, their A's form one product with x, and there is one gradient of x; without
    this the backward pass has to write and add several gradients as large as x.

    Args:
        projections: projections of the same dtype.
        x: their input, (..., in).
        shared: their first matrices, if they are concatenated already.
        latent: for which projections to return the latent, not the output; None: for none.

    Returns:
        The output (..., out) of each, or the latent (..., r).

    Example:
        >>> from loro_jax.layers.common import ProjectionSpec
        >>> spec = ProjectionSpec(rank=2)
        >>> q, k = (LowRankLinear(6, out, spec, nnx.Rngs(out)) for out in (4, 5))
        >>> x = jnp.ones((3, 50, 6))
        >>> both = apply_together([q, k], x)
        >>> [y.shape for y in both], bool(jnp.allclose(both[1], k(x), atol=1e-6))
        ([(3, 50, 4), (3, 50, 5)], True)
    """
    latent = latent or [False] * len(projections)
    rows = math.prod(x.shape[:-1])
    # Only thin A's are concatenated for a single pass: copies of dense matrices would cost more.
    low_rank = all(isinstance(p, LowRankLinear) and p.through_rank for p in projections)
    if shared is not None:
        # Concatenated once, when decoding began: no copy, so it pays for a single row.
        pieces = shared(x)
    elif low_rank and rows >= ROWS_WORTH_PACKING:
        # Meant for accelerators, which narrow products don't saturate; on two CPU cores it is
        # neither faster nor slower (``python -m loro_jax bench together``). For few rows copying
        # the A's does not pay.
        A = jnp.concatenate([p.first() for p in projections])
        latents_NxR = named(x.reshape(-1, x.shape[-1]).astype(A.dtype) @ A.T)
        pieces = _pieces(latents_NxR, [p.first().shape[0] for p in projections])
    else:
        return [
            as_low_rank(p).down(x) if stop else p(x)
            for p, stop in zip(projections, latent, strict=True)
        ]
    # `rest` is what each projection still has to do after its first matrix.
    outputs = [
        as_low_rank(p).activated(piece) if stop else p.rest(piece)
        for p, piece, stop in zip(projections, pieces, latent, strict=True)
    ]
    return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in outputs]


def as_low_rank(projection: Dense | LowRankLinear) -> LowRankLinear:
    """Narrows the type of a projection that must have latents, which the caller has checked."""
    assert isinstance(projection, LowRankLinear)
    return projection
