"""Adam as in the authors' code: epsilon is added to the uncorrected root."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loro_jax.checks import checked_numbers
from loro_jax.directions.protocol import Direction
from loro_jax.linalg.precision import at_least_float32, inexact
from loro_jax.pairs import Pairs


class AdamState(NamedTuple):
    """State of :func:`scale_by_uncorrected_adam`.

    Attributes:
        count: steps since the state was made or refreshed, int32 scalar.
        mu: first moments, a tree like the parameters.
        nu: second moments, a tree like the parameters: real, and in float32 or wider.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    mu: Any
    nu: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Adam(Direction):
    """The direction that :func:`adam` returns, with its constants.

    Attributes:
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the uncorrected second moment.
        mu_dtype: dtype of the first moment, or None.
    """

    b1: jax.typing.ArrayLike = 0.9
    b2: jax.typing.ArrayLike = 0.999
    eps: jax.typing.ArrayLike = 1e-6
    mu_dtype: Any | None = None


def adam(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    mu_dtype: Any | None = None,
) -> Adam:
    """Returns Adam as a direction for :func:`loro_jax.loro`, the default.

    Args:
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the uncorrected second moment.
        mu_dtype: dtype of the first moment; None: the parameters'. See
            :func:`scale_by_uncorrected_adam`.

    Returns:
        A direction of kind "gradients"; its ``lr_scale`` is r / min(m, n) of each pair.

    Raises:
        ValueError: as :func:`scale_by_uncorrected_adam`.

    Example:
        Its numbers can be injected like those of :func:`loro_jax.loro`:

        >>> import jax.numpy as jnp, optax
        >>> from loro_jax import LowRank, loro
        >>> def factory(learning_rate, b1):
        ...     return loro(learning_rate, direction=adam(b1=b1))
        >>> tx = optax.inject_hyperparams(factory)(0.01, b1=optax.linear_schedule(0.8, 0.9, 100))
        >>> state = tx.init({"w": LowRank(jnp.ones((6, 2)), jnp.eye(2, 4))})
        >>> round(float(state.hyperparams["b1"]), 3)
        0.8
    """
    b1, b2, eps = checked_numbers("adam", b1=b1, b2=b2, eps=eps)
    tx = scale_by_uncorrected_adam(b1, b2, eps, mu_dtype)

    def update(
        grads: Any, state: AdamState, params: Any, pairs: Pairs, **extra_args: Any
    ) -> tuple[Any, Any]:
        del pairs, extra_args
        return tx.update(grads, state, params)

    # With its constants, by which an exact step's branch computes directions from the moments.
    return Adam(tx.init, update, b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype)


