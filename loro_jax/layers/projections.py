"""The table of the kinds of projection, and their common constructor.

A projection maps ``x (..., in)`` to ``y (..., out)`` without a bias. A kind is a class in a file of
this folder and an entry in :data:`PROJECTIONS`. The class is a subclass of :class:`LowRankLinear`,
constructed from ``(in_features, out_features, spec, rngs)``: its trained arrays are ``nnx.Param``,
the others :class:`~loro_jax.layers.common.Fixed`. It defines ``linear``, ``through_rank`` and
``flops``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import jax
from flax import nnx

from loro_jax.layers.cola import ColaLinear
from loro_jax.layers.common import ProjectionSpec
from loro_jax.layers.dense import Dense
from loro_jax.layers.lora import LoraLinear
from loro_jax.layers.lost import LostLinear
from loro_jax.layers.low_rank import LowRankLinear
from loro_jax.layers.osft import OsftLinear
from loro_jax.layers.scaffold import ScaffoldColaLinear, ScaffoldLinear
from loro_jax.layers.sltrain import SparseLowRankLinear
from loro_jax.layers.sst import SstLinear
from loro_jax.layers.switchlora import SwitchLoraLinear
from loro_jax.peers.osft import Split, split
from loro_jax.peers.sst import Spectral, decompose

# Kinds of projections with a rank; without one, a projection is :class:`Dense`.
PROJECTIONS: dict[str, type[LowRankLinear]] = {
    "low_rank": LowRankLinear,
    "cola": ColaLinear,
    "lora": LoraLinear,
    "switchlora": SwitchLoraLinear,
    "sltrain": SparseLowRankLinear,
    "lost": LostLinear,
    "sst": SstLinear,
    "osft": OsftLinear,
    "scaffold": ScaffoldLinear,
    "scaffold_cola": ScaffoldColaLinear,
}


# Kinds that hold all of any weight, in parts, and how these are made of one (..., m, n), given the
# rank, by the names of their arrays.
IN_PARTS = ("sst", "osft")
_OF_WEIGHT: dict[frozenset[str], Callable[[jax.Array, int], Spectral | Split]] = {
    frozenset(Spectral._fields): lambda W, rank: decompose(jax.random.key(0), W, rank),
    frozenset(Split._fields): split,
}


def holds_a_weight(names: Collection[str]) -> bool:
    """Returns whether these are the names of the arrays of one of :data:`IN_PARTS`."""
    return frozenset(names) in _OF_WEIGHT


def arrays_of_weight(names: Collection[str], W: jax.Array, rank: int) -> dict[str, jax.Array]:
    """Makes the arrays of a projection that computes the same as a dense one.

    Args:
        names: the names of its arrays, for which :func:`holds_a_weight`.
        W: the weight, (..., m, n); leading axes are layers.
        rank: the projection's rank.

    Returns:
        The arrays, by name.

    Example:
        >>> import jax.numpy as jnp
        >>> names = ("U_high", "S_high", "Vt_high", "B", "S", "A")
        >>> arrays_of_weight(names, jnp.diag(jnp.array([3.0, 1.0])), rank=1)["S"].tolist()
        [1.0]
    """
    return _OF_WEIGHT[frozenset(names)](W, rank)._asdict()


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
    if spec.kind not in PROJECTIONS:
        raise ValueError(
            f"make_projection: kind must be one of {', '.join(PROJECTIONS)}, but is {spec.kind!r}."
        )
    return PROJECTIONS[spec.kind](in_features, out_features, spec, rngs)
