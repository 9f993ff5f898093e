"""Every kind of projection behind one constructor.

A projection maps ``x (..., in)`` to ``y (..., out)`` without a bias. Kinds:

* dense: ``W`` (out x in), ``y = x W^T``;
* low_rank: ``B`` (out x r) and ``A`` (r x in), ``y = (x A^T) B^T``; ``W = B A`` is never formed;
* cola: ``y = silu(x A^T) B^T`` (Liu et al. 2025, arXiv 2502.10940, equation 2);
* lora: ``y = x W^T + (alpha / r) (x A^T) B^T`` with a fixed W (Hu et al. 2021, arXiv 2106.09685);
* switchlora: the same with spare vectors that are switched with those of B and A, and ``1 / r`` for
  a scale; see :mod:`loro_jax.peers.switchlora`;
* sltrain: ``W = (alpha / r) B A + S`` with a sparse S; see :mod:`loro_jax.layers.sltrain`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from loro_jax.layers.sltrain import (
    draw_support,
    entries_per_row,
    sparse_low_rank_product,
    sparse_matrix,
)
from loro_jax.linalg.precision import at_least_float32
from loro_jax.lowrank import initialise
from loro_jax.peers.switchlora import (
    initialise_candidates,
    initialise_switchlora,
    nothing_frozen,
)

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ProjectionSpec:
    """What a projection is made of.

    Attributes:
        kind: of the projections that have a rank, a key of :data:`KINDS`.
        rank: inner dimension of a low-rank projection; None: dense.
        initialiser: how factors are drawn, a name known to :func:`loro_jax.initialise`.
        initializer_range: standard deviation of a dense weight's entries.
        alpha: the product of factors is scaled by ``alpha / rank`` (lora, sltrain).
        density: share of a sparse matrix's entries that are not zero (sltrain).
        dtype: dtype of the products.
        param_dtype: dtype of the stored weights.
    """

    kind: str = "low_rank"
    rank: int | None = None
    initialiser: str = "xavier"
    initializer_range: float = 0.02
    alpha: float = 32.0
    density: float = 0.03
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32


# Fewer rows than these are multiplied by each A on its own.
ROWS_WORTH_PACKING = 64


# What a backward pass may be told to keep: ``x A^T``.
LATENT = "latent"


def _named(latent: Array) -> Array:
    return checkpoint_name(latent, LATENT)


class Fixed(nnx.Variable):
    """What belongs to a model and is not trained: no gradient is taken of it."""


def _by_rows(call: Callable[[Any, Array], Array]) -> Callable[[Any, Array], Array]:
    """Shows a projection's ``__call__`` a matrix (N, in) in place of (..., in).

    The gradient of a weight then sums over one axis. Over two, (B, L), XLA's CPU backend first
    writes transposed copies of both operands, the larger part of such a gradient's time.
    """

    @functools.wraps(call)
    def on_rows(self: Any, x: Array) -> Array:
        y_NxF = call(self, x.reshape(-1, x.shape[-1]))
        return y_NxF.reshape(*x.shape[:-1], y_NxF.shape[-1])

    return on_rows


class Dense(nnx.Module):
    """``y = x W^T`` with W (out x in)."""

    def __init__(self, in_features: int, out_features: int, spec: ProjectionSpec, rngs: nnx.Rngs):
        shape = (out_features, in_features)
        W = spec.initializer_range * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.W = nnx.Param(W.astype(spec.param_dtype))
        self.dtype = spec.dtype

    @_by_rows
    def __call__(self, x: Array) -> Array:
        """Maps (..., in) to (..., out)."""
        return x.astype(self.dtype) @ self.first().T

    def first(self) -> Array:
        """The matrix that meets the input, in the dtype of the products."""
        return self.W[...].astype(self.dtype)

    def rest(self, y: Array) -> Array:
        """What becomes of ``x first^T``: it is the output."""
        return y

    def weight(self) -> Array:
        """The matrix that it multiplies by, (out, in)."""
        return self.W[...]


class LowRankLinear(nnx.Module):
    """``y = (x A^T) B^T`` with B (out x r) and A (r x in)."""

    # Whether all of y goes through the rank, y = up(down(x)); a kind that adds more says no.
    through_rank = True

    def __init__(self, in_features: int, out_features: int, spec: ProjectionSpec, rngs: nnx.Rngs):
        assert spec.rank is not None  # make_projection chose this class by it
        B, A = initialise(
            rngs.params(),
            out_features,
            in_features,
            spec.rank,
            spec.initialiser,
            spec.initializer_range,
        )
        self.B = nnx.Param(B.astype(spec.param_dtype))
        self.A = nnx.Param(A.astype(spec.param_dtype))
        self.dtype = spec.dtype

    @property
    def rank(self) -> int:
        """The inner dimension r."""
        return self.B.shape[-1]

    def first(self) -> Array:
        """The matrix that meets the input, A, in the dtype of the products."""
        return self.A[...].astype(self.dtype)

    def rest(self, y: Array) -> Array:
        """Maps ``x A^T`` to the output."""
        return self.up(self.activated(y))

    def factors(self) -> tuple[Array, Array]:
        """B and A in the dtype of the products."""
        return self.B[...].astype(self.dtype), self.A[...].astype(self.dtype)

    def down(self, x: Array) -> Array:
        """Maps (..., in) to the latent (..., r)."""
        return self.activated(_named(x.astype(self.dtype) @ self.first().T))

    def activated(self, latent: Array) -> Array:
        """What the second factor sees of ``x A^T``: all of it."""
        return latent

    def up(self, latent: Array) -> Array:
        """Maps the latent (..., r) to (..., out)."""
        return latent @ self.B[...].astype(self.dtype).T

    @_by_rows
    def __call__(self, x: Array) -> Array:
        """Maps (..., in) to (..., out) by way of the rank."""
        return self.up(self.down(x))

    def product(self) -> Array:
        """B A, (out, in), in float32 or wider."""
        dtype = at_least_float32(self.B[...].dtype)
        B, A = self.B[...].astype(dtype), self.A[...].astype(dtype)
        return jnp.matmul(B, A, precision=jax.lax.Precision.HIGHEST)

    def weight(self) -> Array:
        """The matrix that it multiplies by, (out, in), in float32 or wider."""
        return self.product()


class ColaLinear(LowRankLinear):
    """``y = silu(x A^T) B^T``: an auto-encoder in a projection's place."""

    def activated(self, latent: Array) -> Array:
        """What the second factor sees of ``x A^T``."""
        return jax.nn.silu(latent)

    def weight(self) -> Array:
        """There is none: raises TypeError."""
        raise TypeError("ColaLinear: an activation between the factors; no matrix does the same.")


