"""LORO as an Optax transformation: Adam's direction and the exact step of Proposition 4.

Source: Mo, Huang and Pan, ICLR 2025, Algorithm 1; details that the paper leaves out follow the
authors' code (bias correction and epsilon as in :mod:`loro_jax.directions.adam`, the exact step
applied to Adam's directions instead of gradients, computed in float32).
"""

from __future__ import annotations

from typing import Any

import jax
import optax

from loro_jax.checks import checked_numbers
from loro_jax.descent import riemannian_descent
from loro_jax.directions.adam import adam
from loro_jax.directions.protocol import Direction, as_direction
from loro_jax.exact.update import exact_step, of_moves
from loro_jax.leaves import WeightDecay, split_weight_decay
from loro_jax.pairs import PairsSpec

# Default of the argument `moments`, by basis.
MOMENTS_OF_BASIS = {"singular": "reset", "nearest": "keep"}


def loro(
    learning_rate: optax.ScalarOrSchedule,
    exact_every: int | optax.Schedule | None = 500,
    *,
    direction: optax.GradientTransformation | Direction | None = None,
    lr_scale: jax.typing.ArrayLike | None = None,
    basis: str = "singular",
    moments: str | None = None,
    damping: jax.typing.ArrayLike | optax.Schedule | None = None,
    max_move: jax.typing.ArrayLike | optax.Schedule | None = None,
    weight_decay: WeightDecay = 0.0,
    regular: optax.GradientTransformation | Direction | None = None,
    pairs: PairsSpec | None = None,
    mesh: Any | None = None,
    exact_method: str = "auto",
) -> optax.GradientTransformationExtraArgs:
    """Optimizes trees of low-rank pairs (B, A) and other parameters by Riemannian steps.

    The learning rate is part of this transformation, because the exact step is not linear in it.
    It must therefore be the last in a chain; ``init`` warns if it is not. ``update`` needs
    ``params`` and returns ``W_new - W_old`` for every leaf.

    Frozen factors: a factor without a gradient (zero, as after ``jax.lax.stop_gradient``, or None)
    does not change, on exact steps either. Its partner then takes only approximate steps, because
    an exact step gives both factors a new basis. A factor without a partner (the tree has None
    there, or ``optax.masked`` hides it) is treated as a regular parameter.

    An exact step has no derivative: differentiating through steps raises an error unless
    ``exact_every`` is None. Call ``jax.export`` for several platforms at once inside
    ``jax.enable_x64(True)``, because the last fallback of an exact step uses float64 on some of
    them; the dtypes of parameters and state do not change.

    Args:
        learning_rate: a number or a schedule; see :func:`loro_jax.with_restarts` for the paper's
            re-warm-up after exact steps.
        exact_every: K. Step t, counted from 0, is exact when ``(t + 1) % K == 0``. None, or a
            number beyond int32: never. Or a function of t that returns K, or 0 for never.
        direction: turns gradients into directions: :func:`loro_jax.adam` (None is ``adam()``),
            :func:`loro_jax.orthogonal`, your own
            :class:`loro_jax.directions.protocol.Direction`, or an Optax transformation that
            doesn't scale by a learning rate, such as ``optax.scale_by_adam()`` or
            ``optax.trace(0.9)``.
        lr_scale: factor on the learning rate of the factors' approximate steps; None: the
            direction's default, ``r / min(m, n)`` of each pair for Adam and any Optax
            transformation. (The authors' code uses ``r / hidden_size``, the same in a LLaMA.)
            Directions that are moves, like those of ``orthogonal``, use it on exact steps too.
        basis: basis of the new factors after an exact step: "singular", the paper's, or "nearest",
            the balanced factors closest to the old ones. Averages of parameters (EMA, lookahead,
            schedule-free) approximate averages of products only while the factors change little:
            signs and order of singular factors are kept close to the old ones for this reason, and
            "nearest" does better if singular values are close to each other.
        moments: treatment of the direction's moments after an exact step. They were averaged in
            the basis of the old factors, so None follows the basis: "reset" with "singular", "keep"
            with "nearest". Every choice is valid with either basis: "reset" zeroes the moments of
            all leaves at the start of the next step, "reset_factors" only the factors',
            "transport" carries the factors' into the new basis (:mod:`loro_jax.exact.transport`;
            the direction's state needs a ``mu``), and "keep" leaves them unchanged. Only moments
            and their counts are reset: hyperparameters, schedules and noise inside a ``direction``
            stay, and so does all state of an Optax transformation passed as ``regular``.
        damping: damping of the inverses in the exact step, see :func:`loro_jax.exact_update`. A
            number or a schedule; None: none, as in the paper.
        max_move: trust region of the exact step: its size is cut so that the tangent step is at
            most ``max_move |W|`` (Frobenius). The undamped step of ill-conditioned factors can move
            a product by several times its norm. A number or a schedule; None: no bound, as in the
            paper.
        weight_decay: decoupled decay; each step shrinks a leaf by ``lr * weight_decay`` (factors:
            ``lr * lr_scale * weight_decay``, on exact steps too). A number for all leaves, or a
            pair ``(number, mask)`` with a mask as in ``optax.adamw``: a tree of booleans like the
            parameters, a prefix of it, or a function of the parameters that returns one.
        regular: optimizer of all leaves that are not factors. A direction, such as
            ``adam(b1=0.8)``, uses this learning rate and weight decay; an Optax transformation is
            used unchanged, including its learning rate. None: the direction of the factors, or
            ``adam()`` if that direction returns moves of factors.
        pairs: None: detect the pairs automatically, ValueError if there is none; "optional": the
            same, but a tree without pairs takes plain steps of the direction; "all": pairs of
            square factors, too, possibly none; or a spec, see :func:`loro_jax.find_pairs`.
        mesh: devices that share the exact steps, each taking some pairs whole
            (:mod:`loro_jax.pair_parallel`). None: the mesh in the parameters' types (explicit
            axes), or that of ``jax.set_mesh``; without either, XLA decides. With automatic axes,
            prefer a tree of the parameters' shardings (or a prefix of it, or PartitionSpecs of the
            mesh of ``jax.set_mesh``): otherwise XLA may shard the whole step to suit its exact
            branch. Pairs on one device are not divided.
        exact_method: how the exact step is computed: "auto" (the fastest, "graph"), "graph",
            "gram", or "svd", the reference. The fast methods fall back to the next one if their
            result can't be trusted. See :mod:`loro_jax.exact`.

    Returns:
        An ``optax.GradientTransformationExtraArgs``.

    Raises:
        ValueError: for an ``exact_every`` below 1, an unknown ``moments``, ``exact_method`` or
            ``basis``, a negative ``damping`` or ``max_move``, an array too narrow for its number;
            from ``init``, if no pair is found, a pair's shapes or dtypes do not fit, or
            ``moments="transport"`` and the direction has no moments; from ``update``, without
            ``params``, or if the mask of ``weight_decay`` does not fit.

    Example:
        In a chain, on a dict of one pair and a regular leaf:

        >>> import jax, jax.numpy as jnp, optax
        >>> from loro_jax import LowRank, loro, with_restarts
        >>> params = {"w": LowRank(jnp.ones((6, 2)), jnp.eye(2, 4)), "b": jnp.zeros(6)}
        >>> def loss(params):
        ...     return jnp.sum((params["w"].product() + params["b"][:, None] - 3.0) ** 2)
        >>> tx = optax.chain(optax.clip_by_global_norm(1.0), loro(0.01, exact_every=10))
        >>> state = tx.init(params)
        >>> updates, state = tx.update(jax.grad(loss)(params), state, params)
        >>> bool(loss(optax.apply_updates(params, updates)) < loss(params))
        True

        Many steps in one compiled loop, re-warmed after each exact step. The best W has rank one
        instead of two here: without damping, steps along the vanishing singular value explode.

        >>> tx = loro(with_restarts(lambda step: 0.05, every=10), exact_every=10, damping=0.1)
        >>> def step(carry, _):
        ...     params, state = carry
        ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
        ...     return (optax.apply_updates(params, updates), state), loss(params)
        >>> _, losses = jax.lax.scan(step, (params, tx.init(params)), length=100)
        >>> bool(losses[-1] < 0.01 * losses[0])
        True

        Weight decay of matrices only:

        >>> matrices = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
        >>> tx = loro(0.01, weight_decay=(0.1, matrices))
        >>> zeros = jax.tree.map(jnp.zeros_like, params)
        >>> updates, _ = tx.update(zeros, tx.init(params), {**params, "b": jnp.ones(6)})
        >>> bool(jnp.any(updates["w"].B)), bool(jnp.any(updates["b"]))
        (True, False)

        Another optimizer for some leaves:

        >>> label = lambda params: {"w": "pairs", "b": "others"}
        >>> tx = optax.partition({"pairs": loro(0.01), "others": optax.sgd(0.1)}, label)
        >>> updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params)
        >>> updates["b"].shape
        (6,)

        With Flax NNX, where attributes ``B`` and ``A`` of one module form a pair:

        >>> from flax import nnx
        >>> class Projection(nnx.Module):
        ...     def __init__(self):
        ...         self.B = nnx.Param(jnp.ones((6, 2)))
        ...         self.A = nnx.Param(jnp.eye(2, 4))
        ...     def __call__(self, x):
        ...         return (x @ self.A.T) @ self.B.T
        >>> model = Projection()
        >>> optimizer = nnx.Optimizer(model, loro(0.01), wrt=nnx.Param)
        >>> grads = nnx.grad(lambda model: jnp.sum(model(jnp.ones(4)) ** 2))(model)
        >>> updates = optimizer.update(model, grads)
        >>> bool(model.B[0, 0] < 1)
        True

        With Flax Linen's ``TrainState``:

        >>> from flax.training.train_state import TrainState
        >>> train = TrainState.create(apply_fn=None, params=params, tx=loro(0.01))
        >>> train = train.apply_gradients(grads=jax.grad(loss)(params))
        >>> int(train.step)
        1

    References:
        Mo, Huang and Pan, `LORO: Parameter and Memory Efficient Pretraining via Low-rank
        Riemannian Optimization <https://openreview.net/forum?id=i0zzO7Hslk>`_, ICLR 2025.
    """
    learning_rate, lr_scale = checked_numbers(
        "loro", learning_rate=learning_rate, lr_scale=lr_scale
    )
    number, mask = split_weight_decay(weight_decay)
    (number,) = checked_numbers("loro", weight_decay=number)
    directed = adam() if direction is None else as_direction(direction)
    lr_scale = directed.lr_scale if lr_scale is None else lr_scale
    step = exact_step(
        method=exact_method, basis=basis, max_move=max_move, damping=damping, where="loro"
    )
    return riemannian_descent(
        learning_rate,
        directed,
        # The exact step takes gradients: moves are converted, and scaled as on all other steps.
        of_moves(step, lr_scale) if directed.kind == "moves" else step,
        exact_every,
        lr_scale=lr_scale,
        # exact_step has checked the basis.
        moments=MOMENTS_OF_BASIS[basis] if moments is None else moments,
        weight_decay=(number, mask),
        regular=regular,
        pairs=pairs,
        mesh=mesh,
    )
