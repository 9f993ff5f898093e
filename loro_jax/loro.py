"""LORO as an Optax transformation: Adam's direction and Proposition 4's exact step.

Source: Mo, Huang and Pan, ICLR 2025, Algorithm 1; details that the paper leaves out follow the
authors' code (bias correction and epsilon as in :mod:`loro_jax.directions.adam`, the exact step
fed with Adam's directions in place of gradients, computed in float32).
"""

from __future__ import annotations

from typing import Any

import jax
import optax

from loro_jax.checks import checked_numbers
from loro_jax.descent import riemannian_descent
from loro_jax.directions.orthogonal import as_gradients
from loro_jax.directions.protocol import Direction, adam, as_direction
from loro_jax.exact import StepSize, check_basis, check_method
from loro_jax.exact.tangent import counted_exact_update
from loro_jax.leaves import Mask
from loro_jax.pairs import PairsSpec


def loro(
    learning_rate: optax.ScalarOrSchedule,
    *,
    exact_every: int | optax.Schedule | None = 500,
    refresh: str | None = "all",
    lr_scale: float | None = None,
    b1: jax.typing.ArrayLike | None = None,
    b2: jax.typing.ArrayLike | None = None,
    eps: jax.typing.ArrayLike | None = None,
    weight_decay: float = 0.0,
    mask: Mask = None,
    mu_dtype: Any | None = None,
    pairs: PairsSpec | None = None,
    require_pairs: bool = True,
    regular: optax.GradientTransformation | None = None,
    direction: optax.GradientTransformation | Direction | None = None,
    exact_method: str = "graph",
    basis: str = "singular",
    max_move: jax.typing.ArrayLike | optax.Schedule | None = None,
    damping: jax.typing.ArrayLike | optax.Schedule | None = None,
    mesh: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Low-rank Riemannian optimizer for trees of (B, A) pairs and other parameters.

    It owns the learning rate, because the exact step is not linear in it; so it must be the last
    of a chain; ``init`` warns if it is not. It needs ``params`` and emits ``W_new - W_old`` for
    every leaf.

    Frozen factors: a factor without a gradient (zero, as behind ``jax.lax.stop_gradient``, or None)
    stays where it is, on exact steps too. Its partner then takes approximate steps alone, because
    an exact one gives both factors a new basis. A factor without a partner, where the tree has None
    or ``optax.masked`` hides the other, is a parameter like all others.

    An exact step has no derivative: a program that is differentiated through steps is refused
    unless ``exact_every`` is None. ``jax.export`` for several platforms at once has to be called
    inside ``jax.enable_x64(True)``, because the last resort of an exact step is in float64 on some
    of them; the dtypes of parameters and state stay.

    Args:
        learning_rate: a number or a schedule; see :func:`loro_jax.with_restarts` for the paper's
            re-warm-up after exact steps.
        exact_every: K. Step t, counted from 0, is exact when ``(t + 1) % K == 0``. None, or a
            number beyond int32: never. Or a function of t that returns K, or 0 for never.
        refresh: whose moments to zero after an exact step, when the next step begins: "all"
            leaves', the "factors"', or None. Nothing but moments and their counts is zeroed:
            hyperparameters, schedules and noise inside of a ``direction`` stay. A ``regular``
            transformation of your own keeps its state in any case. "transport" keeps all state, and
            carries the factors' moments into their new basis (:mod:`loro_jax.exact.transport`); it
            needs a direction of this library.
        lr_scale: factor on the learning rate of approximate steps; None: ``r / min(m, n)`` of each
            pair. The authors' code uses ``r / hidden_size``, the same thing in a LLaMA. With
            :func:`loro_jax.orthogonal` it is on all steps of the factors, and None is 1.
        b1: decay of Adam's first moment; None: 0.9. Under ``optax.inject_hyperparams`` b1, b2, eps
            and damping need ``hyperparam_dtype=jnp.float32`` if the parameters are narrower: 0.999
            is 1 in bfloat16. (What is None is not injected.)
        b2: decay of Adam's second moment; None: 0.999.
        eps: added to the root of Adam's uncorrected second moment; None: 1e-6.
        weight_decay: decoupled decay; each step shrinks a leaf by ``lr * weight_decay`` (factors:
            ``lr * lr_scale * weight_decay``, on exact steps too).
        mask: which leaves ``weight_decay`` is for, as in ``optax.adamw``: a tree of booleans like
            the parameters (or a prefix of it), or a function that makes one of them; such as
            ``lambda params: jax.tree.map(lambda x: x.ndim > 1, params)``, which leaves out norms
            and biases. None: all.
        mu_dtype: dtype of Adam's first moment; None: the parameters'.
        pairs: None to find the pairs by themselves, or a spec: see :func:`loro_jax.find_pairs`.
        require_pairs: raise when the tree holds no pair. False: such a tree gets plain Adam.
        regular: transformation for all leaves that are not factors, learning rate included; None:
            the same direction as for the factors.
        direction: what turns gradients into directions, such as ``optax.scale_by_adam()``,
            ``optax.trace(0.9)`` or ``optax.identity()``; it must not scale by a learning rate.
            None: :func:`loro_jax.scale_by_uncorrected_adam` with b1, b2, eps and mu_dtype. Or
            :func:`loro_jax.orthogonal`; all leaves but factors then have that Adam.
        exact_method: how the exact step is computed: "graph", "gram" or "svd", from fast to always
            right; see :mod:`loro_jax.exact`.
        basis: of the factors that an exact step gives: "singular", the paper's, where moments of
            the old ones mean nothing any more; or "nearest", as near to the old ones as balanced
            factors can be, where moments may stay (``refresh=None``, and no re-warm-up). Averages
            of parameters (EMA, lookahead, schedule-free) are averages of products only as far as
            the factors change little: signs and order of singular factors are kept near the old
            ones for their sake, and where singular values are close "nearest" does better.
        max_move: trust region of the exact step: its size is cut so that the tangent step is at
            most ``max_move |W|`` (Frobenius). The undamped step of ill-conditioned factors can move
            a product by several times its norm. A number or a schedule; None: no bound, as in the
            paper.
        damping: of the inverses in the exact step, see :func:`loro_jax.exact_update`. A number or a
            schedule; None: none, as in the paper.
        mesh: devices that share the exact steps, each taking some pairs whole
            (:mod:`loro_jax.pair_parallel`). None: those that the parameters' types name (explicit
            axes), or those of ``jax.set_mesh``; where there is neither, XLA decides. With automatic
            axes better a tree of the parameters' shardings (or a prefix of it, or PartitionSpecs of
            the mesh of ``jax.set_mesh``): else XLA may lay the whole step out as suits its exact
            branch. Pairs on one device are not divided.

    Returns:
        An ``optax.GradientTransformationExtraArgs``.

    Raises:
        ValueError: for an ``exact_every`` below 1, an unknown ``refresh``, ``exact_method`` or
            ``basis``, a negative ``damping`` or ``max_move``, an array too narrow for its number;
            from ``init``, when no pair is found or a pair's shapes or dtypes do not fit; from
            ``update``, without ``params``.

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
        here, of two: without damping, steps along the vanishing singular value explode.

        >>> tx = loro(with_restarts(lambda step: 0.05, every=10), exact_every=10, damping=0.1)
        >>> def step(carry, _):
        ...     params, state = carry
        ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
        ...     return (optax.apply_updates(params, updates), state), loss(params)
        >>> _, losses = jax.lax.scan(step, (params, tx.init(params)), length=100)
        >>> bool(losses[-1] < 0.01 * losses[0])
        True

        Another optimizer for some leaves:

        >>> label = lambda params: {"w": "pairs", "b": "others"}
        >>> tx = optax.partition({"pairs": loro(0.01), "others": optax.sgd(0.1)}, label)
        >>> updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params)
        >>> updates["b"].shape
        (6,)

        With Flax NNX, where attributes ``B`` and ``A`` of one module are a pair:

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
    check_method(exact_method, "loro")
    check_basis(basis, "loro")
    for name, value in (("max_move", max_move), ("damping", damping)):
        if isinstance(value, float | int) and value < 0:
            raise ValueError(f"loro: {name} must not be negative, but is {value}.")
    learning_rate, lr_scale, weight_decay = checked_numbers(
        "loro", learning_rate=learning_rate, lr_scale=lr_scale, weight_decay=weight_decay
    )
    max_move, damping = checked_numbers("loro", max_move=max_move, damping=damping)
    b1, b2, eps = checked_numbers(
        "loro",
        b1=0.9 if b1 is None else b1,
        b2=0.999 if b2 is None else b2,
        eps=1e-6 if eps is None else eps,
    )
    directed = adam(b1, b2, eps, mu_dtype) if direction is None else as_direction(direction)
    if directed.moves and lr_scale is None:
        lr_scale = 1.0

    def at(value: Any, step: jax.Array) -> Any:
        return value(step) if callable(value) else value

    def exact_step(
        B: jax.Array, A: jax.Array, dB: jax.Array, dA: jax.Array, rate: Any, step: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        if directed.moves:
            rate = rate * lr_scale
            dB, dA = as_gradients(B, A, dB, dA)
        size = StepSize(rate, at(max_move, step), at(damping, step))
        return counted_exact_update(
            B, A, dB, dA, size, method=exact_method, basis=basis, where="loro"
        )

    return riemannian_descent(
        learning_rate,
        directed,
        exact_step,
        exact_every=exact_every,
        refresh=refresh,
        lr_scale=lr_scale,
        weight_decay=weight_decay,
        mask=mask,
        pairs=pairs,
        require_pairs=require_pairs,
        regular=regular,
        regular_direction=adam(b1, b2, eps, mu_dtype) if directed.moves else None,
        mesh=mesh,
    )
