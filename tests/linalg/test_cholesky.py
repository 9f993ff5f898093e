"""The Cholesky factorisation by blocks against NumPy's in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loro_jax.linalg import cholesky
from loro_jax.linalg.cholesky import cholesky_with_inverse

# One block, two, blocks of unequal sizes, and blocks above the usual size.
SIZES = [1, 7, 64, 65, 130, 200, 520]


def gram_matrix(r, condition, dtype=np.float32):
    rng = np.random.default_rng(r)
    Q = np.linalg.qr(rng.normal(size=(r, r)))[0]
    G = (Q * np.geomspace(1, 1 / condition, r)) @ Q.T
    return (np.tril(G) + np.tril(G, -1).T).astype(dtype)


@pytest.mark.parametrize("condition", [1, 1e2, 1e4])
@pytest.mark.parametrize("r", SIZES)
def test_factor_and_inverse_are_numpys(r, condition):
    G = gram_matrix(r, condition)
    L, inverse, _ = jax.jit(cholesky_with_inverse)(G)
    expected = np.linalg.cholesky(G.astype(np.float64))
    eps = float(np.finfo(np.float32).eps)
    L, inverse = np.asarray(L, np.float64), np.asarray(inverse, np.float64)
    assert np.linalg.norm(L @ L.T - G) <= 2 * eps * r**0.5 * np.linalg.norm(G)
    np.testing.assert_array_equal(L, np.tril(L))
    np.testing.assert_array_equal(inverse, np.tril(inverse))
    exact = np.linalg.inv(expected)
    assert np.linalg.norm(inverse - exact) <= 4 * eps * condition * np.linalg.norm(exact)


def test_float64_is_float64():
    with jax.enable_x64(True):
        G = gram_matrix(130, 1e6, np.float64)
        L, inverse, _ = cholesky_with_inverse(G)
        assert L.dtype == inverse.dtype == jnp.float64
        assert np.linalg.norm(L @ L.T - G) <= 1e-14
        assert np.linalg.norm(inverse @ L - np.eye(130)) <= 1e-10


def test_by_blocks_it_is_what_it_is_as_a_whole():
    G = gram_matrix(130, 10)
    for one, other in zip(cholesky._by_halves(G), cholesky._whole(G), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize("where", [0, 64, 129])
def test_what_is_not_positive_definite_gives_no_numbers(where):
    G = gram_matrix(130, 10)
    G[where, where] = -1
    L, inverse, norm = cholesky_with_inverse(G)
    assert not np.all(np.isfinite(L))
    assert not np.all(np.isfinite(inverse))
    assert not np.isfinite(norm)


def test_what_is_above_the_diagonal_is_not_read():
    G = gram_matrix(130, 10)
    for one, other in zip(cholesky_with_inverse(G), cholesky_with_inverse(np.tril(G)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_norm_is_that_of_the_matrix_with_ones_on_its_diagonal():
    G = gram_matrix(40, 10)
    scales = np.geomspace(1e-3, 1e3, 40).astype(np.float32)
    _, inverse, norm = cholesky_with_inverse(G * scales[:, None] * scales)
    d = np.sqrt(np.diagonal(G))
    expected = np.linalg.norm(np.linalg.inv(np.linalg.cholesky(G / d[:, None] / d)))
    np.testing.assert_allclose(norm, expected, rtol=1e-4)
    assert np.all(np.isfinite(inverse))
