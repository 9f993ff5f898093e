"""Parts that all kinds of projection share: their specification, and untrained variables."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from loro_jax.layers.sharding import latent_sharding
from loro_jax.linalg.precision import inexact

Array = jax.Array

# Name of ``x A^T``, which rematerialisation policies may save for the backward pass.
LATENT = "latent"


@dataclasses.dataclass(frozen=True)
class ProjectionSpec:
    """The specification of a projection.

    Attributes:
        kind: kind of a projection with a rank, a key of
            :data:`loro_jax.layers.projections.PROJECTIONS`.
        rank: inner dimension of a low-rank projection; None: dense.
        initialiser: how factors are drawn, a name known to :func:`loro_jax.initialise`.
        initializer_range: standard deviation of a dense weight's entries.
        alpha: the product of factors is scaled by ``alpha / rank`` (lora, sltrain).
        density: fraction of a sparse matrix's entries that are not zero (sltrain).
        lost_gamma: weight of the factors' term; that of the dense columns is 1 minus it (lost).
        lost_channels: fraction of the inputs that have a dense column (lost).
        scaffold_scale: size of the fixed matrix, relative to a dense initialisation (scaffold).
        scaffold_block: lower bound on the smaller side of its blocks; 0: one block (scaffold).
        use_bias: whether the output has a bias, zero at first.
        dtype: dtype of the products; None: that of the input and the weights, promoted.
        param_dtype: dtype of the stored weights.
        precision: precision of the products; None: the default.
    """

    kind: str = "low_rank"
    rank: int | None = None
    initialiser: str = "xavier"
    initializer_range: float = 0.02
    alpha: float = 32.0
    density: float = 0.03
    lost_gamma: float = 0.7
    lost_channels: float = 0.01
    scaffold_scale: float = 1.0
    scaffold_block: int = 32
    use_bias: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    precision: Any = None


def make_bias(spec: ProjectionSpec, out_features: int) -> nnx.Param | None:
    """Makes the bias that a spec asks for."""
    return nnx.Param(jnp.zeros(out_features, spec.param_dtype)) if spec.use_bias else None


def with_bias(y: Array, bias: nnx.Variable | None) -> Array:
    """Adds a bias, if there is one."""
    return y if bias is None else y + bias[...].astype(y.dtype)


@dataclasses.dataclass(frozen=True)
class Original:
    """The layer whose place a low-rank one has taken, without its arrays.

    Attributes:
        definition: what it is made again from.
        options: its attributes other than variables, such as ``out_features``: other code may read
            them from the layer.
    """

    definition: nnx.GraphDef
    options: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, layer: nnx.Module) -> Original:
        """Returns a layer without its arrays."""
        options = tuple(
            (name, value)
            for name, value in vars(layer).items()
            if not name.startswith("_") and not isinstance(value, nnx.Variable)
        )
        return cls(nnx.split(layer)[0], options)


class TakesPlace(nnx.Module):
    """A module that answers with the options of the layer whose place it has taken, if any."""

    original: Original | None

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            original = vars(self).get("original")
            if original is not None:
                for option, value in original.options:
                    if option == name:
                        return value
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class Fixed(nnx.Variable):
    """A variable of a model that is not trained and has no gradient."""


def named(latent: Array) -> Array:
    """Marks ``x A^T`` with its name for rematerialisation policies."""
    return checkpoint_name(latent, LATENT)


def products_dtype(dtype: Any, *arrays: Array) -> Any:
    """Returns the dtype of products: the given one; None: that of the arrays, promoted."""
    return inexact(jnp.result_type(*arrays)) if dtype is None else dtype


def by_rows(call: Callable[[Any, Array], Array]) -> Callable[..., Array]:
    """Passes inputs (..., in) of a projection's ``__call__`` as matrices (N, in).

    The gradient of a weight then sums over one axis. For two axes, (B, L), XLA's CPU backend first
    writes transposed copies of both operands, which takes most of the gradient's time.

    As Flax's layers, the projection then takes ``out_sharding``, for meshes with explicit axes.
    """

    @functools.wraps(call)
    def on_rows(self: Any, x: Array, out_sharding: Any = None) -> Array:
        if out_sharding is not None:
            return jax.sharding.reshard(call(self, x), out_sharding)
        if latent_sharding(x) is not None:
            return call(self, x)  # axes that are sharded differently can't become one
        # A reshape of leading axes moves no data.
        y_NxF = call(self, x.reshape(-1, x.shape[-1]))
        return y_NxF.reshape(*x.shape[:-1], y_NxF.shape[-1])

    return on_rows
