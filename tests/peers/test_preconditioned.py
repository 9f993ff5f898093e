"""Scaled gradient descent and scaled AdamW against their equations, alone and with exact steps."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loro_jax import LoroState, LowRank, adam, loro
from loro_jax.exact.tangent import multiply_by_grams
from loro_jax.peers.grams import divide_by_grams
from loro_jax.peers.preconditioned import preconditioned, scale_by_preconditioner
from tests.helpers import member, take_steps

M, R, N = 7, 3, 5


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def tree(seed=0, dtype=jnp.float32, batch=()):
    """A pair and a regular leaf."""
    B, A = normal(seed, *batch, M, R, dtype=dtype), normal(seed + 1, *batch, R, N, dtype=dtype)
    return {"w": LowRank(B, A), "bias": normal(seed + 2, *batch, M, dtype=dtype)}


def scaled(B, A, g_B, g_A, delta):
    """The papers' preconditioner by plain inverses, in numpy."""
    eye = np.eye(len(A))
    return g_B @ np.linalg.inv(A @ A.T + delta * eye), np.linalg.inv(B.T @ B + delta * eye) @ g_A


def arrays(params):
    return np.asarray(params["w"].B), np.asarray(params["w"].A)


def truncated(W):
    U, s, Vt = np.linalg.svd(W)
    return (U[:, :R] * s[:R]) @ Vt[:R]


def quadratic(target):
    return lambda p: 0.5 * jnp.sum((p["w"].product() - target) ** 2) + jnp.sum(p["bias"] ** 2)


