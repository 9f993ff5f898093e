"""Checks of numbers that are passed to optimizers as arrays.

``optax.inject_hyperparams`` passes every number as an array, by default in the widest dtype of the
parameters; and a number may be the result of a user's arithmetic.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

# A dtype narrower than float32 changes the meaning of these (0.999 is 1 in bfloat16, 1e-8 is 0 in
# float16). Others, such as a learning rate, are only off by some thousandths.
_DELICATE = ("b1", "b2", "eps", "damping", "momentum")


def checked_numbers(where: str, **numbers: Any) -> list[Any]:
    """Returns numbers unchanged, or the real part of arrays with a complex dtype.

    Args:
        where: the function that was called, for the message.
        numbers: by the names of the arguments: numbers, arrays or anything else (a schedule, None),
            which is not checked.

    Returns:
        The numbers, in their order.

    Raises:
        ValueError: if the dtype of an array is too narrow for its number.

    Example:
        >>> import jax.numpy as jnp
        >>> checked_numbers("loro", b1=0.9, b2=0.999)
        [0.9, 0.999]
        >>> try:
        ...     checked_numbers("loro", b2=jnp.bfloat16(0.999))
        ... except ValueError as problem:
        ...     print(str(problem)[:70])
        loro: b2 is an array of bfloat16, which is too narrow for it (0.999 wo
    """
    return [_checked(where, name, value) for name, value in numbers.items()]


def _checked(where: str, name: str, value: Any) -> Any:
    dtype = getattr(value, "dtype", None)
    if dtype is None or callable(value):
        return value
    if jnp.issubdtype(dtype, jnp.complexfloating):  # by inject_hyperparams, of complex parameters
        return jnp.real(value)
    if name in _DELICATE and not _holds_float32(dtype):
        raise ValueError(
            f"{where}: {name} is an array of {dtype}, which is too narrow for it (0.999 would be "
            f"{float(np.asarray(0.999, dtype)):.4g}); pass a number or float32. Under "
            "optax.inject_hyperparams say hyperparam_dtype=jnp.float32."
        )
    return value


def _holds_float32(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 32


def check_orthogonalised_momentum(where: str, momentum: Any, newton_schulz_steps: int) -> None:
    """Raises ValueError for a momentum outside [0, 1), or no iterations.

    Other values than plain numbers may be traced (a hyperparameter in a state) and are not checked.
    """
    if isinstance(momentum, float | int) and not 0 <= momentum < 1:
        raise ValueError(f"{where}: momentum must be in [0, 1), but is {momentum}.")
    if newton_schulz_steps < 1:
        raise ValueError(
            f"{where}: newton_schulz_steps must be at least 1, but is {newton_schulz_steps}."
        )


def check_not_negative(where: str, **numbers: Any) -> None:
    """Raises ValueError for a plain number below zero; values that may be traced are skipped."""
    for name, value in numbers.items():
        if isinstance(value, float | int) and value < 0:
            raise ValueError(f"{where}: {name} must not be negative, but is {value}.")
