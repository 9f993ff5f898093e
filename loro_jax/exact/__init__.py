"""The exact step of one pair, by three methods.

Each takes a pair, its directions and a :class:`StepSize`, and returns the balanced factors of the
truncated SVD of ``W - lr grad`` (Proposition 4; notation of :mod:`loro_jax.exact.tangent`):

* :mod:`~loro_jax.exact.subspace`: Gram matrices and one r x r eigendecomposition, the default
  ("auto");
* :mod:`~loro_jax.exact.gram`: CholeskyQR2 and one 2r x 2r eigendecomposition;
* :mod:`~loro_jax.exact.reference`: Householder QR and SVD, in float64 if available.

The first is the fastest, and the last is always accurate. :mod:`~loro_jax.exact.fallback` falls
back from one to the next if a method reports that its result can't be trusted, and
:mod:`~loro_jax.exact.phases` steps pairs of all shapes by the first together. The first two use
:mod:`~loro_jax.linalg.cholesky` and one eigendecomposition. :mod:`~loro_jax.exact.basis` chooses
among all balanced factors.
"""

from loro_jax.exact.basis import BASES, check_basis
from loro_jax.exact.fallback import METHODS, check_method, retract
from loro_jax.exact.step import Batch, ExactStep, StepSize

__all__ = [
    "BASES",
    "METHODS",
    "Batch",
    "ExactStep",
    "StepSize",
    "check_basis",
    "check_method",
    "retract",
]