@pytest.mark.parametrize("delta", [0.0, 1e-6, 0.5])
@pytest.mark.usefixtures("x64")
def test_scaled_gd_follows_its_equation(delta):
    params = tree(dtype=jnp.float64)
    grads = [tree(10 * (t + 1), jnp.float64) for t in range(4)]
    rate = lambda t: 0.1 / (1 + t)  # noqa: E731
    tx = preconditioned(rate, damping=delta, direction=optax.identity(), weight_decay=0.2)
    moved, _ = take_steps(tx, params, grads)
    B, A = arrays(params)
    for t, grad in enumerate(grads):
        d_B, d_A = scaled(B, A, *arrays(grad), delta)
        B, A = B - rate(t) * (d_B + 0.2 * B), A - rate(t) * (d_A + 0.2 * A)
    np.testing.assert_allclose(moved["w"].B, B, rtol=1e-10)
    np.testing.assert_allclose(moved["w"].A, A, rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_scaled_adamw_follows_its_equations():
    """The gradient is preconditioned first; both moments are of what comes out."""
    params = tree(dtype=jnp.float64)
    grads = [tree(10 * (t + 1), jnp.float64) for t in range(5)]
    tx = preconditioned(0.05, damping=0.3, direction=adam(0.8, 0.9, 1e-3), weight_decay=0.1)
    moved, state = take_steps(tx, params, grads)
    factors = [*arrays(params), np.asarray(params["bias"])]
    m, v = [0.0] * 3, [0.0] * 3
    for t, grad in enumerate(grads, start=1):
        directions = [*scaled(*factors[:2], *arrays(grad), 0.3), np.asarray(grad["bias"])]
        for i, d in enumerate(directions):
            m[i] = 0.8 * m[i] + 0.2 * d
            v[i] = 0.9 * v[i] + 0.1 * d**2
            step = np.sqrt(1 - 0.9**t) / (1 - 0.8**t) * m[i] / (np.sqrt(v[i]) + 1e-3)
            factors[i] = factors[i] - 0.05 * (step + 0.1 * factors[i])
    for found, expected in zip((*arrays(moved), moved["bias"]), factors, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert isinstance(state, LoroState)


@pytest.mark.parametrize("exact_every", [None, 1, 2])
@pytest.mark.usefixtures("x64")
def test_scaled_gd_does_not_depend_on_the_factors(exact_every):
    """(B S, S^-1 A) has the same product, and keeps it: also through exact steps."""
    params = tree(dtype=jnp.float64)
    S = np.diag([30.0, 1.0, 0.02]) + 0.5 * np.asarray(normal(9, R, R, dtype=jnp.float64))
    other = {**params, "w": LowRank(params["w"].B @ S, np.linalg.inv(S) @ params["w"].A)}
    tx = preconditioned(
        0.3, damping=0.0, direction=optax.identity(), exact_every=exact_every, exact_method="svd"
    )
    losses = [quadratic(normal(5, M, N, dtype=jnp.float64))] * 4
    one, _ = take_steps(tx, params, losses)
    two, _ = take_steps(tx, other, losses)
    np.testing.assert_allclose(one["w"].product(), two["w"].product(), rtol=1e-7, atol=1e-9)
    # Plain gradient descent does not.
    plain = loro(0.003, exact_every=None, direction=optax.identity())
    one, two = take_steps(plain, params, losses)[0], take_steps(plain, other, losses)[0]
    assert np.max(np.abs(one["w"].product() - two["w"].product())) > 0.1


@pytest.mark.usefixtures("x64")
def test_exact_step_of_scaled_gd_retracts_the_riemannian_gradient():
    params, G = tree(dtype=jnp.float64), np.asarray(normal(5, M, N, dtype=jnp.float64))
    B, A = arrays(params)
    tx = preconditioned(
        0.2, damping=0.0, direction=optax.identity(), exact_every=1, exact_method="svd"
    )
    moved, state = take_steps(tx, params, [lambda p: jnp.sum(G * p["w"].product())])
    P_U, P_V = B @ np.linalg.pinv(B), np.linalg.pinv(A) @ A
    tangent = P_U @ G + G @ P_V - P_U @ G @ P_V
    np.testing.assert_allclose(moved["w"].product(), truncated(B @ A - 0.2 * tangent), atol=1e-9)
    assert bool(state.stale)


@pytest.mark.usefixtures("x64")
def test_exact_step_of_scaled_adamw_retracts_the_directions_tangent():
    params, grads = tree(dtype=jnp.float64), tree(10, jnp.float64)
    B, A = arrays(params)
    moved, _ = take_steps(
        preconditioned(
            0.02, exact_every=1, damping=0.1, direction=adam(eps=1e-2), exact_method="svd"
        ),
        params,
        [grads],
    )
    # Adam's first direction, with its epsilon outside the bias correction.
    d_B, d_A = (d / (np.abs(d) + 1e-2 / np.sqrt(1e-3)) for d in scaled(B, A, *arrays(grads), 0.1))
    tangent = d_B @ A - B @ np.linalg.pinv(B) @ d_B @ A + B @ d_A
    np.testing.assert_allclose(moved["w"].product(), truncated(B @ A - 0.02 * tangent), atol=1e-9)


def test_exact_and_other_steps_are_of_one_size():
    """Small steps of both kinds move the product alike, where the gradient leaves its spaces."""
    params = tree()
    B, A = arrays(params)
    G = np.asarray(normal(5, M, N))
    G = G - B @ np.linalg.pinv(B) @ G @ np.linalg.pinv(A) @ A  # else counted by both factors
    loss = lambda p: jnp.sum(G * p["w"].product())  # noqa: E731
    changes = []
    for exact_every in (None, 1):
        tx = preconditioned(
            0.01, direction=optax.identity(), exact_every=exact_every, exact_method="svd"
        )
        changes.append(take_steps(tx, params, [loss])[0]["w"].product() - B @ A)
    np.testing.assert_allclose(changes[0], changes[1], atol=0.02 * np.max(np.abs(changes[0])))


def test_trust_region_bounds_the_exact_step():
    params, grads = tree(), jax.tree.map(lambda x: 1e3 * x, tree(10))
    tx = preconditioned(
        1.0, direction=optax.identity(), exact_every=1, max_move=0.05, exact_method="svd"
    )
    moved, _ = take_steps(tx, params, [grads])
    W = params["w"].product()
    assert jnp.linalg.norm(moved["w"].product() - W) <= 0.1001 * jnp.linalg.norm(W)


def test_converges_on_an_ill_conditioned_target():
    """Tong, Ma and Chi: the rate of ScaledGD does not depend on the condition number."""
    U, _ = np.linalg.qr(normal(1, M, R))
    V, _ = np.linalg.qr(normal(2, N, R))
    root = np.sqrt([100.0, 10.0, 1.0])
    target = (U * root**2) @ V.T
    near = LowRank(
        jnp.asarray(U * root + 0.1 * normal(3, M, R)),
        jnp.asarray((V * root).T + 0.1 * normal(4, R, N)),
    )
    params = {"w": near, "bias": jnp.zeros(M)}
    tx = preconditioned(0.4, direction=optax.identity(), regular=optax.set_to_zero())
    moved, _ = take_steps(tx, params, [quadratic(target)] * 40)
    assert np.linalg.norm(moved["w"].product() - target) < 1e-3


@pytest.mark.parametrize("exact_every", [None, 10])
def test_scaled_adamw_descends(exact_every):
    params, loss = tree(), quadratic(normal(5, M, R) @ normal(6, R, N))
    rate = optax.linear_schedule(0.1, 0.0, 100)
    moved, state = take_steps(preconditioned(rate, exact_every=exact_every), params, [loss] * 100)
    assert loss(moved) < 0.01 * loss(params)
    assert int(state.count) == 100


def test_preconditioner_leaves_other_leaves_alone():
    params, grads = tree(), tree(10)
    directions, state = scale_by_preconditioner().update(grads, optax.EmptyState(), params)
    np.testing.assert_array_equal(directions["bias"], grads["bias"])
    assert state == optax.EmptyState()
    lone = {"w": jnp.ones(3)}
    same, _ = scale_by_preconditioner().update(lone, optax.EmptyState(), lone)
    np.testing.assert_array_equal(same["w"], lone["w"])


def test_grams_multiply_back():
    w, g = tree()["w"], tree(10)["w"]
    d_B, d_A = divide_by_grams(w.B, w.A, g.B, g.A, 0.0)
    for found, expected in zip(multiply_by_grams(w.B, w.A, d_B, d_A), (g.B, g.A), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("delta", [0.0, 1e-6])
def test_finite_for_factors_of_deficient_rank(delta):
    zero = jnp.zeros((M, R))
    for B in (zero, jnp.ones((M, R)), zero.at[:, 0].set(100.0)):
        for A in (normal(1, R, N), 30 * jnp.ones((R, N))):
            G = normal(2, M, N)
            directions = divide_by_grams(B, A, G @ A.T, B.T @ G, delta)
            assert all(np.all(np.isfinite(d)) for d in directions)
    # Where B is zero so is the gradient of A, and what becomes of it.
    np.testing.assert_array_equal(divide_by_grams(zero, A, G @ A.T, zero.T @ G, delta)[1], 0.0)


@pytest.mark.parametrize("exact_every", [None, 2])
def test_stacked_layers_step_as_one_by_one(exact_every):
    params, grads = tree(batch=(2,)), [tree(10 * (t + 1), batch=(2,)) for t in range(3)]
    tx = preconditioned(0.01, exact_every=exact_every, exact_method="svd")
    stacked, _ = take_steps(tx, params, grads)
    for i in range(2):
        first, now, *then = (member(i, t) for t in (params, stacked, *grads))
        single, _ = take_steps(tx, first, then)
        # The signs of exact steps' factors are free; their products are not.
        np.testing.assert_allclose(now["w"].product(), single["w"].product(), atol=1e-3)
        np.testing.assert_allclose(now["bias"], single["bias"], rtol=1e-5)


def test_jit_changes_nothing_and_traces_once():
    params, grads = tree(), tree(10)
    traces = []

    def settings(exact_every):
        rate = lambda step: 0.01 / (1 + step)  # noqa: E731
        return preconditioned(rate, weight_decay=0.1, exact_every=exact_every, exact_method="svd")

    for exact_every in (None, 2):
        tx = settings(exact_every)

        @jax.jit
        def update(grads, state, params, tx=tx):
            traces.append(None)
            return tx.update(grads, state, params)

        state = tx.init(params)
        for _ in range(3):
            fast, state = update(grads, state, params)
    assert len(traces) == 2
    tx = settings(None)
    fast, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    updates, _ = tx.update(grads, tx.init(params), params)
    chex.assert_trees_all_close(fast, updates, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("exact_every", [None, 1])
def test_bfloat16_is_divided_in_float32_and_keeps_its_dtype(exact_every):
    params, grads = tree(dtype=jnp.bfloat16), tree(10, jnp.bfloat16)
    tx = preconditioned(0.01, exact_every=exact_every, exact_method="svd")
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    directions, _ = scale_by_preconditioner().update(grads, optax.EmptyState(), params)
    wide_p, wide_g = jax.tree.map(lambda x: x.astype(jnp.float32), (params, grads))
    expected, _ = scale_by_preconditioner().update(wide_g, optax.EmptyState(), wide_p)
    assert directions["w"].B.dtype == jnp.bfloat16
    chex.assert_trees_all_close(directions, expected, rtol=1e-2)


def test_pairs_may_be_named():
    params = {"up": normal(0, M, R), "down": normal(1, R, N), "B": normal(2, M)}
    grads = {"up": normal(3, M, R), "down": normal(4, R, N), "B": normal(5, M)}
    spec = {"up": "x.B", "down": "x.A", "B": None}
    same, same_grads = ({"w": LowRank(t["up"], t["down"])} for t in (params, grads))
    for exact_every in (None, 1):
        settings = {"exact_every": exact_every, "exact_method": "svd"}
        moved, _ = take_steps(preconditioned(0.1, pairs=spec, **settings), params, [grads])
        expected, _ = take_steps(preconditioned(0.1, **settings), same, [same_grads])
        np.testing.assert_allclose(moved["up"], expected["w"].B, rtol=1e-5)
        np.testing.assert_allclose(moved["down"], expected["w"].A, rtol=1e-5)


def test_tree_without_pairs():
    params = {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match="no low-rank pair found"):
        preconditioned(0.1).init(params)
    tx = preconditioned(0.1, pairs="optional")
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.1, rtol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping": -1.0}, "preconditioned: damping must not be negative, but is -1.0"),
        ({"max_move": -1.0}, "max_move must not be negative, but is -1.0"),
        ({"moments": "transport"}, 'moments must be "reset", "reset_factors", "keep" or None'),
        ({"moments": "some"}, "moments must be one of"),
        ({"exact_every": 0}, "exact_every must be at least 1"),
        ({"exact_method": "magic"}, "magic"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        preconditioned(0.1, **settings)


def test_bad_use_of_the_preconditioner():
    with pytest.raises(ValueError, match="damping must not be negative, but is -1"):
        scale_by_preconditioner(-1)
    params = tree()
    with pytest.raises(ValueError, match="needs params"):
        scale_by_preconditioner().update(params, optax.EmptyState())
    with pytest.raises(ValueError, match="needs the parameters"):
        preconditioned(0.1).update(params, preconditioned(0.1).init(params))
