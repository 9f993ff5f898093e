"""Precision of the optimizer: full-precision products, factorisations in float32 or wider."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def matmul(x: Array, y: Array) -> Array:
    """Multiplies in full float32, also on accelerators, which round the inputs by default."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def in_full_precision(fn: Callable) -> Callable:
    """Returns a function whose products ``x @ y`` are all in full precision, as :func:`matmul`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> "HIGHEST" in str(jax.make_jaxpr(in_full_precision(lambda x: x @ x))(jnp.eye(2)))
        True
    """

    @functools.wraps(fn)
    def precise(*args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return fn(*args, **kwargs)

    return precise


def at_least_float32(dtype: Any) -> Any:
    """Returns the dtype to factorise in: the given one, or float32 if it is narrower."""
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
        return jnp.dtype(jnp.float32)  # also for 8-bit floats, which JAX does not promote
    return jnp.promote_types(dtype, jnp.float32)


def inexact(dtype: Any) -> Any:
    """Returns the dtype of results: the given one, or float32 for integers."""
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.float32
