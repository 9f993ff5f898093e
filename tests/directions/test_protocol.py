"""Custom directions: the protocol, the arguments that they receive, and the defaults."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loro_jax import LowRank, adam, initialise, loro, orthogonal, riemannian_descent
from loro_jax.branch_operand import branch_operand
from loro_jax.directions.adam import adam_direction
from loro_jax.directions.protocol import Direction, as_direction

M, N, R = 6, 5, 2
PAIR = LowRank(*initialise(jax.random.key(0), M, N, R))
OTHER = LowRank(*initialise(jax.random.key(1), 4, 7, 3))
# The factors' order among the leaves is not that of the pairs.
PARAMS = {"a": PAIR.A, "b": jnp.ones(4), "w": OTHER, "z": PAIR.B}
SPEC = {
    "a": "first.A",
    "b": None,
    "w": LowRank.tree_unflatten(None, ("w.B", "w.A")),
    "z": "first.B",
}


def swapped_sizes(kind="gradients", lr_scale=None):
    """A direction that needs pairs: each gradient times the norm of the other factor."""

    def scaled(factors, gradients):
        (B, A), (g_B, g_A) = factors, gradients
        return g_B * jnp.linalg.norm(A), g_A * jnp.linalg.norm(B)

    def update(grads, state, params, pairs, **extra_args):
        assert set(extra_args) <= {"value"}
        return pairs.map(scaled, params, grads), state + 1

    return Direction(lambda params: jnp.int32(0), update, kind=kind, lr_scale=lr_scale)


def step(tx, params=PARAMS, count=1):
    state, grads = tx.init(params), jax.tree.map(lambda x: 2 * x, params)
    for _ in range(count):
        updates, state = tx.update(grads, state, params, value=1.0)
    return updates, state


def test_a_direction_is_given_pairs():
    tx = loro(0.1, None, direction=swapped_sizes(), pairs=SPEC, weight_decay=0.5)
    updates, state = step(tx)
    for (B, A), (d_B, d_A) in (
        ((PARAMS["z"], PARAMS["a"]), (updates["z"], updates["a"])),
        (jax.tree.leaves(OTHER), jax.tree.leaves(updates["w"])),
    ):
        size = -0.1 * A.shape[0] / min(B.shape[0], A.shape[1])
        np.testing.assert_allclose(d_B, size * B * (2 * jnp.linalg.norm(A) + 0.5), rtol=1e-5)
        np.testing.assert_allclose(d_A, size * A * (2 * jnp.linalg.norm(B) + 0.5), rtol=1e-5)
    # Other leaves are no pairs, and take the direction as it is.
    np.testing.assert_allclose(updates["b"], -0.1 * 2.5 * PARAMS["b"], rtol=1e-6)
    assert int(state.factors) == int(state.regular) == 1


@pytest.mark.parametrize("given", [None, 3.0])
def test_moves_are_made_as_they_are_and_retracted(given):
    direction = swapped_sizes("moves", lr_scale=0.5)
    scale = 0.5 if given is None else given
    u_B, u_A = 2 * PAIR.B * jnp.linalg.norm(PAIR.A), 2 * PAIR.A * jnp.linalg.norm(PAIR.B)
    params = {"w": PAIR, "b": jnp.ones(4)}
    updates, _ = step(loro(0.1, None, direction=direction, lr_scale=given), params)
    np.testing.assert_allclose(updates["w"].B, -0.1 * scale * u_B, rtol=1e-5)
    # Adam steps the rest.
    np.testing.assert_allclose(updates["b"], -0.1, rtol=1e-3)
    tx = loro(0.1, 1, direction=direction, lr_scale=given, exact_method="svd")
    updates, _ = step(tx, params)
    found = optax.apply_updates(params, updates)["w"].product()
    W = PAIR.product() - 0.1 * scale * (u_B @ PAIR.A + PAIR.B @ u_A)
    U, s, Vt = np.linalg.svd(W)
    np.testing.assert_allclose(found, (U[:, :R] * s[:R]) @ Vt[:R], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "reset"),
    [
        ({}, True),
        ({"basis": "nearest"}, False),
        ({"basis": "nearest", "moments": "reset"}, True),
        ({"moments": "keep"}, False),
    ],
    ids=str,
)
def test_moments_follow_the_basis_unless_they_are_chosen(options, reset):
    _, state = step(loro(0.01, 2, exact_method="svd", **options), {"w": PAIR}, count=3)
    assert int(state.factors.count) == (1 if reset else 3)


@pytest.mark.parametrize("direction", [adam(), orthogonal()], ids=["adam", "orthogonal"])
def test_a_direction_for_the_rest_takes_the_learning_rate_and_the_decay(direction):
    tx = loro(0.1, None, direction=direction, regular=adam(b1=0.5), weight_decay=0.2)
    updates, _ = step(tx, {"w": PAIR, "b": jnp.arange(1.0, 5.0)}, count=2)
    alone = loro(0.1, None, direction=adam(b1=0.5), weight_decay=0.2, pairs="optional")
    expected, _ = step(alone, {"b": jnp.arange(1.0, 5.0)}, count=2)
    np.testing.assert_allclose(updates["b"], expected["b"], rtol=1e-6)


def test_the_operand_of_the_branch():
    """First moments of Adam, if moves may overwrite them and they have the factors' dtype."""
    params = {"w": PAIR}
    overwritable = branch_operand(adam(), may_overwrite=True)
    mu, state = overwritable.advance(params, adam().init(params), params, None)
    chex.assert_trees_all_equal(mu, state.mu)
    chex.assert_trees_all_equal(
        overwritable.finish(mu, state), adam_direction(state, 0.9, 0.999, 1e-6)
    )
    for direction, may_overwrite in (
        (adam(), False),
        (adam(mu_dtype=jnp.float32), True),
        (adam(b1=0.9995), True),
        (as_direction(optax.scale_by_adam()), True),
    ):
        branch = branch_operand(direction, may_overwrite)
        operand, state = branch.advance(params, direction.init(params), params, None)
        expected, _ = direction.update(params, direction.init(params), params, None)
        chex.assert_trees_all_close(operand, expected, rtol=1e-6)
        assert branch.keep(state, operand) is state


def test_exact_steps_need_one():
    with pytest.raises(ValueError, match="exact_every is 500, but exact_step is None"):
        riemannian_descent(0.1, adam(), None)
    updates, _ = step(riemannian_descent(0.1, optax.identity(), None, None), {"w": PAIR})
    np.testing.assert_allclose(updates["w"].B, -0.2 * R / N * PAIR.B, rtol=1e-6)
