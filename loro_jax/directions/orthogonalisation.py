"""Variants of orthogonalisation, for momentum of factors and of dense matrices alike.

The long side of a matrix is the one with more entries: the outputs of B (m x r), the inputs of A
(r x n). Orthogonalised, the short side's rows or columns all have norm one; those of the long side
differ, and the variants act on these:

* ``equilibrate`` gives the long side's rows (or columns) of the momentum unit norm before the
  orthogonalisation, which improves its condition;
* ``row_moment`` divides each row (or column) of the long side by the root of a running mean of its
  square, after the orthogonalisation; the Frobenius norm of the whole does not change.

Sources: rows of unit norm: "MuonEq", arXiv 2603.28254, 2026; the second moment of rows: Li et al.,
"NorMuon", arXiv 2510.05491, 2025.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from loro_jax.linalg.newton_schulz import orthogonalise
from loro_jax.linalg.precision import at_least_float32

Array = jax.Array


class Orthogonalisation(NamedTuple):
    """The settings of an orthogonalisation.

    Attributes:
        steps: Newton-Schulz iterations.
        equilibrate: whether the long side's rows of the momentum are given unit norm first.
        row_moment: decay of the running means; 0: none.

    Example:
        >>> import jax.numpy as jnp
        >>> whole = Orthogonalisation(equilibrate=True)
        >>> M = jnp.array([[1.0, 2.0], [3.0, -1.0], [0.5, 0.0]])
        >>> scaled = whole.apply(M * jnp.array([[5.0], [0.1], [1.0]]))
        >>> bool(jnp.allclose(whole.apply(M), scaled, atol=1e-4))
        True
    """

    steps: int = 5
    equilibrate: bool = False
    row_moment: float = 0.0

    def apply(self, M: Array) -> Array:
        """Returns the orthogonalised momentum (..., m, n), before the second moment of rows."""
        if self.equilibrate:
            norm = jnp.sqrt(jnp.sum(jnp.square(M), axis=across(M), keepdims=True))
            M = M / jnp.where(norm > 0, norm, 1)
        return orthogonalise(M, self.steps)

    @property
    def has_moment(self) -> bool:
        """Whether running means of rows are kept; a decay that is traced counts as one."""
        return not (isinstance(self.row_moment, float | int) and self.row_moment == 0)

    def first_moment_of_rows(self, M: Array) -> Array:
        """Returns running means of zero: (..., m, 1) for a tall matrix, (..., 1, n) for a wide."""
        dtype = at_least_float32(M.dtype)
        return jnp.zeros_like(jnp.sum(M, axis=across(M), keepdims=True), dtype=dtype)

    def evened(self, X: Array, moment: Array) -> tuple[Array, Array]:
        """Divides the long side's rows by the root of their running mean square.

        Args:
            X: the orthogonalised momentum.
            moment: running means, from :meth:`first_moment_of_rows`.

        Returns:
            The matrix, with the Frobenius norm of X, and the new means.
        """
        squares = jnp.mean(jnp.square(X), axis=across(X), keepdims=True)
        moment = self.row_moment * moment + (1 - self.row_moment) * squares
        # No bias correction: a factor on all rows is removed by the last division.
        divided = X * jax.lax.rsqrt(jnp.where(moment > 0, moment, 1))
        norms = [
            jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True)) for x in (X, divided)
        ]
        return divided * (norms[0] / jnp.where(norms[1] > 0, norms[1], 1)), moment


def across(M: Array) -> int:
    """Returns the axis of the short side, along which the long side's rows or columns extend."""
    return -1 if M.shape[-2] >= M.shape[-1] else -2


def check_orthogonalisation(where: str, settings: Orthogonalisation) -> None:
    """Raises ValueError for a setting out of range."""
    beta = settings.row_moment
    if isinstance(beta, float | int) and not 0 <= beta < 1:
        raise ValueError(f"{where}: row_moment must be in [0, 1), but is {beta}.")
