"""The exact step of one pair, computed in three ways.

Each takes a pair, its directions and a :class:`StepSize`, and returns the balanced factors of the
truncated SVD of ``W - lr grad`` (Proposition 4; notation of :mod:`loro_jax.manifold`):

* :mod:`~loro_jax.retractions.graph`: Gram matrices and one r x r eigendecomposition, the default;
* :mod:`~loro_jax.retractions.gram`: CholeskyQR2 and one 2r x 2r eigendecomposition;
* :mod:`~loro_jax.retractions.reference`: Householder QR and SVD, in float64 where there is one.

The first is the fastest and the last always right. :mod:`~loro_jax.retractions.ladder` takes a pair
from one to the next where a method says that it can't be trusted. The first two factorise by
:mod:`~loro_jax.retractions.cholesky`, and once by an eigendecomposition. Which of all balanced
factors they return, :mod:`~loro_jax.retractions.balance` says.
"""

from loro_jax.retractions.balance import BASES, check_basis
from loro_jax.retractions.ladder import METHODS, check_method, retract
from loro_jax.retractions.step import ExactStep, StepSize

__all__ = ["BASES", "METHODS", "ExactStep", "StepSize", "check_basis", "check_method", "retract"]
