"""Several projections of one input as one product with it."""

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

# Fewer rows than these are multiplied by each A separately.
ROWS_WORTH_PACKING = 64


class Shared(nnx.Module):
    """The matrices that meet one input, of several projections, in one: A's, and dense W's.

    For decoding, where products with few rows are bound by how fast matrices are read, and a large
    one is read faster than several small ones. The projections give their matrices away: afterwards
    they work by :func:`apply_together` alone.
    """

    def __init__(self, projections: Sequence[Dense | LowRankLinear]):
        dtype = projections[0].dtype
        self.sizes = tuple(projection.first().shape[-2] for projection in projections)
        # Stacked over layers or not, rows are the last axis but one.
        self.matrix = nnx.Param(jnp.concatenate([p.first() for p in projections], axis=-2))
        self.dtype = dtype
        for projection in projections:
            if isinstance(projection, LowRankLinear):
                del projection.A
            else:
                del projection.W

    def __call__(self, x: Array) -> list[Array]:
        """Maps (..., in) to what each projection's ``rest`` takes."""
        return _pieces(x.astype(self.dtype) @ self.matrix[...].T, self.sizes)


def can_share(projections: Sequence[Dense | LowRankLinear]) -> bool:
    """Whether all of each projection's output goes through its first matrix."""
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
    """What several projections make of one input.

    Where all go through a rank, their A's make one product with x, and one gradient of x: in the
    backward pass several gradients as large as x would have to be written and added. On two CPU
    cores that is neither faster nor slower (``python -m loro_jax.bench together``); it is for
    accelerators, whose speed narrow products don't reach. Of few rows nothing can be gained, as the
    A's would have to be copied to stand together; unless they do already.

    Args:
        projections: of one dtype.
        x: their input, (..., in).
        shared: their first matrices, where they stand together already.
        latent: of which projections the latent is wanted, not the output; by default of none.

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
    low_rank = all(isinstance(p, LowRankLinear) and p.through_rank for p in projections)
    if shared is not None:
        pieces = shared(x)
    elif low_rank and rows >= ROWS_WORTH_PACKING:
        A = jnp.concatenate([p.first() for p in projections])
        latents_NxR = named(x.reshape(-1, x.shape[-1]).astype(A.dtype) @ A.T)
        pieces = _pieces(latents_NxR, [p.first().shape[0] for p in projections])
    else:
        return [
            as_low_rank(p).down(x) if stop else p(x)
            for p, stop in zip(projections, latent, strict=True)
        ]
    outputs = [
        as_low_rank(p).activated(piece) if stop else p.rest(piece)
        for p, piece, stop in zip(projections, pieces, latent, strict=True)
    ]
    return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in outputs]


def as_low_rank(projection: Dense | LowRankLinear) -> LowRankLinear:
    """The projection, where it must have latents; for others a caller has to have refused."""
    assert isinstance(projection, LowRankLinear)
    return projection
