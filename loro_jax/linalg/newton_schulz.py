"""Orthogonalisation, inverse roots and largest singular values by matrix products alone.

Leading axes are batch axes: no LAPACK routine is called, so batches are safe on CPU.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from loro_jax.linalg.batching import batches_itself, varying_alike
from loro_jax.linalg.precision import at_least_float32, matmul

Array = jax.Array

# Muon's quintic: steep at zero, so that small singular values grow fast; the price is that large
# ones end anywhere in [0.68, 1.13] instead of at one. Its values never exceed OVERSHOOT.
QUINTIC = (3.4445, -4.7750, 2.0315)
OVERSHOOT = 1.203


def orthogonalise(X: Array, steps: int = 5) -> Array:
    """Moves all singular values towards one and keeps the singular vectors (Newton-Schulz).

    Starts from ``X / |X|`` (Frobenius norm) and repeats ``X <- a X + b (X X^T) X + c (X X^T)^2 X``.
    Singular values below a few thousandths of the norm need more than five steps.

    Args:
        X: array of shape (..., m, n), float32 or wider.
        steps: number of iterations.

    Returns:
        Array of the shape of X, with no singular value above 1.203; zero where X is zero.

    Example:
        >>> import jax.numpy as jnp
        >>> O = orthogonalise(jnp.diag(jnp.array([5.0, 1.0, 0.2])))
        >>> bool(jnp.all((0.6 < jnp.diag(O)) & (jnp.diag(O) < 1.203)))
        True

    Source: Janson, Oyallon and Belilovsky, arXiv 2602.12429, Algorithm 2; the coefficients are
    those of Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """
    a, b, c = QUINTIC
    wide = X.shape[-2] < X.shape[-1]
    tall = _unit(X.mT if wide else X, otherwise=0)
    # The device's default precision on purpose (TF32 on NVIDIA GPUs, bfloat16 on TPUs):
    # their errors are far below the quintic's own spread of singular values, and full float32 would
    # take several times as long.
    for _ in range(steps):
        gram = tall.mT @ tall  # on the shorter side: r x r for a factor
        tall = a * tall + tall @ (b * gram + c * (gram @ gram))
    return tall.mT if wide else tall


def inverse_root(S: Array, damping: float = 1e-3, steps: int = 16) -> Array:
    """Computes ``(S + damping tr(S) / r I)^{-1/2}`` of positive semi-definite S (Newton-Schulz).

    The coupled iteration ``T = (3 I - Z Y) / 2, Y <- Y T, Z <- T Z`` from ``Y = S / |S|`` and
    ``Z = I`` converges to the root and its inverse. Small eigenvalues of Y grow by 9/4 per step.

    Args:
        S: array of shape (..., r, r), float32 or wider, symmetric.
        damping: shift of the eigenvalues, relative to their mean.
        steps: number of iterations; 16 suffice for ``r / damping`` up to a few hundred thousand.

    Returns:
        Array of the shape of S; zero where S is zero.

    Example:
        >>> import jax.numpy as jnp
        >>> R = inverse_root(jnp.diag(jnp.array([4.0, 0.25])), damping=0.0)
        >>> [round(float(x), 3) for x in jnp.diag(R)]
        [0.5, 2.0]

    Source: Higham, "Functions of Matrices", 2008, section 6.3.
    """
    r = S.shape[-1]
    identity = _identity_like(S)
    # The damping is relative to the mean eigenvalue, so that the root scales with S.
    mean = jnp.trace(S, axis1=-2, axis2=-1)[..., None, None] / r
    damped = S + damping * mean * identity
    norm = _norm(damped)
    # Eigenvalues must be in (0, 1] to converge; a zero matrix starts at the identity instead.
    Y, Z = jnp.where(norm > 0, damped / jnp.where(norm > 0, norm, 1), identity), identity
    for _ in range(steps):
        T = 1.5 * identity - 0.5 * matmul(Z, Y)
        Y, Z = matmul(Y, T), matmul(T, Z)
    return jnp.where(norm > 0, Z * jax.lax.rsqrt(jnp.where(norm > 0, norm, 1)), 0)


# Most iterations of polar_factor: a singular value of 1e-5 of the norm takes 17.
_MOST_ITERATIONS = 24

# Beyond this scale the largest singular values become so small that their directions drown in
# rounding errors; the source's bound.
_LARGEST_SCALE = 1.69770248526


def polar_factor(X: Array, least: jax.typing.ArrayLike) -> tuple[Array, Array]:
    """Computes the orthonormal polar factor: all singular values become one (Newton-Schulz).

    Repeats ``X <- a X (3 I - a^2 X^T X) / 2``. For singular values in [l, 1], the best scale is
    ``a^2 = 3 / (1 + l + l^2)``, within a bound, and the new l is the image of the old one: small
    singular values grow by up to 2.5 per step, and convergence is quadratic.

    Args:
        X: array of shape (..., m, r), m >= r, float32 or wider.
        least: estimate of the smallest singular value of X, shape (...). It only affects speed.

    Returns:
        The factor, and whether it converged, shape (...): false if X is singular or not finite. Of
        a singular X, singular values at zero stay there, and others are one all the same.

    Example:
        >>> import jax.numpy as jnp
        >>> Q, converged = polar_factor(jnp.array([[0.0, 2.0], [-0.5, 0.0]]), 0.5)
        >>> [[round(float(x), 3) for x in row] for row in Q], bool(converged)
        ([[0.0, 1.0], [-1.0, 0.0]], True)

    Source: Chen and Chow, "A stable scaling of Newton-Schulz for improving the sign function
    computation of a Hermitian matrix", Argonne preprint ANL/MCS-P5059-0114, 2014.
    """
    gram = matmul(X.mT, X)
    # |X|_2 <= |X^T X|_F^(1/2), tighter than |X|_F: singular values end in (0, 1].
    bound = jnp.sqrt(_norm(gram))
    bound = jnp.where(bound > 0, bound, 1)
    start = jnp.clip(jnp.asarray(least)[..., None, None] / bound, 0, 1).astype(X.dtype)
    factor, converged = _polar_iteration(X / bound, gram / bound**2, start)
    return factor, converged[..., 0, 0]


@batches_itself
def _polar_iteration(X: Array, gram: Array, least: Array) -> tuple[Array, Array]:
    """Returns the polar factor of X, given ``X^T X``, and whether it converged, (..., 1, 1)."""
    identity = _identity_like(gram)
    # One more (quadratic) step reduces an error below this to rounding errors.
    near = 2 * float(jnp.finfo(X.dtype).eps) ** 0.5

    def improved(X: Array, gram: Array, scale: Array) -> Array:
        return matmul(X, 1.5 * scale * identity - 0.5 * scale**3 * gram)

    def distance(gram: Array) -> Array:
        return _norm(identity - gram)

    def again(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        step, X, gram, least = state
        scale = jnp.minimum(jnp.sqrt(3 / (1 + least + least**2)), _LARGEST_SCALE)
        X = improved(X, gram, scale)
        # The smallest is now the image of the smallest, or of the largest, which is one.
        image = (1.5 * scale * x - 0.5 * (scale * x) ** 3 for x in (least, 1.0))
        least = jnp.clip(jnp.minimum(*image), 0, 1)
        return step + 1, X, matmul(X.mT, X), least

    _, X, gram, _ = jax.lax.while_loop(
        # Comparisons with NaN are false, so the loop stops for non-finite X.
        lambda state: (state[0] < _MOST_ITERATIONS) & jnp.any(distance(state[2]) > near),
        again,
        varying_alike((jnp.int32(0), X, gram, least)),
    )
    return improved(X, gram, jnp.ones_like(least)), distance(gram) <= near


def power_iteration(X: Array, u: Array, steps: int = 1) -> tuple[Array, Array]:
    """Estimates the largest singular value of X from below, starting from a left vector.

    Args:
        X: array of shape (..., m, n), float32 or wider.
        u: unit vector, shape (..., m, 1), for instance from the last call.
        steps: number of iterations, each a product with X^T and X.

    Returns:
        The estimate, shape (..., 1, 1), and the new left vector. If X annihilates the vector (a
        zero matrix does), the estimate is zero and the vector is kept.

    Example:
        >>> import jax.numpy as jnp
        >>> sigma, _ = power_iteration(jnp.diag(jnp.array([3.0, 1.0])), jnp.full((2, 1), 0.5), 9)
        >>> round(float(sigma[0, 0]), 3)
        3.0

    Source: Janson, Oyallon and Belilovsky, arXiv 2602.12429, Algorithm 3.
    """
    sigma = jnp.zeros((*X.shape[:-2], 1, 1), X.dtype)
    for _ in range(steps):
        image = X @ _unit(X.mT @ u, otherwise=0)
        sigma, u = _norm(image), _unit(image, otherwise=u)
    return sigma, u


def start_vector(X: Array) -> Array:
    """Returns a fixed random unit vector to start the power iteration, the same for all layers."""
    vector = jax.random.normal(jax.random.key(0), (X.shape[-2], 1), at_least_float32(X.dtype))
    return jnp.broadcast_to(_unit(vector, otherwise=0), (*X.shape[:-1], 1))


def _identity_like(X: Array) -> Array:
    """Returns a batch of identity matrices of X's shape."""
    return jnp.broadcast_to(jnp.eye(X.shape[-1], dtype=X.dtype), X.shape)


def _norm(X: Array) -> Array:
    return jnp.sqrt(jnp.sum(X**2, axis=(-2, -1), keepdims=True))


def _unit(X: Array, otherwise: jax.typing.ArrayLike) -> Array:
    """Divides X by its Frobenius norm; returns ``otherwise`` where that is zero."""
    norm = _norm(X)
    return jnp.where(norm > 0, X / jnp.where(norm > 0, norm, 1), otherwise)
