"""State and arithmetic of Optax transformations in float32, for parameters in narrower dtypes."""

from __future__ import annotations

from typing import Any

import jax
import optax

from loro_jax.linalg.precision import at_least_float32


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation with its state and arithmetic in float32 or wider.

    Optax's Adam has moments of the parameters' dtype. In bfloat16, 0.999 is 1: the second moment
    would never decay. Updates are rounded once, to the dtype of the parameters (or of the
    gradients, without parameters). Of float32 parameters nothing changes.

    Example:
        >>> import jax.numpy as jnp
        >>> params = jnp.ones(2, jnp.bfloat16)
        >>> tx = in_float32(optax.scale_by_adam())
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> updates.dtype.name, state.nu.dtype.name
        ('bfloat16', 'float32')
    """
    inner = optax.with_extra_args_support(tx)

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(at_least_float32(x.dtype)), tree)

    def init(params: Any) -> Any:
        return inner.init(wide(params))

    def update(grads: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        # wide(None) is None.
        updates, state = inner.update(wide(grads), state, wide(params), **extra_args)
        of_dtypes = grads if params is None else params
        return jax.tree.map(lambda x, like: x.astype(like.dtype), updates, of_dtypes), state

    return optax.GradientTransformationExtraArgs(init, update)