class LoraLinear(LowRankLinear):
    """``y = x W^T + (alpha / r) (x A^T) B^T`` with a fixed W; B starts at zero."""

    through_rank = False

    def __init__(self, in_features: int, out_features: int, spec: ProjectionSpec, rngs: nnx.Rngs):
        adapter = dataclasses.replace(spec, initialiser="lora")
        super().__init__(in_features, out_features, adapter, rngs)
        W = Dense(in_features, out_features, spec, rngs).W[...]
        self.W = Fixed(W)
        self.scale = spec.alpha / self.A.shape[-2]

    @_by_rows
    def __call__(self, x: Array) -> Array:
        """Maps (..., in) to (..., out)."""
        x = x.astype(self.dtype)
        B, A = self.factors()
        return x @ self.W[...].astype(self.dtype).T + self.scale * ((x @ A.T) @ B.T)

    def weight(self) -> Array:
        """The matrix that it multiplies by, (out, in), in float32 or wider."""
        return self.W[...] + self.scale * self.product()


class SwitchLoraLinear(LoraLinear):
    """:class:`LoraLinear` with spare vectors, and with what keeps account of their switches."""

    def __init__(self, in_features: int, out_features: int, spec: ProjectionSpec, rngs: nnx.Rngs):
        super().__init__(in_features, out_features, spec, rngs)
        shape = (out_features, in_features, self.A.shape[-2])
        B, A = initialise_switchlora(rngs.params(), *shape)
        self.B[...] = B.astype(spec.param_dtype)
        self.A[...] = A.astype(spec.param_dtype)
        spare = initialise_candidates(rngs.params(), *shape)
        self.spare_B = Fixed(spare.B.astype(spec.param_dtype))
        self.spare_A = Fixed(spare.A.astype(spec.param_dtype))
        self.switched = Fixed(spare.switched)
        frozen_B, frozen_A = nothing_frozen(B)
        self.frozen_B, self.frozen_A = Fixed(frozen_B), Fixed(frozen_A)
        self.scale = 1 / self.A.shape[-2]


