"""The basis of an exact step's factors: SciPy's Procrustes in float64, and invariances."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.linalg import orthogonal_procrustes

from loro_jax import LowRank, exact_update, loro, orthogonal
from loro_jax.exact import METHODS, Batch, StepSize, phases, retract
from loro_jax.exact.basis import by_products, by_singular_vectors
from loro_jax.linalg.newton_schulz import polar_factor
from tests.exact.test_retractions import RATE, TOLERANCE, compiled, excess, make_pair, target
from tests.exact.test_transport import SIGNS, problem
from tests.helpers import act_as, some_fast

SHAPES = [(96, 64, 16), (40, 60, 40), (50, 40, 1)]


nearest = functools.partial(compiled, basis="nearest")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", some_fast(SHAPES, SHAPES[:1]), ids=str)
@pytest.mark.parametrize("condition", [1, 10, 1e3, 1e6])
def test_the_product_is_the_best_approximation_as_in_the_other_basis(method, shape, condition):
    rng = np.random.default_rng(0)
    for gradient in (0, 1e-3, 1e4):
        arguments = make_pair(rng, shape, "geometric", condition, gradient)
        T, s = target(*arguments)
        B, A, _ = nearest(method)(*arguments)
        assert excess(B, A, T, s) <= TOLERANCE[method] * np.linalg.norm(T), gradient


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["deficient B", "deficient A"])
def test_factors_without_their_rank_keep_product_and_balance(method, kind):
    arguments = make_pair(np.random.default_rng(0), (96, 64, 16), kind, 3, 1e-3)
    T, s = target(*arguments)
    B, A, _ = nearest(method)(*arguments)
    assert excess(B, A, T, s) <= TOLERANCE[method] * np.linalg.norm(T)
    np.testing.assert_allclose(B.T @ B, A @ A.T, atol=1e-5 * np.linalg.norm(B) ** 2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", some_fast([*SHAPES, (320, 260, 150)], SHAPES[:1]), ids=str)
def test_no_balanced_factors_are_nearer(method, shape):
    """Those in the singular basis, turned by SciPy to be near the old ones."""
    B, A, dB, dA = make_pair(np.random.default_rng(1), shape, "geometric", 3, 0.1)
    found = nearest(method)(B, A, dB, dA)[:2]
    others = (np.float64(x) for x in exact_update(B, A, dB, dA, RATE, method="svd"))
    stacked = np.concatenate([next(others), next(others).T])
    rotation, _ = orthogonal_procrustes(stacked, np.concatenate([B, A.T]))
    np.testing.assert_allclose(
        np.concatenate([found[0], found[1].T]), stacked @ rotation, atol=3e-5 * np.abs(B).max()
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_length_zero_leaves_balanced_factors_alone(method):
    B, A, *_ = make_pair(np.random.default_rng(2), SHAPES[0], "geometric", 10, 1.0)
    zero = np.zeros_like(B), np.zeros_like(A)
    B, A, _ = compiled("graph")(B, A, *zero)
    B_same, A_same, _ = nearest(method)(B, A, *zero)
    np.testing.assert_allclose(B_same, B, atol=1e-5)
    np.testing.assert_allclose(A_same, A, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_rotated_factors_give_rotated_ones_and_transposed_ones_transposed(method):
    B, A, dB, dA = make_pair(np.random.default_rng(3), SHAPES[0], "geometric", 5, 0.1)
    V = np.linalg.qr(np.random.default_rng(4).normal(size=(16, 16)))[0].astype(np.float32)
    B_new, A_new, _ = nearest(method)(B, A, dB, dA)
    B_turned, A_turned, _ = nearest(method)(B @ V, V.T @ A, dB @ V, V.T @ dA)
    np.testing.assert_allclose(B_turned, B_new @ V, atol=2e-5)
    np.testing.assert_allclose(A_turned, V.T @ A_new, atol=2e-5)
    A_t, B_t, _ = nearest(method)(A.T, B.T, dA.T, dB.T)
    np.testing.assert_allclose(B_t.T, B_new, atol=2e-5)
    np.testing.assert_allclose(A_t.T, A_new, atol=2e-5)


@pytest.mark.parametrize("balance", [by_products, by_singular_vectors])
@pytest.mark.parametrize("condition", [1, 10, 150])
def test_balance_of_a_product_with_an_orthonormal_side(balance, condition):
    rng = np.random.default_rng(0)
    M = np.linalg.qr(rng.normal(size=(30, 30)))[0] * np.geomspace(7, 7 / condition, 30)
    squares = (M @ M.T).astype(np.float32)
    found = jax.jit(balance)(squares)
    assert bool(found.ok)
    # 30^(1/8) is what the bounds may be off by.
    assert 7 / condition / 1.54 <= found.least <= 7 / condition * 1.01
    assert 7 * 0.999 <= found.largest <= 7 * 1.54
    left, right = np.float64(found.left), np.float64(found.right)
    np.testing.assert_allclose(left.T @ right, np.eye(30), atol=3e-5)
    # What is small among the squares is known to eps times the largest.
    np.testing.assert_allclose(
        left @ left.T, right @ M @ M.T @ right.T, atol=7e-7 * max(condition, 20)
    )


def test_other_platforms_find_the_same_factors_by_products(monkeypatch):
    act_as("cuda", monkeypatch)
    monkeypatch.setattr(phases, "by_singular_vectors", None)
    rng = np.random.default_rng(0)
    pairs = [make_pair(rng, (40, 24, 8), "geometric", condition, 1e-2) for condition in (3, 9)]
    batch = [jnp.array(np.stack(side)) for side in zip(*pairs, strict=True)]
    # Eagerly: batched LAPACK calls may block each other.
    with jax.disable_jit():
        size = StepSize(jnp.full(2, RATE, jnp.float32))
        ((B, A, ok),) = retract("graph", [Batch(*batch, size)], "nearest")
    monkeypatch.undo()
    assert ok.tolist() == [True, True]
    expected = nearest("svd")(*batch)
    np.testing.assert_allclose(B, expected[0], atol=1e-5)
    np.testing.assert_allclose(A, expected[1], atol=1e-5)


def test_a_polar_factor_keeps_the_largest_direction_however_small_the_least_is_thought():
    """Scaled without a bound, a singular value at the estimated norm is mapped to nearly zero."""
    rng = np.random.default_rng(0)
    X = np.outer(*rng.normal(size=(2, 30))) + 1e-3 * rng.normal(size=(30, 30))
    found, converged = polar_factor(X.astype(np.float32), 1e-7)
    U, _, Vt = np.linalg.svd(X)
    assert converged
    np.testing.assert_allclose(found, U @ Vt, atol=2e-3)
    np.testing.assert_allclose(U[:, 0] @ found @ Vt[0], 1, atol=1e-5)


@pytest.mark.parametrize("factor", [1, 1e-3, 1e3])
def test_the_polar_factor_is_that_of_an_svd(factor):
    """Whatever the least singular value is thought to be."""
    rng = np.random.default_rng(0)
    U, V = (np.linalg.qr(rng.normal(size=(3, 20, 20)))[0] for _ in range(2))
    least = np.array([1.0, 1e-2, 3e-4])
    s = np.stack([np.geomspace(1, x, 20) for x in least])
    X = 50 * (U * s[:, None, :]) @ V.mT
    found, converged = polar_factor(X.astype(np.float32), 50 * factor * least)
    assert converged.tolist() == [True] * 3
    np.testing.assert_allclose(found, U @ V.mT, atol=1e-3)  # it is as uncertain as eps / least
    np.testing.assert_allclose(found.mT @ found, np.stack([np.eye(20)] * 3), atol=2e-6)


@pytest.mark.parametrize("X", [np.diag([1.0, 0.0]), np.zeros((2, 2)), np.full((2, 2), np.nan)])
def test_where_there_is_no_polar_factor_it_says_so(X):
    _, converged = polar_factor(jnp.array(X, jnp.float32), 0.1)
    assert not bool(converged)


def trajectory(turn, steps=50, **settings):
    """Products of a regression whose pair is turned by an orthogonal matrix at the start."""
    params, loss = problem(np.ones(4))
    pair = params["pair"]
    params["pair"] = LowRank(pair.B @ turn, turn.T @ pair.A)
    tx = loro(0.02, exact_every=9, basis="nearest", **settings)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params["pair"].product()

    return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=steps)[1])(params)


def test_adams_moments_fit_behind_an_exact_step_whatever_the_signs(x64):
    """Fifty steps across five exact ones, nothing dropped, nothing carried over."""
    one, other = trajectory(np.eye(4)), trajectory(np.diag(SIGNS[1]))
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("direction", [optax.trace(0.9), orthogonal()], ids=["trace", "orthogonal"])
def test_momentum_fits_whatever_the_rotation(x64, direction):
    turn = np.linalg.qr(np.random.default_rng(5).normal(size=(4, 4)))[0]
    one = trajectory(np.eye(4), direction=direction)
    other = trajectory(turn, direction=direction)
    assert np.linalg.norm(one[-1] - one[0]) > 1e-2 * np.linalg.norm(one[0])
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_unknown_bases_are_named(method):
    with pytest.raises(ValueError, match=r"must be one of \('singular', 'nearest'\), but is 'svd'"):
        exact_update(*(jnp.eye(3),) * 4, 0.1, method=method, basis="svd")
    with pytest.raises(ValueError, match="loro: the basis must be one of"):
        loro(0.1, basis="svd")
