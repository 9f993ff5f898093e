"""Muon: orthogonalised momentum on dense projections, Adam on everything else.

The dense baseline for low-rank training at equal tokens. For a projection W (m x n) with averaged
gradient M, ``W -= eta sqrt(m / n) NS(beta M + (1 - beta) G)``, where NS moves all singular values
towards one (:func:`loro_jax.linalg.newton_schulz.orthogonalise`). :func:`loro_jax.orthogonal` has
the same shape factor for products ``B A``, so learning rates of both are comparable.

``optax.contrib.muon`` is not wrapped here, because two things cannot be configured:

* its shape factor is ``sqrt(max(1, m / n))`` or a constant RMS, so wide matrices (m < n) take
  larger steps than here; tall and square ones agree, up to the next point;
* its Nesterov momentum is bias-corrected, ours is not (as in Jordan et al.): the first directions
  weight the newest gradient slightly more here. Without Nesterov they are equal.
  (``tests/peers/test_muon.py``)

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; the shape
factor is that of Yang, Simon and Bernstein, arXiv 2310.17813, 2023.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loro_jax.checks import check_orthogonalised_momentum
from loro_jax.directions.orthogonalisation import Orthogonalisation, check_orthogonalisation
from loro_jax.linalg.precision import at_least_float32
from loro_jax.peers.projected import Projected
from loro_jax.peers.wide import in_float32
from loro_jax.schedules import value_at

Array = jax.Array


class MuonState(NamedTuple):
    """State of :func:`scale_by_muon`.

    Attributes:
        mu: averaged gradients, a tree like the parameters, float32 or wider.
    """

    mu: Any


class RowMomentState(NamedTuple):
    """State of :func:`scale_by_muon` with a ``row_moment``.

    Attributes:
        mu: averaged gradients, a tree like the parameters, float32 or wider.
        rows: running mean squares of the rows (columns) of each matrix's long side.
    """

    mu: Any
    rows: Any


def scale_by_muon(
    momentum: float | Array = 0.95,
    *,
    nesterov: bool = True,
    newton_schulz_steps: int = 5,
    equilibrate: bool = False,
    row_moment: float = 0.0,
) -> optax.GradientTransformation:
    """Orthogonalises averaged gradients of matrices, and scales them by ``sqrt(m / n)``.

    Args:
        momentum: beta, decay of the averaged gradients.
        nesterov: whether to use Nesterov momentum.
        newton_schulz_steps: number of Newton-Schulz iterations.
        equilibrate: see :class:`loro_jax.directions.orthogonalisation.Orthogonalisation`.
        row_moment: see there.

    Returns:
        An ``optax.GradientTransformation`` for leaves of shape (..., m, n), m outputs by n inputs;
        leading axes are layers, each orthogonalised separately.

    Raises:
        ValueError: for a ``momentum`` outside [0, 1) or less than one iteration; from ``init``, for
            a leaf that is not a matrix.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = scale_by_muon()
        >>> state = tx.init(jnp.zeros((4, 4)))
        >>> moves, state = tx.update(jnp.diag(jnp.array([8.0, 4.0, 2.0, 1.0])), state)
        >>> bool(jnp.all((0.6 < jnp.diag(moves)) & (jnp.diag(moves) < 1.203)))
        True

    Source: Jordan et al., "Muon", 2024.
    """
    check_orthogonalised_momentum("muon", momentum, newton_schulz_steps)
    settings = Orthogonalisation(newton_schulz_steps, equilibrate, row_moment)
    check_orthogonalisation("muon", settings)

    def init(params: Any) -> Any:
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            if jnp.ndim(leaf) < 2:
                raise ValueError(
                    f"muon: the leaf {jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}; "
                    "expected (..., m, n)."
                )
        mu = jax.tree.map(lambda W: jnp.zeros_like(W, dtype=at_least_float32(W.dtype)), params)
        if settings.has_moment:
            return RowMomentState(mu, jax.tree.map(settings.first_moment_of_rows, params))
        return MuonState(mu)

    def average(old: Array, grad: Array) -> Array:
        return momentum * old + (1 - momentum) * grad.astype(old.dtype)

    def scaled(orthogonalised: Array, grad: Array) -> Array:
        m, n = grad.shape[-2:]
        # The shape factor lets learning rates of matrices of different shapes be compared.
        return (orthogonalised * (m / n) ** 0.5).astype(grad.dtype)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        # M <- beta M + (1 - beta) G.
        mu = jax.tree.map(average, state.mu, grads)
        # Nesterov: beta M + (1 - beta) G with the new M, without bias correction.
        ahead = jax.tree.map(average, mu, grads) if nesterov else mu
        # W <- W - eta sqrt(m / n) NS(M), without the eta.
        moves = jax.tree.map(settings.apply, ahead)
        kept = state._replace(mu=jax.tree.map(lambda new, old: new.astype(old.dtype), mu, state.mu))
        if settings.has_moment:
            both = jax.tree.map(settings.evened, moves, state.rows)
            # A tree of pairs (move, mean squares) becomes two trees.
            moves, rows = (jax.tree.map(lambda _, x, i=i: x[i], grads, both) for i in (0, 1))
            kept = kept._replace(rows=rows)
        return jax.tree.map(scaled, moves, grads), kept

    return optax.GradientTransformation(init, update)


def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    projected: Projected,
    lr_scale: float = 1.0,
    momentum: float | Array = 0.95,
    nesterov: bool = True,
    newton_schulz_steps: int = 5,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    direction: optax.GradientTransformation | None = None,
    regular: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Creates Muon for the projected leaves, with AdamW for the others.

    State is float32 or wider, whatever the parameters' dtype.

    Args:
        learning_rate: number or schedule, for the other leaves.
        projected: which leaves are projections: a tree of bools with the parameters' structure, or
            a callable that returns it for the parameters.
        lr_scale: factor on the learning rate of the projections. Their eta, ``learning_rate *
            lr_scale``, is approximately the spectral norm of a square matrix's step.
        momentum: see :func:`scale_by_muon`.
        nesterov: see :func:`scale_by_muon`.
        newton_schulz_steps: see :func:`scale_by_muon`.
        weight_decay: decoupled decay, ``learning rate * weight_decay`` per step.
        b1: decay of Adam's first moment.
        b2: decay of Adam's second moment.
        eps: added to the square root of Adam's corrected second moment.
        direction: what orthogonalises the projections' gradients; None: :func:`scale_by_muon` with
            the three arguments above. Its variants are passed here.
        regular: direction of the other leaves, before weight decay and learning rate; None: Adam.

    Returns:
        An ``optax.GradientTransformationExtraArgs``, learning rate included.

    Raises:
        ValueError: as :func:`scale_by_muon`, and for an ``lr_scale`` of 0 or less.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> params = {"w": jnp.eye(4), "b": jnp.zeros(4)}
        >>> tx = muon(0.01, projected={"w": True, "b": False}, lr_scale=2.0)
        >>> grads = jax.tree.map(jnp.ones_like, params)
        >>> updates, _ = tx.update(grads, tx.init(params), params)
        >>> bool(0.6 * 0.02 < jnp.linalg.norm(updates["w"], 2) < 1.203 * 0.02)
        True
        >>> round(float(updates["b"][0]), 4)
        -0.01

    Source: Jordan et al., "Muon", 2024.
    """
    if isinstance(lr_scale, float | int) and lr_scale <= 0:
        raise ValueError(f"muon: lr_scale must be above 0, but is {lr_scale}.")

    def scaled(step: Array) -> Any:
        return lr_scale * value_at(learning_rate, step)

    def labels(params: Any) -> Any:
        flags = projected(params) if callable(projected) else projected
        return jax.tree.map(lambda flag: "projections" if flag else "others", flags)

    if direction is None:
        direction = scale_by_muon(
            momentum, nesterov=nesterov, newton_schulz_steps=newton_schulz_steps
        )
    # Decay after the orthogonalisation and before the learning rate, as in AdamW.
    decay = optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity()
    projections = optax.chain(direction, decay, optax.scale_by_learning_rate(scaled))
    # At the plain learning rate: `lr_scale` is for projections alone.
    if regular is None:
        others = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay)
    else:
        others = optax.chain(regular, decay, optax.scale_by_learning_rate(learning_rate))
    return in_float32(optax.partition({"projections": projections, "others": others}, labels))