class SparseLowRankLinear(LowRankLinear):
    """``y = x ((alpha / r) B A + S)^T``; S is sparse, B starts at zero."""

    through_rank = False

    def __init__(self, in_features: int, out_features: int, spec: ProjectionSpec, rngs: nnx.Rngs):
        factors = dataclasses.replace(spec, initialiser="lora")
        super().__init__(in_features, out_features, factors, rngs)
        # As in the authors' code: uniform like a linear layer's default.
        shape = (out_features, entries_per_row(in_features, spec.density))
        bound = in_features**-0.5
        values = jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
        self.values = nnx.Param(values.astype(spec.param_dtype))
        self.columns = Fixed(draw_support(rngs.params(), out_features, in_features, spec.density))
        self.scale = spec.alpha / self.A.shape[-2]

    @_by_rows
    def __call__(self, x: Array) -> Array:
        """Maps (..., in) to (..., out); W exists for the moment of the product."""
        B, A = self.factors()
        values = self.values[...].astype(self.dtype)
        return sparse_low_rank_product(
            x.astype(self.dtype), B, A, values, self.columns[...], self.scale
        )

    def weight(self) -> Array:
        """The matrix that it multiplies by, (out, in), in float32 or wider."""
        S = sparse_matrix(self.values[...], self.columns[...], self.A.shape[-1])
        return self.scale * self.product() + S


KINDS: dict[str, type[LowRankLinear]] = {
    "low_rank": LowRankLinear,
    "cola": ColaLinear,
    "lora": LoraLinear,
    "switchlora": SwitchLoraLinear,
    "sltrain": SparseLowRankLinear,
}


def make_projection(
    in_features: int, out_features: int, spec: ProjectionSpec, rngs: nnx.Rngs
) -> Dense | LowRankLinear:
    """Makes the projection that a spec describes.

    Args:
        in_features: size of the input's last axis.
        out_features: size of the output's last axis.
        spec: kind, rank, initialiser and dtypes.
        rngs: NNX random streams; the ``params`` stream is used.

    Returns:
        A module that maps (..., in_features) to (..., out_features).

    Raises:
        ValueError: if the rank is below 1 or above min(in_features, out_features), or the kind is
            unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> projection = make_projection(8, 6, ProjectionSpec(rank=2), nnx.Rngs(0))
        >>> projection(jnp.ones((4, 8))).shape
        (4, 6)
    """
    if spec.rank is None:
        return Dense(in_features, out_features, spec, rngs)
    if spec.kind not in KINDS:
        raise ValueError(
            f"make_projection: kind must be one of {', '.join(KINDS)}, but is {spec.kind!r}."
        )
    return KINDS[spec.kind](in_features, out_features, spec, rngs)


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
        latents_NxR = _named(x.reshape(-1, x.shape[-1]).astype(A.dtype) @ A.T)
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
