"""The factors that a dense weight starts from: drawn at its size, or its truncated SVD."""

from __future__ import annotations

import functools
import math
import zlib

import jax
import jax.numpy as jnp

from loro_jax.linalg.precision import at_least_float32
from loro_jax.lowrank import from_dense, initialise

Array = jax.Array


def initial_factors(W: Array, rank: int, init: str, key: Array) -> tuple[Array, Array]:
    """Returns the factors that take a dense weight's place.

    Args:
        W: the weight, (..., m, n); leading axes are batch axes. A ``jax.ShapeDtypeStruct`` gives
            factors that are such, too.
        rank: r.
        init: "svd": the best approximation of rank r, balanced. Or a name known to
            :func:`loro_jax.initialise`; where its table has s, that is the root mean square of W's
            entries, for each matrix. Where all of W is zero, s of "auto" and "dlr" would be zero,
            too, and with both factors zero nothing would train: these matrices start as "lora", B
            = 0, so that the product is zero as before.
        key: JAX random key.

    Returns:
        B (..., m, r) and A (..., r, n), in the dtype of W.

    Raises:
        ValueError: as :func:`loro_jax.initialise` and :func:`loro_jax.from_dense`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> W = jax.random.normal(jax.random.key(0), (64, 48))
        >>> B, A = initial_factors(W, 48, "svd", jax.random.key(1))
        >>> bool(jnp.allclose(B @ A, W, atol=1e-4))
        True
        >>> B, A = initial_factors(W, 16, "auto", jax.random.key(1))
        >>> bool(0.9 < jnp.std(B @ A) < 1.1)
        True
    """
    if isinstance(W, jax.ShapeDtypeStruct):
        return jax.eval_shape(lambda W: initial_factors(W, rank, init, jax.random.key(0)), W)
    if init == "svd":
        return _truncated(W, rank)
    return _drawn(W, key, rank, init)


# Compiled: networks have many layers of a shape.
_truncated = jax.jit(from_dense, static_argnames="rank")


@functools.partial(jax.jit, static_argnames=("rank", "init"))
def _drawn(W: Array, key: Array, rank: int, init: str) -> tuple[Array, Array]:
    def draw(key: Array, W: Array) -> tuple[Array, Array]:
        m, n = W.shape
        size = jnp.sqrt(jnp.mean(jnp.square(W.astype(at_least_float32(W.dtype)))))
        factors = initialise(key, m, n, rank, init, jnp.where(size > 0, size, 1.0))
        if init in ("auto", "dlr"):
            zero = initialise(key, m, n, rank, "lora")
            factors = jax.tree.map(lambda x, y: jnp.where(size > 0, x, y), factors, zero)
        B, A = factors
        return B.astype(W.dtype), A.astype(W.dtype)

    leading = W.shape[:-2]
    keys = jax.random.split(key, math.prod(leading))
    B, A = jax.vmap(draw)(keys, W.reshape(-1, *W.shape[-2:]))
    return B.reshape(*leading, *B.shape[1:]), A.reshape(*leading, *A.shape[1:])


def key_of(key: Array | None, path: str) -> Array:
    """Returns the random key of a layer: it depends on the layer's path, not on other layers."""
    return jax.random.fold_in(jax.random.key(0) if key is None else key, zlib.crc32(path.encode()))


def relative_error(W: Array, product: Array) -> float:
    """Returns ``|W - product| / |W|``, Frobenius norms over all axes; 0 if both are zero.

    Example:
        >>> relative_error(jnp.eye(4), jnp.diag(jnp.array([1.0, 1.0, 1.0, 0.0])))
        0.5
    """
    dtype = at_least_float32(W.dtype)
    W, product = W.astype(dtype), product.astype(dtype)
    error, size = jnp.linalg.norm((W - product).ravel()), jnp.linalg.norm(W.ravel())
    return float(jnp.where(error == 0, 0.0, error / size))
