"""Spectron against its equations in float64, and the properties that it is made for."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loro_jax import LowRank, adam, scale_by_uncorrected_adam
from loro_jax.linalg.newton_schulz import OVERSHOOT, orthogonalise, power_iteration
from loro_jax.peers.spectron import spectron
from tests.helpers import member, take_steps

M, R, N = 7, 3, 5


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def tree(seed=0, dtype=jnp.float32, batch=()):
    """A pair and a regular leaf."""
    pair = LowRank(
        normal(seed, *batch, M, R, dtype=dtype), normal(seed + 1, *batch, R, N, dtype=dtype)
    )
    return {"w": pair, "bias": normal(seed + 2, *batch, M, dtype=dtype)}


def reference(B, A, u_B, u_A, grads, eta, beta, decay, ns_steps):
    """Algorithm 1 with Algorithms 2 and 3, for W = B C^T with C = A^T; numpy, float64."""

    def newton_schulz(X):
        X = X / np.linalg.norm(X)
        for _ in range(ns_steps):
            S = X @ X.T
            X = 3.4445 * X + (-4.7750 * S + 2.0315 * S @ S) @ X
        return X

    def largest(X, u):
        v = X.T @ u
        v /= np.linalg.norm(v)
        u = X @ v
        u /= np.linalg.norm(u)
        return u @ X @ v, u

    C = A.T
    M_B, M_C = np.zeros_like(B), np.zeros_like(C)
    for t, (g_B, g_A) in enumerate(grads):
        g_C = g_A.T
        M_B, M_C = beta * M_B + (1 - beta) * g_B, beta * M_C + (1 - beta) * g_C
        (s_B, u_B), (s_C, u_A) = largest(B, u_B), largest(C, u_A)
        rho = eta(t) / (s_B + s_C + 1)
        B = B - rho * newton_schulz(M_B) - eta(t) * decay * B
        C = C - rho * newton_schulz(M_C) - eta(t) * decay * C
    return B, C.T


@pytest.mark.parametrize("ns_steps", [5, 3])
@pytest.mark.usefixtures("x64")
def test_factors_follow_the_papers_equations(ns_steps):
    params = tree(dtype=jnp.float64)
    grads = [tree(10 * (t + 1), jnp.float64) for t in range(6)]
    eta = lambda t: 0.3 / (1 + t)  # noqa: E731
    tx = spectron(
        eta,
        momentum=0.8,
        newton_schulz_steps=ns_steps,
        weight_decay=0.1,
    )
    start = tx.init(params).factors.vectors["w"]
    moved, state = take_steps(tx, params, grads)
    B, A = reference(
        np.asarray(params["w"].B),
        np.asarray(params["w"].A),
        np.asarray(start.B)[:, 0],
        np.asarray(start.A)[0],
        [(np.asarray(g["w"].B), np.asarray(g["w"].A)) for g in grads],
        eta,
        0.8,
        0.1,
        ns_steps,
    )
    np.testing.assert_allclose(moved["w"].B, B, rtol=1e-10)
    np.testing.assert_allclose(moved["w"].A, A, rtol=1e-10)
    assert int(state.count) == 6


def run_once(params, grads):
    for lr_scale in (25.0, 1.0):
        yield take_steps(spectron(0.02, lr_scale=lr_scale), params, [grads])[0]


def test_other_leaves_follow_adam():
    params, grads = tree(), [tree(10 * (t + 1)) for t in range(3)]
    settings = {"b1": 0.8, "b2": 0.9, "eps": 1e-3}
    regular = adam(**settings)
    tx = spectron(0.02, lr_scale=25.0, weight_decay=0.1, regular=regular)
    moved, _ = take_steps(tx, params, grads)
    expected = optax.chain(
        scale_by_uncorrected_adam(**settings),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(0.02),
    )
    expected, _ = take_steps(expected, params["bias"], [g["bias"] for g in grads])
    np.testing.assert_allclose(moved["bias"], expected, rtol=1e-5)
    # Without an lr_scale the factors take the same rate.
    same, _ = take_steps(spectron(0.02, weight_decay=0.1, regular=regular), params, grads)
    np.testing.assert_allclose(same["bias"], expected, rtol=1e-5)
    one, other = (tree["w"].B - params["w"].B for tree in run_once(params, grads[0]))
    np.testing.assert_allclose(one, 25 * other, rtol=1e-4, atol=1e-5)


def test_own_transformation_for_other_leaves():
    params, grads = tree(), tree(10)
    tx = spectron(0.5, regular=optax.sgd(0.1), weight_decay=0.1)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["bias"], -0.1 * grads["bias"], rtol=1e-6)


def left_vector(X):
    return jnp.linalg.svd(X)[0][:, :1]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_products_update_is_bounded_by_the_learning_rate(scale):
    """Whatever the size of the factors and the gradients; with norms that have converged."""
    eta = 0.2
    tx = spectron(eta, momentum=0.5)
    params = jax.tree.map(lambda x: scale * x, tree())
    state = tx.init(params)
    for t in range(3):
        B, A = params["w"].B, params["w"].A
        exact = LowRank.tree_unflatten(None, (left_vector(B), left_vector(A.T).T))
        vectors = {**state.factors.vectors, "w": exact}
        state = state._replace(factors=state.factors._replace(vectors=vectors))
        grads = jax.tree.map(lambda x: 1e4 * x, tree(20 + t))
        updates, state = tx.update(grads, state, params)
        new = optax.apply_updates(params, updates)
        change = new["w"].product() - params["w"].product()
        size = float(jnp.linalg.norm(change, 2))
        assert size <= OVERSHOOT * eta + 1e-5 * scale**2
        params = new
    if scale == 1.0:
        # Nor is it needlessly small: without the renormalisation it would be a multiple.
        assert size > 0.2 * eta


def test_estimates_tighten_from_step_to_step():
    """The power iteration goes on from where it stopped: one step each time is enough."""
    params = tree()
    tx = spectron(1e-6)
    _, state = take_steps(tx, params, [tree(10)] * 60)
    for left, matrix in (
        (state.factors.vectors["w"].B, params["w"].B),
        (state.factors.vectors["w"].A.T, params["w"].A.T),
    ):
        np.testing.assert_allclose(
            np.linalg.norm(matrix.T @ left), np.linalg.norm(matrix, 2), rtol=1e-4
        )


def test_newton_schulz_keeps_singular_vectors_and_bounds_singular_values():
    U, _ = np.linalg.qr(normal(0, 8, 4))
    V, _ = np.linalg.qr(normal(1, 4, 4))
    X = jnp.asarray(U * np.array([3.0, 1.0, 0.3, 0.05])) @ V.T
    for steps in (1, 2, 5, 9):
        values = np.diag(U.T @ np.asarray(orthogonalise(X, steps)) @ V)
        np.testing.assert_allclose(orthogonalise(X, steps), (U * values) @ V.T, atol=2e-5)
        assert np.all(values <= OVERSHOOT)
        if steps >= 5:
            assert np.all(values > 0.6)
    np.testing.assert_allclose(orthogonalise(X.T), orthogonalise(X).T, atol=1e-6)


def test_power_iteration_of_zero_keeps_its_vector():
    u = jnp.array([[0.6], [0.8]])
    sigma, after = power_iteration(jnp.zeros((2, 3)), u, 3)
    np.testing.assert_array_equal(sigma, [[0.0]])
    np.testing.assert_array_equal(after, u)


def test_starts_from_a_zero_factor_and_zero_gradients():
    params = tree()
    params["w"] = LowRank(jnp.zeros((M, R)), params["w"].A)
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = spectron(0.1)
    still, state = take_steps(tx, params, [zeros])
    chex.assert_trees_all_close(still, params, atol=0)
    updates, state = tx.update(tree(10), state, params)
    new = optax.apply_updates(params, updates)
    updates, state = tx.update(tree(11), state, new)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((updates, state)))
    assert float(jnp.linalg.norm(state.factors.vectors["w"].B)) == pytest.approx(1, rel=1e-5)


def test_descends():
    params = tree()
    target = normal(5, M, R) @ normal(6, R, N)

    def loss(p):
        return jnp.sum((p["w"].product() + p["bias"][:, None] - target) ** 2)

    tx = spectron(optax.linear_schedule(0.02, 0.0, 150), lr_scale=25.0)

    @jax.jit
    def train(params):
        def step(carry, _):
            p, state = carry
            updates, state = tx.update(jax.grad(loss)(p), state, p)
            return (optax.apply_updates(p, updates), state), loss(p)

        return jax.lax.scan(step, (params, tx.init(params)), length=150)[1]

    losses = train(params)
    assert losses[-1] < 0.02 * losses[0]


def test_stacked_layers_step_as_one_by_one():
    params, grads = tree(batch=(2,)), [tree(10 * (t + 1), batch=(2,)) for t in range(3)]
    stacked, _ = take_steps(spectron(0.1), params, grads)
    for i in range(2):
        first, now, *then = (member(i, t) for t in (params, stacked, *grads))
        single, _ = take_steps(spectron(0.1), first, then)
        chex.assert_trees_all_close(now, single, rtol=1e-4, atol=1e-5)


def test_jit_changes_nothing_and_traces_once():
    params, grads = tree(), tree(10)
    tx = spectron(lambda step: 0.1 / (1 + step), weight_decay=0.1)
    traces = []

    @jax.jit
    def update(grads, state, params):
        traces.append(None)
        return tx.update(grads, state, params)

    state = jitted = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(grads, state, params)
        fast, jitted = update(grads, jitted, params)
        chex.assert_trees_all_close(fast, updates, rtol=1e-4, atol=1e-6)
    assert len(traces) == 1


def test_bfloat16_is_stepped_in_float32_and_keeps_its_dtype():
    params, grads = tree(dtype=jnp.bfloat16), tree(10, jnp.bfloat16)
    tx = spectron(0.1)
    updates, state = tx.update(grads, tx.init(params), params)
    assert {x.dtype for x in jax.tree.leaves((updates, state.factors.momentum))} == {
        jnp.dtype(jnp.bfloat16)
    }
    assert {x.dtype for x in jax.tree.leaves(state.factors.vectors)} == {jnp.dtype(jnp.float32)}
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (params, grads))
    expected, _ = tx.update(wide[1], tx.init(wide[0]), wide[0])
    chex.assert_trees_all_close(updates["w"], expected["w"], rtol=1e-2, atol=1e-5)


def test_pairs_may_be_named():
    params = {"up": normal(0, M, R), "down": normal(1, R, N), "B": normal(2, M)}
    spec = {"up": "x.B", "down": "x.A", "B": None}
    grads = jax.tree.map(jnp.ones_like, params)
    tx = spectron(0.1, pairs=spec)
    updates, _ = tx.update(grads, tx.init(params), params)
    same = {"w": LowRank(params["up"], params["down"])}
    tx = spectron(0.1)
    expected, _ = tx.update(jax.tree.map(jnp.ones_like, same), tx.init(same), same)
    np.testing.assert_array_equal(updates["up"], expected["w"].B)
    np.testing.assert_array_equal(updates["down"], expected["w"].A)


def test_tree_without_pairs():
    params = {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match="no low-rank pair found"):
        spectron(0.1).init(params)
    tx = spectron(0.1, pairs="optional")
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.1, rtol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), but is 1.0"),
        ({"newton_schulz_steps": 0}, "newton_schulz_steps must be at least 1, but is 0"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative, but is -0.1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        spectron(0.1, **settings)


def test_update_needs_params():
    tx, params = spectron(0.1), tree()
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, tx.init(params))
