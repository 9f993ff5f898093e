"""How precise the optimizer computes: products in full, factorisations in float32 at least."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def matmul(x: Array, y: Array) -> Array:
    """The product in full float32, also on accelerators, whose default is to round the inputs."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def at_least_float32(dtype: Any) -> Any:
    """The dtype to factorise in: the given one, or float32 where it is narrower."""
    return jnp.promote_types(dtype, jnp.float32)
