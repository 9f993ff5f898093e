"""Dtypes of computations."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def reduction_dtype(dtype: Any) -> Any:
    """Returns the dtype to sum in: float32, or float64 for float64.

    Example:
        >>> reduction_dtype("bfloat16")
        dtype('float32')
    """
    return jnp.promote_types(dtype, jnp.float32)
