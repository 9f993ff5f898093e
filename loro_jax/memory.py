"""Counts of parameters and bytes in training, computed from shapes only."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Memory footprint of a model and its optimizer, without activations.

    Attributes:
        parameters: number of parameters.
        weight_bytes: bytes of the parameters.
        gradient_bytes: bytes of their gradients.
        optimizer_bytes: bytes of the optimizer's state.
    """

    parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int

    @property
    def total_bytes(self) -> int:
        """Bytes of weights, gradients and optimizer state."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


def count_parameters(tree: Any) -> int:
    """Counts the entries of a tree of arrays or ``jax.ShapeDtypeStruct``.

    Example:
        >>> import jax.numpy as jnp
        >>> count_parameters({"B": jnp.ones((4, 2)), "A": jnp.ones((2, 3))})
        14
    """
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def count_bytes(tree: Any) -> int:
    """Counts the bytes of a tree of arrays or ``jax.ShapeDtypeStruct``."""
    return sum(
        math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)
    )


def footprint(params: Any, opt_state: Any) -> Footprint:
    """Counts the memory of training, given that gradients have the parameters' shapes and dtypes.

    Args:
        params: tree of arrays or abstract arrays.
        opt_state: the optimizer's state, arrays or abstract arrays.

    Returns:
        The counts, in entries and bytes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from loro_jax import LowRank, loro
        >>> params = {"w": LowRank(jnp.ones((64, 4)), jnp.ones((4, 32)))}
        >>> counted = footprint(params, jax.eval_shape(loro(0.01).init, params))
        >>> counted.parameters, counted.weight_bytes
        (384, 1536)
    """
    weights = count_bytes(params)
    return Footprint(count_parameters(params), weights, weights, count_bytes(opt_state))


if __name__ == "__main__":
    import sys

    from loro_jax.__main__ import moved

    sys.exit(moved("memory", sys.argv[1:]))
