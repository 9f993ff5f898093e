"""Orthogonalised momentum: against float64, and what must hold of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loro_jax import LowRank, initialise, loro, orthogonal
from loro_jax.exact.tangent import as_gradients
from loro_jax.linalg.newton_schulz import OVERSHOOT, QUINTIC, inverse_root
from tests.helpers import some_fast

M, N, R = 24, 40, 6


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def pair(seed=0, m=M, n=N, r=R, skew=1.0):
    """Factors with singular values that spread, B larger than A by ``skew``."""
    B = draw(seed, m, r) * jnp.linspace(0.3, 1.5, r) * skew
    return B, draw(seed + 1, r, n) / skew


def gradients(B, A, seed=7):
    G = draw(seed, B.shape[-2], A.shape[-1])
    return G @ A.mT, B.mT @ G


def one_step(B, A, g_B, g_A, **options):
    params = {"w": LowRank(B, A)}
    tx = loro(0.1, direction=orthogonal(**options), exact_every=None)
    updates, state = tx.update({"w": LowRank(g_B, g_A)}, tx.init(params), params)
    return updates["w"].B, updates["w"].A, state


def polynomial(x, steps=5):
    a, b, c = QUINTIC
    for _ in range(steps):
        x = a * x + b * x**3 + c * x**5
    return x


def orthogonalised64(X, steps=5):
    U, s, Vt = np.linalg.svd(X, full_matrices=False)
    return (U * polynomial(s / np.linalg.norm(s), steps)) @ Vt


def root64(S, damping):
    values, vectors = np.linalg.eigh(S)
    return (vectors * (values + damping * values.mean()) ** -0.5) @ vectors.T


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("damping", [0.0, 1e-3, 0.1])
def test_the_first_two_steps_are_those_of_float64(nesterov, damping):
    B, A = pair()
    tx = loro(0.1, direction=orthogonal(0.9, nesterov=nesterov, damping=damping), exact_every=None)
    params = {"w": LowRank(B, A)}
    state = tx.init(params)
    B64, A64 = np.float64(B), np.float64(A)
    mu_B, mu_A = 0.0, 0.0
    for seed in (7, 8):
        g_B, g_A = gradients(params["w"].B, params["w"].A, seed)
        updates, state = tx.update({"w": LowRank(g_B, g_A)}, state, params)
        params = optax.apply_updates(params, updates)

        g_B, g_A = np.float64(g_B), np.float64(g_A)
        mu_B, mu_A = 0.9 * mu_B + 0.1 * g_B, 0.9 * mu_A + 0.1 * g_A
        ahead_B = 0.9 * mu_B + 0.1 * g_B if nesterov else mu_B
        ahead_A = 0.9 * mu_A + 0.1 * g_A if nesterov else mu_A
        root_A, root_B = root64(A64 @ A64.T, damping), root64(B64.T @ B64, damping)
        size = 0.1 * 0.5 * (M / N) ** 0.5
        dB = size * orthogonalised64(ahead_B @ root_A) @ root_A
        dA = size * root_B @ orthogonalised64(root_B @ ahead_A)
        B64, A64 = B64 - dB, A64 - dA
        np.testing.assert_allclose(params["w"].B, B64, rtol=0, atol=2e-5)
        np.testing.assert_allclose(params["w"].A, A64, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "shape",
    some_fast([(24, 40, 6), (40, 24, 6), (8, 8, 8), (16, 12, 1)], [(24, 40, 6), (8, 8, 8)]),
)
def test_the_product_moves_by_the_learning_rate_at_most(shape):
    m, n, r = shape
    B, A = pair(0, m, n, r)
    dB, dA, _ = one_step(B, A, *gradients(B, A))
    move = np.linalg.norm(np.float64(dB @ A + B @ dA), 2)
    size = 0.1 * (m / n) ** 0.5
    assert 0.3 * size < move < OVERSHOOT * size


def test_what_represents_the_product_does_not_matter():
    B, A = pair()
    S = jnp.eye(R) + 0.3 * draw(5, R, R)
    moves = []
    for B_S, A_S in ((B, A), (B @ S, jnp.linalg.solve(S, A))):
        dB, dA, _ = one_step(B_S, A_S, *gradients(B_S, A_S), damping=0.0)
        moves.append(dB @ A_S + B_S @ dA)
    np.testing.assert_allclose(moves[0], moves[1], atol=2e-5)


def test_descent_whatever_the_scale_of_the_gradient():
    B, A = pair()
    G = draw(7, M, N)
    for scale in (1e-12, 1.0, 1e6):
        dB, dA, _ = one_step(B, A, scale * G @ A.mT, scale * B.mT @ G)
        assert float(jnp.sum((dB @ A + B @ dA) * G)) < 0


def test_zero_gradients_and_zero_factors_move_nothing():
    B, A = pair()
    dB, dA, _ = one_step(B, A, jnp.zeros_like(B), jnp.zeros_like(A))
    assert float(jnp.abs(dB).max()) == float(jnp.abs(dA).max()) == 0
    dB, dA, _ = one_step(jnp.zeros_like(B), A, draw(3, M, R), jnp.zeros_like(A))
    assert bool(jnp.isfinite(dB).all())
    assert bool(jnp.isfinite(dA).all())
    assert float(jnp.abs(dB).max()) > 0


def test_one_moment_for_factors_and_adam_for_the_rest():
    B, A = pair()
    params = {"w": LowRank(B, A), "bias": jnp.zeros(5)}
    tx = loro(0.1, direction=orthogonal(), lr_scale=2.0)
    state = tx.init(params)
    assert sum(x.size for x in jax.tree.leaves(state.factors)) == B.size + A.size
    grads = {"w": LowRank(*gradients(B, A)), "bias": jnp.ones(5)}
    updates, state = tx.update(grads, state, params)
    expected = loro(0.1, pairs="optional")
    alone, _ = expected.update(
        {"bias": jnp.ones(5)}, expected.init({"bias": params["bias"]}), {"bias": params["bias"]}
    )
    np.testing.assert_allclose(updates["bias"], alone["bias"])
    np.testing.assert_allclose(updates["w"].B, 2 * one_step(B, A, *gradients(B, A))[0], rtol=1e-5)


@pytest.mark.parametrize("method", ["graph", "gram", "svd"])
def test_an_exact_step_is_the_move_retracted(method):
    B, A = pair()
    g_B, g_A = gradients(B, A)
    dB, dA, _ = one_step(B, A, g_B, g_A)
    params = {"w": LowRank(B, A)}
    tx = loro(0.1, direction=orthogonal(), exact_every=1, exact_method=method)
    updates, _ = tx.update({"w": LowRank(g_B, g_A)}, tx.init(params), params)
    moved = optax.apply_updates(params, updates)["w"]
    B64, A64 = np.float64(B), np.float64(A)
    U, s, Vt = np.linalg.svd(B64 @ A64 + np.float64(dB) @ A64 + B64 @ np.float64(dA))
    best = (U[:, :R] * s[:R]) @ Vt[:R]
    error = np.linalg.norm(np.float64(moved.B) @ np.float64(moved.A) - best)
    assert error < 2e-5 * np.linalg.norm(best)
    np.testing.assert_allclose(moved.B.T @ moved.B, moved.A @ moved.A.T, atol=1e-4)


def test_transported_momentum_knows_no_basis():
    """Runs from (B, A) and (B Q, Q^T A) keep one product, through exact steps."""
    target = draw(11, M, R) @ draw(12, R, N)
    rotation = jnp.linalg.qr(draw(13, R, R))[0]
    tx = loro(0.3, direction=orthogonal(), exact_every=10, moments="transport")

    def loss(params):
        return jnp.mean((params["w"].product() - target) ** 2)

    @jax.jit
    def run(B, A):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), (loss(params), params["w"].product())

        params = {"w": LowRank(B, A)}
        return jax.lax.scan(step, (params, tx.init(params)), length=50)[1]

    B, A = initialise(jax.random.key(0), M, N, R)
    losses, products = run(B, A)
    others, turned = run(B @ rotation, rotation.T @ A)
    assert float(losses[-1]) < 0.6 * float(losses[0])
    np.testing.assert_allclose(losses, others, rtol=1e-3)
    np.testing.assert_allclose(products, turned, atol=5e-3 * float(jnp.abs(products).max()))


def test_stacked_pairs_step_as_single_ones():
    pairs = [pair(2 * i) for i in range(3)]
    grads = [gradients(*p, seed=20 + i) for i, p in enumerate(pairs)]
    stacked = one_step(
        *(jnp.stack(x) for x in zip(*pairs, strict=True)),
        *(jnp.stack(x) for x in zip(*grads, strict=True)),
    )
    for i in range(3):
        single = one_step(*pairs[i], *grads[i])
        np.testing.assert_allclose(stacked[0][i], single[0], atol=1e-6)
        np.testing.assert_allclose(stacked[1][i], single[1], atol=1e-6)


def test_narrow_factors_keep_their_dtype():
    B, A = (x.astype(jnp.bfloat16) for x in pair())
    g_B, g_A = gradients(B, A)
    dB, dA, state = one_step(B, A, g_B.astype(B.dtype), g_A.astype(A.dtype))
    assert dB.dtype == dA.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(state.factors)} == {jnp.dtype(jnp.bfloat16)}
    assert bool(jnp.isfinite(dB).all())


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_inverse_root_at_every_condition(condition):
    Q = np.linalg.qr(np.random.default_rng(0).normal(size=(R, R)))[0]
    S = (Q * np.geomspace(1, condition, R)) @ Q.T
    found = np.float64(inverse_root(jnp.float32(S), damping=1e-5))
    expected = root64(S, 1e-5)
    # float32 knows the smallest eigenvalue to eps times the condition.
    tolerance = 1e-5 + 1e-6 * condition
    assert np.linalg.norm(found - expected) < tolerance * np.linalg.norm(expected)


def test_inverse_root_of_zero_is_zero():
    assert float(jnp.abs(inverse_root(jnp.zeros((2, 3, 3)))).max()) == 0


def test_as_gradients_of_stacks():
    B, A, dB, dA = (draw(i, 2, *s) for i, s in enumerate([(M, R), (R, N)] * 2))
    g_B, g_A = as_gradients(B, A, dB, dA)
    single = as_gradients(B[1], A[1], dB[1], dA[1])
    np.testing.assert_allclose(g_B[1], single[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(g_A[1], single[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, "momentum must be in"),
        ({"newton_schulz_steps": 0}, "newton_schulz_steps must be at least 1"),
        ({"damping": -1.0}, "damping must not be negative"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        orthogonal(**options)
