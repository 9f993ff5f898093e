"""Checked casts of tensors to another dtype."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np

from models.huggingface.errors import CheckpointError
from models.huggingface.files import DTYPES


def cast(value: np.ndarray, dtype: Any, name: str) -> np.ndarray:
    """Casts a floating-point tensor.

    Args:
        value: the tensor.
        dtype: dtype of the result.
        name: name of the tensor, for messages.

    Returns:
        The rounded tensor.

    Raises:
        CheckpointError: if an entry is infinite or NaN, overflows in the dtype, or all entries
            underflow to 0.

    Example:
        >>> cast(np.array([1e5, 1.0]), np.float16, "norm")
        Traceback (most recent call last):
        ...
        models.huggingface.errors.CheckpointError: norm holds 1e+05, more than float16 can hold \
(6.55e+04); expected a dtype of a wider range, such as bfloat16 or float32.
    """
    bad = ~np.isfinite(value)
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise CheckpointError(
            f"{name} holds {float(value[first])} at {list(first)} ({int(bad.sum())} of {value.size}"
            " entries are not finite)."
        )
    with np.errstate(all="ignore"):
        result = value.astype(dtype)
    target, source = np.dtype(dtype), value.dtype
    # Only a target of smaller range can overflow; NumPy's own warning is silenced above.
    limit = float(ml_dtypes.finfo(target).max)
    if limit < float(ml_dtypes.finfo(source).max) and not np.isfinite(result).all():
        largest = float(np.abs(value.astype(np.float64)).max())
        raise CheckpointError(
            f"{name} holds {largest:.3g}, more than {target.name} can hold "
            f"({limit:.3g}); expected a dtype of a wider range, such as bfloat16 or "
            "float32."
        )
    # Single entries may round to zero; if all do, the tensor's content is lost.
    if target != source and not result.any() and value.any():
        largest = float(np.abs(value.astype(np.float64)).max())
        raise CheckpointError(
            f"{name} holds numbers up to {largest:.3g}, all of which are 0 in {target.name}; "
            "expected a dtype of a wider range, such as bfloat16 or float32."
        )
    return result


def cast_all(
    tensors: Iterable[tuple[str, jax.Array]], dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Moves tensors to the host one by one, and casts those of floating-point numbers.

    Args:
        tensors: names and values.
        dtype: a key of :data:`models.huggingface.files.DTYPES`.

    Yields:
        Names and values.
    """
    for name, tensor in tensors:
        value = np.asarray(tensor)
        floating = jax.numpy.issubdtype(value.dtype, jax.numpy.floating)
        yield name, cast(value, DTYPES[dtype], name) if floating else value
