"""Propositions 3 and 4 against their definitions on full matrices, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loro_jax import LowRank, exact_update, riemannian_gradient
from tests.helpers import some_fast

# Tall, wide, square; rank one, half, more than half, and full.
SHAPES = [(12, 9, 3), (9, 12, 4), (10, 10, 1), (10, 10, 5), (10, 8, 7), (8, 8, 8), (7, 20, 7)]
SOME = [
    shape if shape == (9, 12, 4) else pytest.param(*shape, marks=pytest.mark.slow)
    for shape in SHAPES
]


def random_pair(m, n, r, seed=0):
    rng = np.random.default_rng(seed)
    B, A, G = rng.normal(size=(m, r)), rng.normal(size=(r, n)), rng.normal(size=(m, n))
    return B, A, G


def best_approximation(W, r):
    U, s, Vt = np.linalg.svd(W, full_matrices=False)
    return (U[:, :r] * s[:r]) @ Vt[:r]


def tangent_projection(W, r, G):
    """Projection onto the tangent space at W by the SVD of W."""
    U, _, Vt = np.linalg.svd(W, full_matrices=False)
    P_U, P_V = U[:, :r] @ U[:, :r].T, Vt[:r].T @ Vt[:r]
    return P_U @ G + G @ P_V - P_U @ G @ P_V


@pytest.mark.parametrize(("m", "n", "r"), SOME)
def test_riemannian_gradient_is_the_tangent_projection(x64, m, n, r):
    B, A, G = random_pair(m, n, r)
    gradient = riemannian_gradient(jnp.array(B), jnp.array(A), G @ A.T, B.T @ G)
    np.testing.assert_allclose(gradient, tangent_projection(B @ A, r, G), atol=1e-11)


@pytest.mark.parametrize("method", ["graph", "gram", "svd"])
@pytest.mark.parametrize(("m", "n", "r"), SOME)
def test_exact_update_is_the_truncated_svd(x64, m, n, r, method):
    B, A, G = random_pair(m, n, r)
    B_new, A_new = exact_update(jnp.array(B), jnp.array(A), G @ A.T, B.T @ G, 0.3, method=method)
    target = B @ A - 0.3 * tangent_projection(B @ A, r, G)
    np.testing.assert_allclose(B_new @ A_new, best_approximation(target, r), atol=1e-11)


@pytest.mark.parametrize(("m", "n", "r"), SOME)
def test_product_keeps_its_rank_and_factors_are_balanced(x64, m, n, r):
    B, A, G = random_pair(m, n, r)
    B_new, A_new = exact_update(jnp.array(B), jnp.array(A), G @ A.T, B.T @ G, 0.3)
    assert np.linalg.matrix_rank(B_new @ A_new) == r
    of_B = np.linalg.svd(B_new, compute_uv=False)
    of_A = np.linalg.svd(A_new, compute_uv=False)
    np.testing.assert_allclose(of_B, of_A, rtol=1e-10)
    np.testing.assert_allclose(B_new.T @ B_new, A_new @ A_new.T, atol=1e-10)


def test_product_does_not_depend_on_its_representation(x64):
    B, A, G = random_pair(12, 9, 3)
    change = np.random.default_rng(1).normal(size=(3, 3)) + 3 * np.eye(3)
    B2, A2 = B @ change, np.linalg.solve(change, A)
    first = LowRank(*exact_update(jnp.array(B), jnp.array(A), G @ A.T, B.T @ G, 0.3))
    second = LowRank(*exact_update(jnp.array(B2), jnp.array(A2), G @ A2.T, B2.T @ G, 0.3))
    np.testing.assert_allclose(first.product(), second.product(), atol=1e-10)


def test_zero_learning_rate_leaves_the_product(x64):
    B, A, G = random_pair(12, 9, 3)
    pair = LowRank(*exact_update(jnp.array(B), jnp.array(A), G @ A.T, B.T @ G, 0.0))
    np.testing.assert_allclose(pair.product(), B @ A, atol=1e-12)


def test_a_small_step_descends_at_the_first_order_rate(x64):
    """f(W - lr grad) = f(W) - lr |grad|^2 + O(lr^2), for the retraction too."""
    B, A, target = random_pair(12, 9, 3)
    G = B @ A - target  # gradient of half the squared distance to the target
    grad = riemannian_gradient(jnp.array(B), jnp.array(A), G @ A.T, B.T @ G)
    for rate in (1e-4, 1e-5):
        pair = LowRank(*exact_update(jnp.array(B), jnp.array(A), G @ A.T, B.T @ G, rate))
        drop = 0.5 * np.sum(G**2) - 0.5 * np.sum((pair.product() - target) ** 2)
        np.testing.assert_allclose(drop, rate * np.sum(grad**2), rtol=20 * rate)


def test_core_comes_from_the_direction_of_A(x64):
    """With directions that are no gradients, dB's part inside col(B) must not matter (parity)."""
    B, A, _ = random_pair(12, 9, 3)
    rng = np.random.default_rng(2)
    dB, dA = rng.normal(size=B.shape), rng.normal(size=A.shape)
    inside = B @ rng.normal(size=(3, 3))
    first = LowRank(*exact_update(jnp.array(B), jnp.array(A), dB, dA, 0.1)).product()
    second = LowRank(*exact_update(jnp.array(B), jnp.array(A), dB + inside, dA, 0.1)).product()
    np.testing.assert_allclose(first, second, atol=1e-10)


