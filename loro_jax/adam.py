"""Adam as the authors run it: epsilon is added to the uncorrected root."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class AdamState(NamedTuple):
    """State of :func:`scale_by_uncorrected_adam`.

    Attributes:
        count: steps since the state was made or refreshed, int32 scalar.
        mu: first moments, a tree like the parameters.
        nu: second moments, a tree like the parameters.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    mu: Any
    nu: Any


def scale_by_uncorrected_adam(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    mu_dtype: Any | None = None,
) -> optax.GradientTransformation:
    """Adam's direction with epsilon outside the bias correction.

    With ``m = b1 m + (1 - b1) g`` and ``v = b2 v + (1 - b2) g^2`` after c steps, the direction is
    ``m / (sqrt(v) + eps) * sqrt(1 - b2^c) / (1 - b1^c)``: the first version of the Adam paper, and
    the AdamW of older transformers releases that the authors' optimizer descends from.
    ``optax.scale_by_adam`` adds epsilon to the corrected root instead; the two agree as eps
    goes to 0, and differ in the first steps after a refresh, when ``sqrt(1 - b2^c)`` is small.

    Args:
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the uncorrected second moment.
        mu_dtype: dtype of the first moment; None: that of the parameters.

    Returns:
        A transformation that turns gradients into directions (to be scaled by minus the learning
        rate), in the gradients' dtypes.

    Example:
        >>> import jax.numpy as jnp
        >>> adam = scale_by_uncorrected_adam()
        >>> params = {"w": jnp.zeros(2)}
        >>> direction, _ = adam.update({"w": jnp.array([3.0, -0.5])}, adam.init(params))
        >>> [round(float(x), 3) for x in direction["w"]]
        [1.0, -1.0]
    """

    def init(params: Any) -> AdamState:
        return AdamState(
            count=jnp.zeros([], jnp.int32),
            mu=optax.tree.zeros_like(params, dtype=mu_dtype),
            nu=optax.tree.zeros_like(params),
        )

    def update(grads: Any, state: AdamState, params: Any = None) -> tuple[Any, AdamState]:
        del params
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda g, m: b1 * m + (1 - b1) * g, grads, state.mu)
        nu = jax.tree.map(lambda g, v: b2 * v + (1 - b2) * jnp.square(g), grads, state.nu)
        correction = jnp.sqrt(_one_minus_power(b2, count)) / _one_minus_power(b1, count)
        direction = jax.tree.map(
            lambda m, v, g: (correction * m / (jnp.sqrt(v) + eps)).astype(g.dtype), mu, nu, grads
        )
        mu = jax.tree.map(lambda new, old: new.astype(old.dtype), mu, state.mu)
        nu = jax.tree.map(lambda new, old: new.astype(old.dtype), nu, state.nu)
        return direction, AdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _one_minus_power(decay: jax.typing.ArrayLike, count: jax.Array) -> jax.Array:
    """``1 - decay^count`` without cancellation: 1 - 0.999 keeps four digits in float32."""
    steps = count.astype(jnp.result_type(float))
    if isinstance(decay, float | int):
        return -jnp.expm1(steps * (math.log(decay) if decay > 0 else -math.inf))
    return -jnp.expm1(steps * jnp.log(decay))
