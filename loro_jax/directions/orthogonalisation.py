"""Variants of orthogonalisation, for momentum of factors and of dense matrices alike.

The long side of a matrix is the one with more entries: the outputs of B (m x r), the inputs of A
(r x n). Orthogonalised, the short side's rows or columns all have norm one; those of the long side
differ, and the variants act on these:

* ``equilibrate`` gives the rows (or the long side's rows or columns) of the momentum unit norm
  before the orthogonalisation, which improves its condition;
* ``blocks`` orthogonalises blocks of the long side separately, such as the heads of an attention;
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

EQUILIBRATE = ("none", "rows", "long")


class Orthogonalisation(NamedTuple):
    """The settings of an orthogonalisation.

    Attributes:
        steps: Newton-Schulz iterations.
        equilibrate: "none"; "rows": rows of the momentum have unit norm; "long": the long side has.
        blocks: size of the blocks of the long side; 0, or a size that does not divide it: one
            block.
        row_moment: decay of the running means; 0: none.

    Example:
        >>> import jax.numpy as jnp
        >>> whole = Orthogonalisation(equilibrate="rows")
        >>> M = jnp.array([[1.0, 2.0], [3.0, -1.0], [0.5, 0.0]])
        >>> scaled = whole.apply(M * jnp.array([[5.0], [0.1], [1.0]]))
        >>> bool(jnp.allclose(whole.apply(M), scaled, atol=1e-4))
        True
    """

    steps: int = 5
    equilibrate: str = "none"
    blocks: int = 0
    row_moment: float = 0.0

    def apply(self, M: Array) -> Array:
        """Returns the orthogonalised momentum (..., m, n), before the second moment of rows."""
        if self.equilibrate != "none":
            M = _unit(M, -1 if self.equilibrate == "rows" else across(M))
        side = -2 if across(M) == -1 else -1
        count = M.shape[side] // self.blocks if self.blocks else 1
        if count <= 1 or M.shape[side] % self.blocks:
            return orthogonalise(M, self.steps)
        tall = M if side == -2 else M.mT
        parts = tall.reshape(*tall.shape[:-2], count, self.blocks, tall.shape[-1])
        # As many singular values of one as in a single block have the same Frobenius norm.
        ones = count * min(self.blocks, tall.shape[-1])
        whole = orthogonalise(parts, self.steps).reshape(tall.shape)
        whole *= (tall.shape[-1] / ones) ** 0.5
        return whole if side == -2 else whole.mT

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
    if settings.equilibrate not in EQUILIBRATE:
        raise ValueError(
            f"{where}: equilibrate must be one of {', '.join(EQUILIBRATE)}, but is "
            f"{settings.equilibrate!r}."
        )
    if settings.blocks < 0:
        raise ValueError(f"{where}: blocks must not be negative, but is {settings.blocks}.")
    beta = settings.row_moment
    if isinstance(beta, float | int) and not 0 <= beta < 1:
        raise ValueError(f"{where}: row_moment must be in [0, 1), but is {beta}.")


def _unit(M: Array, axis: int) -> Array:
    norm = jnp.sqrt(jnp.sum(jnp.square(M), axis=axis, keepdims=True))
    return M / jnp.where(norm > 0, norm, 1)