@pytest.mark.parametrize("batch", some_fast([(3,), (2, 3)], [(2, 3)]))
def test_leading_axes_are_batch_axes(x64, batch):
    rng = np.random.default_rng(0)
    B, A = rng.normal(size=(*batch, 8, 3)), rng.normal(size=(*batch, 3, 6))
    dB, dA = rng.normal(size=B.shape), rng.normal(size=A.shape)
    together = jax.jit(exact_update)(B, A, dB, dA, 0.1)
    for index in np.ndindex(*batch):
        alone = exact_update(*(jnp.array(x[index]) for x in (B, A, dB, dA)), 0.1)
        for one, of_all in zip(alone, together, strict=True):
            np.testing.assert_allclose(of_all[index], one, atol=1e-12)


@pytest.mark.parametrize(
    "dtype", some_fast([jnp.bfloat16, jnp.float16, jnp.float32], [jnp.float16])
)
def test_narrow_factors_keep_their_dtype_and_are_computed_in_float32(dtype):
    B, A, G = random_pair(12, 9, 3)
    arguments = [jnp.array(x, dtype) for x in (B, A, G @ A.T, B.T @ G)]
    B_new, A_new = exact_update(*arguments, 0.1)
    assert B_new.dtype == A_new.dtype == dtype
    wide = exact_update(*(x.astype(jnp.float32) for x in arguments), 0.1)
    for narrow, reference in zip((B_new, A_new), wide, strict=True):
        np.testing.assert_array_equal(narrow, reference.astype(dtype))


@pytest.mark.slow
def test_float32_is_close_to_float64():
    B, A, G = random_pair(64, 48, 16)
    with jax.enable_x64(True):
        reference = LowRank(*exact_update(jnp.array(B), jnp.array(A), G @ A.T, B.T @ G, 0.1))
        reference = np.asarray(reference.product())
    arguments = [jnp.array(x, jnp.float32) for x in (B, A, G @ A.T, B.T @ G)]
    product = LowRank(*exact_update(*arguments, 0.1)).product()
    assert np.linalg.norm(product - reference) < 1e-5 * np.linalg.norm(reference)


@pytest.mark.parametrize(
    ("B", "A", "dB", "dA", "message"),
    [
        ((6, 2), (3, 5), (6, 2), (3, 5), "same r"),
        ((6, 2), (2, 5), (6, 2), (5, 2), "directions"),
        ((3, 4), (4, 3), (3, 4), (4, 3), "rank must be between 1 and min"),
        ((6,), (2, 5), (6,), (2, 5), "expected B"),
        ((2, 6, 2), (3, 2, 5), (2, 6, 2), (3, 2, 5), "leading axes"),
    ],
)
def test_wrong_shapes_are_named(B, A, dB, dA, message):
    arguments = [jnp.ones(shape) for shape in (B, A, dB, dA)]
    with pytest.raises(ValueError, match=message):
        exact_update(*arguments, 0.1)
    with pytest.raises(ValueError, match=message):
        riemannian_gradient(*arguments)
