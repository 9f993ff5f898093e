"""OSFT, orthogonal subspace fine-tuning: each task trains only the weak directions of a weight.

For tasks that follow each other. A weight is split by its singular values,

    W = U_high diag(S_high) V_high^T + B diag(S) A,

into its k strongest directions, which hold what earlier tasks have learned and stay fixed, and the
other r = min(m, n) - k, which are trained: B (m x r), S (r) and A (r x n) start as singular vectors
and values. Their gradients are projected away from the fixed directions,

    dB <- dB - U_high (U_high^T dB),    dA <- dA - (dA V_high) V_high^T.

When a task ends, :func:`next_task` splits the weight anew: what the task has learned is among the
directions that can be strong enough to be kept.

Projected gradients alone keep steps of plain gradient descent orthogonal. Adam divides each entry
by another number, so its steps are not; :func:`cleaned`, applied after each step, removes what they
have added to the fixed directions. W then maps inputs in the span of V_high as before, and its
outputs along U_high stay what they were for all inputs. This is an addition to the method.

Source: Nayak et al., "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual
Learning", arXiv 2504.07097, and the authors' code and that of PEFT (``osf``). As in PEFT, k is one
number for all layers (there by default half of the smaller side); the paper derives it for each
layer from the similarity of its inputs and outputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from loro_jax.linalg.batching import one_by_one
from loro_jax.linalg.precision import at_least_float32, matmul

Array = jax.Array


class Split(NamedTuple):
    """A weight as its fixed and its trained directions; leading axes are layers.

    Attributes:
        U_high: left singular vectors of the fixed directions, (..., m, k).
        S_high: their singular values, (..., k).
        Vt_high: their right singular vectors, (..., k, n).
        B: left vectors of the trained directions, (..., m, r).
        S: their values, (..., r).
        A: their right vectors, (..., r, n).
    """

    U_high: Array
    S_high: Array
    Vt_high: Array
    B: Array
    S: Array
    A: Array

    def astype(self, dtype: Any) -> Split:
        """Returns the split in a dtype."""
        return Split(*(part.astype(dtype) for part in self))

    def weight(self) -> Array:
        """Returns W, (..., m, n), in float32 or wider."""
        U, s, Vt, B, S, A = self.astype(at_least_float32(self.B.dtype))
        return matmul(U * s[..., None, :], Vt) + matmul(B * S[..., None, :], A)


def split(W: Array, rank: int) -> Split:
    """Splits a weight into directions to keep and directions to train.

    Args:
        W: (..., m, n); leading axes are layers.
        rank: r, the number of directions to train, at least 1 and below min(m, n).

    Returns:
        The parts, in the dtype of W; computed in float32 or wider.

    Raises:
        ValueError: if the rank does not fit.

    Example:
        >>> W = jax.random.normal(jax.random.key(0), (6, 4))
        >>> parts = split(W, rank=1)
        >>> parts.U_high.shape, parts.B.shape, parts.A.shape
        ((6, 3), (6, 1), (1, 4))
        >>> bool(jnp.allclose(parts.weight(), W, atol=1e-5))
        True
    """
    if W.ndim < 2 or not 1 <= rank < min(W.shape[-2:]):
        raise ValueError(
            f"split: {rank} trained directions do not fit a matrix of shape {tuple(W.shape)}; "
            "expected at least 1, and fewer than min(m, n)."
        )
    # One matrix at a time on CPU, where batched LAPACK calls can block each other for ever.
    svd = one_by_one(lambda W: tuple(jnp.linalg.svd(W, full_matrices=False)), W.ndim - 2)
    U, s, Vt = svd(W.astype(at_least_float32(W.dtype)))
    k = s.shape[-1] - rank
    return Split(
        U[..., :k], s[..., :k], Vt[..., :k, :], U[..., k:], s[..., k:], Vt[..., k:, :]
    ).astype(W.dtype)


def next_task(parts: Split) -> Split:
    """Splits the weight anew at the end of a task; W stays the same.

    The optimizer's moments of B, S and A belong to the old directions: begin with a fresh state.

    Example:
        >>> parts = split(jnp.diag(jnp.array([3.0, 2.0, 1.0])), rank=1)
        >>> learned = parts._replace(S=jnp.array([5.0]))
        >>> next_task(learned).S_high.tolist()
        [5.0, 3.0]
    """
    # The parts are rounded, not W.
    return split(parts.weight(), parts.S.shape[-1]).astype(parts.B.dtype)


def without(X: Array, vectors: Array) -> Array:
    """Removes from columns their part in the span of orthonormal ones, ``X - V (V^T X)``.

    Args:
        X: (..., m, r).
        vectors: V, (..., m, k).

    Example:
        >>> without(jnp.array([[3.0], [4.0]]), jnp.array([[1.0], [0.0]])).tolist()
        [[0.0], [4.0]]
    """
    wide = at_least_float32(X.dtype)
    V, columns = vectors.astype(wide), X.astype(wide)
    return (columns - matmul(V, matmul(V.mT, columns))).astype(X.dtype)


@jax.custom_vjp
def with_projected_gradient(X: Array, vectors: Array) -> Array:
    """Returns X, whose gradient will lose its part in the span of fixed vectors.

    Args:
        X: trained columns, (..., m, r).
        vectors: orthonormal columns, (..., m, k).

    Example:
        >>> V = jnp.array([[1.0], [0.0]])
        >>> of = jax.grad(lambda X: jnp.sum(with_projected_gradient(X, V)))
        >>> of(jnp.zeros((2, 1))).tolist()
        [[0.0], [1.0]]
    """
    return X


def _forward(X: Array, vectors: Array) -> tuple[Array, Array]:
    return X, vectors


def _backward(vectors: Array, gradient: Array) -> tuple[Array, None]:
    return without(gradient, vectors), None


with_projected_gradient.defvjp(_forward, _backward)


def cleaned(parts: Split) -> Split:
    """Removes from B and A what a step has added along the fixed directions.

    Example:
        >>> parts = split(jnp.diag(jnp.array([3.0, 2.0, 1.0])), rank=1)
        >>> again = cleaned(parts._replace(B=parts.B + 1.0))
        >>> bool(jnp.allclose(parts.U_high.T @ again.B, 0.0, atol=1e-6))
        True
    """
    A = without(parts.A.mT, parts.Vt_high.mT).mT
    return parts._replace(B=without(parts.B, parts.U_high), A=A)