def scale_by_uncorrected_adam(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    mu_dtype: Any | None = None,
) -> optax.GradientTransformation:
    """Rescales gradients by Adam with epsilon outside the bias correction.

    With ``m = b1 m + (1 - b1) g`` and ``v = b2 v + (1 - b2) g^2`` after c steps, the direction is
    ``m / (sqrt(v) + eps) * sqrt(1 - b2^c) / (1 - b1^c)``: the first version of the Adam paper, and
    the AdamW of older transformers releases that the authors' optimizer descends from.
    ``optax.scale_by_adam`` adds epsilon to the corrected root instead; the two agree as eps
    goes to 0, and differ in the first steps after a refresh, when ``sqrt(1 - b2^c)`` is small.
    Of complex gradients ``g^2`` is ``|g|^2``.

    Args:
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the uncorrected second moment.
        mu_dtype: dtype of the first moment; None: that of the parameters, or float32 if the decay
            by b1 would be lost in it, as 0.999 is in bfloat16. Complex parameters use its complex
            counterpart.

    Returns:
        A transformation that turns gradients into directions (to be scaled by minus the learning
        rate), in the gradients' dtypes.

    Raises:
        ValueError: for an array b1, b2 or eps whose dtype is too narrow for it, or a ``mu_dtype``
            in which the decay by b1 is lost.

    Example:
        >>> import jax.numpy as jnp
        >>> adam = scale_by_uncorrected_adam()
        >>> params = {"w": jnp.zeros(2)}
        >>> direction, _ = adam.update({"w": jnp.array([3.0, -0.5])}, adam.init(params))
        >>> [round(float(x), 3) for x in direction["w"]]
        [1.0, -1.0]
    """
    b1, b2, eps = checked_numbers("scale_by_uncorrected_adam", b1=b1, b2=b2, eps=eps)
    if mu_dtype is not None and decay_is_lost(b1, mu_dtype):
        raise ValueError(
            f"scale_by_uncorrected_adam: in mu_dtype={jnp.dtype(mu_dtype)} a moment that decays by "
            f"b1={b1} never changes; use float32."
        )

    def first(p: Any) -> jax.Array:
        dtype = inexact(jnp.result_type(p))
        if mu_dtype is not None:
            is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
            dtype = jnp.promote_types(mu_dtype, jnp.complex64) if is_complex else mu_dtype
        elif decay_is_lost(b1, dtype):
            dtype = at_least_float32(dtype)
        return jnp.zeros_like(p, dtype=dtype)

    def second(p: Any) -> jax.Array:
        # Real also for complex parameters, and never in bfloat16, in which 0.999 v rounds to v: a
        # second moment would never decrease.
        dtype = jnp.finfo(inexact(jnp.result_type(p))).dtype  # real
        return jnp.zeros_like(p, dtype=at_least_float32(dtype))

    def init(params: Any) -> AdamState:
        return AdamState(
            count=jnp.zeros([], jnp.int32),
            mu=jax.tree.map(first, params),
            nu=jax.tree.map(second, params),
        )

    def update(grads: Any, state: AdamState, params: Any = None) -> tuple[Any, AdamState]:
        del params
        # The direction comes from the moments before they are rounded to their stored dtypes.
        moments = adam_moments(grads, state, b1, b2)
        directions = adam_direction(moments, b1, b2, eps)
        directions = jax.tree.map(lambda d, g: d.astype(g.dtype), directions, grads)
        return directions, jax.tree.map(lambda new, old: new.astype(old.dtype), moments, state)

    return optax.GradientTransformation(init, update)


def decay_is_lost(decay: jax.typing.ArrayLike, dtype: Any) -> bool:
    """Returns whether ``decay x`` rounds to x in a dtype, so that an average never decreases.

    False for a traced decay, whose value is not known yet.
    """
    if not isinstance(decay, float | int) or not jnp.issubdtype(dtype, jnp.inexact):
        return False
    return 0 < 1 - decay < float(jnp.finfo(dtype).eps)


def adam_moments(
    grads: Any, state: AdamState, b1: jax.typing.ArrayLike, b2: jax.typing.ArrayLike
) -> AdamState:
    """Updates Adam's moments by one gradient, without rounding them to the state's dtypes."""
    return AdamState(
        optax.safe_increment(state.count),
        jax.tree.map(lambda g, m: b1 * m + (1 - b1) * g, grads, state.mu),
        jax.tree.map(lambda g, v: b2 * v + (1 - b2) * _squared(g, v.dtype), grads, state.nu),
    )


def _squared(g: jax.Array, dtype: Any) -> jax.Array:
    """Returns ``|g|^2``, squared in that dtype: float16 has nothing below 6e-8 or above 65504."""
    if jnp.iscomplexobj(g):
        return jnp.square(jnp.real(g)).astype(dtype) + jnp.square(jnp.imag(g)).astype(dtype)
    return jnp.square(g.astype(dtype))


def adam_direction(
    state: AdamState,
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
) -> Any:
    """Returns the direction ``m / (sqrt(v) + eps)`` times the bias correction."""
    # The correction is outside of the sum: epsilon is compared with the uncorrected root, as in the
    # authors' code.
    correction = jnp.sqrt(_one_minus_power(b2, state.count)) / _one_minus_power(b1, state.count)
    return jax.tree.map(lambda m, v: correction * m / (jnp.sqrt(v) + eps), state.mu, state.nu)


def _one_minus_power(decay: jax.typing.ArrayLike, count: jax.Array) -> jax.Array:
    """Returns ``1 - decay^count`` without cancellation: 1 - 0.999 has four digits in float32."""
    steps = count.astype(jnp.result_type(float))
    if isinstance(decay, float | int):
        # A decay of 0 leaves nothing after one step: exp(-inf) is 0.
        return -jnp.expm1(steps * (math.log(decay) if decay > 0 else -math.inf))
    return -jnp.expm1(steps * jnp.log(decay))
