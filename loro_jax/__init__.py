"""LORO for JAX: low-rank Riemannian optimization of (B, A) pairs, as an Optax transformation.

The core of this package needs only jax and optax. The trainer (``loro_jax.training``) needs the
``train`` extra and a checkout of the repository, which includes ``models/``.
"""

from loro_jax._version import __version__
from loro_jax.descent import LoroState, riemannian_descent
from loro_jax.directions.adam import adam, scale_by_uncorrected_adam
from loro_jax.directions.orthogonal import orthogonal
from loro_jax.exact.tangent import riemannian_gradient
from loro_jax.exact.update import exact_update
from loro_jax.loro import loro
from loro_jax.lowrank import LowRank, balance, from_dense, initialise
from loro_jax.pairs import find_pairs
from loro_jax.schedules import warmup_cosine, with_restarts

__all__ = [
    "LoroState",
    "LowRank",
    "__version__",
    "adam",
    "balance",
    "exact_update",
    "find_pairs",
    "from_dense",
    "initialise",
    "loro",
    "orthogonal",
    "riemannian_descent",
    "riemannian_gradient",
    "scale_by_uncorrected_adam",
    "warmup_cosine",
    "with_restarts",
]
