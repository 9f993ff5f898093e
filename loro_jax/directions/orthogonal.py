"""Orthogonalised momentum: spectral steepest descent of a product, by moves of its factors.

For W = B A with gradient G, the tangent move of W of steepest descent under a bound on the spectral
norm is approximated in two parts, one for each factor:

* ``dB A`` is in the row space of A; in its orthonormal basis ``Q_A^T = (A A^T)^{-1/2} A`` the
  gradient is ``G Q_A = g_B (A A^T)^{-1/2}``. Orthogonalised (all singular values set to one) it
  is O_B, and ``dB = O_B (A A^T)^{-1/2}`` moves W by ``O_B Q_A^T``, of spectral norm one;
* in the same way ``dA = (B^T B)^{-1/2} O_A``, with ``O_A`` from ``(B^T B)^{-1/2} g_A``.

The mean of the two has norm one at most, for any factors of W: B S and S^{-1} A move the product
like B and A. The gradients are averaged first, with one moment per factor, half of Adam's state.
Only matrix products are needed.

For a square W the learning rate is the largest singular value of the move of W. Other shapes move
by ``sqrt(m / n)`` times that (W is m x n): a matrix of this norm changes the size of the entries of
``W x`` by the learning rate, for any m, n and r.

Source: the whitening is that of Cesista, Simal, Crowson and Biderman, "LoRA-Muon", arXiv
2606.12921, 2026; the shape factor that of Yang, Simon and Bernstein, "A spectral condition for
feature learning", arXiv 2310.17813, 2023; the momentum that of Jordan et al., "Muon", 2024.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from loro_jax.checks import check_not_negative, check_orthogonalised_momentum, checked_numbers
from loro_jax.directions.adam import decay_is_lost
from loro_jax.directions.orthogonalisation import Orthogonalisation, check_orthogonalisation
from loro_jax.directions.protocol import Direction
from loro_jax.linalg.newton_schulz import inverse_root
from loro_jax.linalg.precision import at_least_float32, matmul
from loro_jax.pairs import Both, Pairs

Array = jax.Array


class MomentumState(NamedTuple):
    """State of :func:`orthogonal`.

    Attributes:
        mu: averaged gradients, a tree like the factors.
    """

    mu: Any


class RowMomentState(NamedTuple):
    """State of :func:`orthogonal` with a ``row_moment``.

    Attributes:
        mu: averaged gradients, a tree like the factors.
        rows: running mean squares of the rows of B's moves, (..., m, 1), and of the columns of A's,
            (..., 1, n).
    """

    mu: Any
    rows: Any


def orthogonal(
    momentum: float = 0.95,
    *,
    nesterov: bool = True,
    newton_schulz_steps: int = 5,
    damping: float = 1e-3,
    equilibrate: bool = False,
    row_moment: float = 0.0,
) -> Direction:
    """Returns orthogonalised momentum as a direction for :func:`loro_jax.loro`.

    Args:
        momentum: decay of the averaged gradients.
        nesterov: whether to use Nesterov momentum.
        newton_schulz_steps: iterations of the orthogonalisation.
        damping: damping of the inverse roots of ``B^T B`` and ``A A^T``, relative to their mean
            eigenvalue.
        equilibrate: see :class:`loro_jax.directions.orthogonalisation.Orthogonalisation`.
        row_moment: see there.

    Returns:
        A direction of kind "moves"; its ``lr_scale`` is 1.

    Raises:
        ValueError: for a ``momentum`` outside [0, 1), no iterations, a negative ``damping``, an
            array too narrow for its number, or a variant out of range.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from loro_jax import LowRank, loro
        >>> params = {"w": LowRank(jnp.ones((6, 2)), jnp.eye(2, 4)), "b": jnp.zeros(6)}
        >>> def loss(params):
        ...     return jnp.sum((params["w"].product() + params["b"][:, None] - 3.0) ** 2)
        >>> tx = loro(0.01, direction=orthogonal(), lr_scale=20.0, exact_every=None)
        >>> updates, state = tx.update(jax.grad(loss)(params), tx.init(params), params)
        >>> bool(loss(optax.apply_updates(params, updates)) < loss(params))
        True
    """
    check_orthogonalised_momentum("orthogonal", momentum, newton_schulz_steps)
    check_not_negative("orthogonal", damping=damping)
    momentum, damping, row_moment = checked_numbers(
        "orthogonal", momentum=momentum, damping=damping, row_moment=row_moment
    )
    settings = Orthogonalisation(newton_schulz_steps, equilibrate, row_moment)
    check_orthogonalisation("orthogonal", settings)

    def average(old: Array, grad: Array) -> Array:
        return momentum * old + (1 - momentum) * grad

    def init(params: Any) -> Any:
        # In bfloat16 an average with a momentum of 0.999 would never decrease.
        def zeros(p: Array) -> Array:
            lost = decay_is_lost(momentum, p.dtype)
            return jnp.zeros_like(p, dtype=at_least_float32(p.dtype) if lost else p.dtype)

        mu = jax.tree.map(zeros, params)
        if settings.has_moment:
            return RowMomentState(mu, jax.tree.map(settings.first_moment_of_rows, params))
        return MomentumState(mu)

    def update(
        grads: Any, state: Any, params: Any, pairs: Pairs, **extra_args: Any
    ) -> tuple[Any, Any]:
        del extra_args
        mu = jax.tree.map(average, state.mu, grads)
        # Nesterov's momentum averages the newest gradient in once more. No bias correction: the
        # orthogonalisation removes the scale.
        ahead = jax.tree.map(average, mu, grads) if nesterov else mu
        # Rounded only here: the moves come from the unrounded averages.
        kept = state._replace(mu=jax.tree.map(lambda x, old: x.astype(old.dtype), mu, state.mu))
        given = list(zip(pairs.take(params), pairs.take(ahead), strict=True))
        whitened = [_whitened(*pair, damping) for pair in given]
        parts = [(settings.apply(one.B), settings.apply(one.A)) for one in whitened]
        if settings.has_moment:
            both = [
                (settings.evened(of_B, rows_B), settings.evened(of_A, rows_A))
                for (of_B, of_A), (rows_B, rows_A) in zip(
                    parts, pairs.take(state.rows), strict=True
                )
            ]
            parts, rows = ([(of_B[i], of_A[i]) for of_B, of_A in both] for i in (0, 1))
            kept = kept._replace(rows=pairs.put(state.rows, rows))
        moves = [one.moves(part) for one, part in zip(whitened, parts, strict=True)]
        return pairs.put(ahead, moves), kept

    return Direction(init, update, kind="moves", lr_scale=1.0)


class _Whitened(NamedTuple):
    """Gradients of a pair, or of a stack of pairs, in the coordinates of the orthogonalisation."""

    B: Array
    A: Array
    roots: Both  # inverse roots of B^T B and A A^T

    def moves(self, orthogonalised: Both) -> Both:
        """Returns the factors' moves from the orthogonalised gradients."""
        (O_B, O_A), m, n = orthogonalised, self.B.shape[-2], self.A.shape[-1]
        root_B, root_A = self.roots
        # The mean of the two parts, times the shape factor sqrt(m / n).
        half = 0.5 * (m / n) ** 0.5
        # The second root maps back from these coordinates to the factors.
        return half * matmul(O_B, root_A), half * matmul(root_B, O_A)


def _whitened(factors: Both, gradients: Both, damping: float) -> _Whitened:
    dtype = at_least_float32(jnp.result_type(*factors))
    B, A, g_B, g_A = (x.astype(dtype) for x in (*factors, *gradients))
    root_A = inverse_root(matmul(A, A.mT), damping)
    root_B = inverse_root(matmul(B.mT, B), damping)
    # Coordinates in which the other factor is orthonormal: there the spectral norm of a factor's
    # move is that of the product's move.
    return _Whitened(matmul(g_B, root_A), matmul(root_B, g_A), (root_B, root_A))
