"""SST, sparse spectral training: singular values, and a few singular vectors in turns.

The weight is ``W = U diag(S) V^T`` with all of U (m, d), S (d,) and V (n, d), d = min(m, n). S is
trained in every step, and kept at zero or above. Of the singular vectors only r at a time are
trained: a round of some steps (the authors: about 200) begins with a sample of r of the d places,
drawn without replacement with the probabilities

    p_i = (1 / d + S_i / sum(S)) / 2.

The gradients of their vectors are the enhanced ones, ``G v_i`` and ``G^T u_i`` where G is W's
gradient: the chain rule has a factor S_i in both, which would leave vectors of small singular
values where they are. After each step the vectors are divided by their lengths. A round ends with a
new singular value decomposition of W, which the trained vectors are no longer orthogonal enough
for; Adam's moments start from zero, and the learning rate is warmed up again. The optimizer has
state for S and for r vectors of each side, but U and V take more memory than W.

Here the active vectors are stored apart, as a pair: B (m, r) holds columns of U and A (r, n) rows
of ``V^T``. What U and ``V^T`` hold in their places is out of date until the round ends.

Source: Zhao et al., "Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural
Networks", ICML 2025, arXiv 2405.15481. The authors' code was not at hand. As in ReLoRA here, Adam's
count of steps continues when its moments are zeroed. Every round ends with a decomposition.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from loro_jax.linalg.batching import one_by_one
from loro_jax.linalg.precision import at_least_float32, matmul

Array = jax.Array


class Spectral(NamedTuple):
    """A weight as its singular values and vectors; leading axes are layers.

    Attributes:
        U: left singular vectors, (..., m, d); the columns of active places are out of date.
        S: singular values, (..., d), in any order during a round.
        Vt: right singular vectors, (..., d, n); the rows of active places are out of date.
        B: the active columns of U, (..., m, r).
        A: the active rows of V^T, (..., r, n).
        active: their places, int32 (..., r), ascending.
    """

    U: Array
    S: Array
    Vt: Array
    B: Array
    A: Array
    active: Array

    def astype(self, dtype: Any) -> Spectral:
        """Returns the state with values and vectors in a dtype."""
        U, S, Vt, B, A = (part.astype(dtype) for part in self[:5])
        return Spectral(U, S, Vt, B, A, self.active)

    @property
    def vectors(self) -> tuple[Array, Array]:
        """Returns U and V^T with the active vectors in their places."""
        # One matrix at a time: the places differ from layer to layer.
        put = jnp.vectorize(
            lambda V, rows, places: V.at[places].set(rows), signature="(d,n),(r,n),(r)->(d,n)"
        )
        return put(self.U.mT, self.B.mT, self.active).mT, put(self.Vt, self.A, self.active)

    def weight(self) -> Array:
        """Returns W, (..., m, n), in float32 or wider."""
        dtype = at_least_float32(self.U.dtype)
        U, Vt = (x.astype(dtype) for x in self.vectors)
        return matmul(U * self.S.astype(dtype)[..., None, :], Vt)


def decompose(key: Array, W: Array, rank: int) -> Spectral:
    """Decomposes a weight, and draws which vectors are active.

    Args:
        key: a JAX random key.
        W: (..., m, n); leading axes are layers, each with its own draw.
        rank: r, the number of active vectors of each side, between 1 and min(m, n).

    Returns:
        The decomposition, in the dtype of W; it is computed in float32 or wider.

    Raises:
        ValueError: if the rank does not fit.

    Example:
        >>> W = jax.random.normal(jax.random.key(0), (6, 4))
        >>> parts = decompose(jax.random.key(1), W, 2)
        >>> parts.U.shape, parts.B.shape, parts.A.shape
        ((6, 4), (6, 2), (2, 4))
        >>> bool(jnp.allclose(parts.weight(), W, atol=1e-5))
        True
    """
    if W.ndim < 2 or not 1 <= rank <= min(W.shape[-2:]):
        raise ValueError(
            f"decompose: rank {rank} does not fit a matrix of shape {tuple(W.shape)}; expected "
            "1 <= rank <= min(m, n)."
        )
    # One matrix at a time on CPU, where batched LAPACK calls can block each other for ever.
    svd = one_by_one(lambda W: tuple(jnp.linalg.svd(W, full_matrices=False)), W.ndim - 2)
    U, S, Vt = (x.astype(W.dtype) for x in svd(W.astype(at_least_float32(W.dtype))))
    active = draw_active(key, S, rank)
    B = jnp.take_along_axis(U, active[..., None, :], axis=-1)
    A = jnp.take_along_axis(Vt, active[..., :, None], axis=-2)
    return Spectral(U, S, Vt, B, A, active)


def draw_active(key: Array, S: Array, rank: int) -> Array:
    """Draws the places whose vectors are trained in a round.

    Args:
        key: a JAX random key.
        S: singular values, (..., d), none of them negative.
        rank: r.

    Returns:
        Places, int32 (..., r), ascending.

    Example:
        >>> draw_active(jax.random.key(0), jnp.array([3.0, 0.0, 1.0]), 3).tolist()
        [0, 1, 2]
    """
    S = S.astype(at_least_float32(S.dtype))
    # The smallest number in place of a sum of zero: then all places are as likely.
    total = jnp.maximum(jnp.sum(S, axis=-1, keepdims=True), jnp.finfo(S.dtype).tiny)
    chances = 0.5 * (1 / S.shape[-1] + S / total)
    # The largest of logarithms plus Gumbel noise are a sample without replacement.
    noisy = jnp.log(chances) + jax.random.gumbel(key, S.shape, S.dtype)
    return jnp.sort(jax.lax.top_k(noisy, rank)[1], axis=-1).astype(jnp.int32)


def constrained(state: Spectral) -> Spectral:
    """Returns the state with active vectors of length 1, and singular values of at least 0.

    To be applied after every step of the optimizer.

    Example:
        >>> parts = decompose(jax.random.key(1), jnp.eye(3), 1)
        >>> moved = parts._replace(S=parts.S - jnp.array([2.0, 0.0, 0.0]), B=5 * parts.B)
        >>> one = constrained(moved)
        >>> one.S.tolist(), round(float(jnp.linalg.norm(one.B)), 6)
        ([0.0, 1.0, 1.0], 1.0)
    """
    return state._replace(
        S=jnp.maximum(state.S, 0), B=_unit(state.B, axis=-2), A=_unit(state.A, axis=-1)
    )


def _unit(vectors: Array, axis: int) -> Array:
    wide = vectors.astype(at_least_float32(vectors.dtype))
    lengths = jnp.linalg.vector_norm(wide, axis=axis, keepdims=True)
    return (wide / jnp.maximum(lengths, jnp.finfo(wide.dtype).tiny)).astype(vectors.dtype)


def next_round(key: Array, state: Spectral) -> Spectral:
    """Decomposes the weight anew, and draws other active vectors; W stays the same.

    The optimizer's moments of S, B and A belong to the old vectors: the caller zeroes them.

    Args:
        key: a JAX random key, a new one for each round and weight.
        state: the state at the end of a round.

    Returns:
        The state at the beginning of the next one, in the same shapes and dtypes.
    """
    # The parts are rounded, not W.
    return decompose(key, state.weight(), state.active.shape[-1]).astype(state.U.dtype)
