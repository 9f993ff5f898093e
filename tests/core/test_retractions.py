"""Both methods of the exact step in float32 against a float64 truncated SVD, everywhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loro_jax import LowRank, exact_update, loro
from loro_jax.manifold import counted_exact_update

# Error of W beyond the best rank-r approximation, over |W - lr grad|.
TOLERANCE = {"svd": 2e-5, "gram": 4e-5}
RATE = 0.01

# Tall, wide and square; rank one, below half, above half, and full.
SHAPES = [(96, 64, 16), (64, 96, 40), (48, 48, 48), (50, 40, 1), (40, 60, 40)]


def spectrum(kind, r, condition):
    if kind == "repeated":
        return np.where(np.arange(r) < (r + 1) // 2, 1.0, 1 / condition)
    return np.geomspace(1, 1 / condition, r)


def make_pair(rng, shape, kind, condition, gradient):
    m, n, r = shape

    def factor(rows):
        U, _ = np.linalg.qr(rng.normal(size=(rows, r)))
        V, _ = np.linalg.qr(rng.normal(size=(r, r)))
        return (U * spectrum(kind, r, condition)) @ V.T

    B, A = factor(m).astype(np.float32), factor(n).T.astype(np.float32)
    if kind == "deficient B":
        B[:, : max(1, r // 3)] = 0
    if kind == "deficient A":
        A[: max(1, r // 3)] = 0
    G = gradient * rng.normal(size=(m, n))
    return B, A, (G @ A.T).astype(np.float32), (B.T @ G).astype(np.float32)


def target(B, A, dB, dA):
    """W - lr grad in float64, by the SVDs of the factors; and its singular values."""
    B, A, dB, dA = (np.asarray(x, np.float64) for x in (B, A, dB, dA))

    def side(X):
        U, s, Vt = np.linalg.svd(X, full_matrices=False)
        kept = s > s[0] * 1e-12
        return U[:, kept], s[kept], Vt[kept]

    (U, s_B, Vt_B), (V, s_A, Vt_A) = side(B), side(A.T)
    left, right = (Vt_B @ dA) / s_B[:, None], (dB @ Vt_A.T) / s_A
    T = B @ A - RATE * (U @ left + (right - U @ (U.T @ right)) @ V.T)
    return T, np.linalg.svd(T, compute_uv=False)


@functools.cache
def compiled(method):
    return jax.jit(
        lambda *arguments: counted_exact_update(
            *arguments, RATE, method=method, max_move=None, where="test"
        )
    )


@pytest.mark.parametrize("method", ["svd", "gram"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["geometric", "repeated", "deficient B", "deficient A"])
def test_float32_error_beyond_the_best_approximation(method, shape, kind):
    if shape[2] == 1 and kind.startswith("deficient"):
        pytest.skip("a rank-one factor without rank is zero")
    rng = np.random.default_rng(0)
    r = shape[2]
    for condition in (1, 10, 30, 100, 1e3, 1e4, 1e6):
        for gradient in (0, 1e-8, 1e-3, 1, 1e4):
            arguments = make_pair(rng, shape, kind, condition, gradient)
            T, s = target(*arguments)
            B, A, _ = compiled(method)(*arguments)
            W = np.asarray(B, np.float64) @ np.asarray(A, np.float64)
            error = np.linalg.norm(W - T) - np.sqrt(np.sum(s[r:] ** 2))
            # Not-a-numbers fail this comparison too.
            assert error <= TOLERANCE[method] * np.linalg.norm(T), (condition, gradient)


def test_the_fast_method_is_fast_where_it_can_and_says_where_it_can_not():
    rng = np.random.default_rng(0)
    for condition, expected in ((3, 0), (1e4, 1)):
        arguments = make_pair(rng, (96, 64, 16), "geometric", condition, 1e-3)
        *_, fallbacks = compiled("gram")(*arguments)
        assert int(fallbacks) == expected


def test_a_batch_falls_back_pair_by_pair():
    rng = np.random.default_rng(0)
    pairs = [
        make_pair(rng, (96, 64, 16), "geometric", condition, 1e-3) for condition in (3, 1e5, 2)
    ]
    batch = [np.stack(side) for side in zip(*pairs, strict=True)]
    B, A, fallbacks = compiled("gram")(*batch)
    assert int(fallbacks) == 1
    for i, arguments in enumerate(pairs):
        T, s = target(*arguments)
        W = np.asarray(B[i], np.float64) @ np.asarray(A[i], np.float64)
        error = np.linalg.norm(W - T) - np.sqrt(np.sum(s[16:] ** 2))
        assert error <= 4e-5 * np.linalg.norm(T)


def test_fallbacks_are_counted_in_the_state():
    rng = np.random.default_rng(0)
    B, A, dB, dA = make_pair(rng, (96, 64, 16), "geometric", 1e5, 1e-3)
    C, D, dC, dD = make_pair(rng, (96, 64, 16), "geometric", 2, 1e-3)
    params = {"bad": LowRank(B, A), "good": LowRank(C, D)}
    grads = {"bad": LowRank(dB, dA), "good": LowRank(dC, dD)}
    tx = loro(1e-3, exact_every=2)
    state = tx.init(params)
    counts = []
    for _ in range(4):
        _, state = tx.update(grads, state, params)
        counts.append(int(state.fallbacks))
    assert counts == [0, 1, 1, 2]
    svd = loro(1e-3, exact_every=1, exact_method="svd")
    _, state = svd.update(grads, svd.init(params), params)
    assert int(state.fallbacks) == 0


@pytest.mark.parametrize("method", ["svd", "gram"])
@pytest.mark.parametrize("condition", [1e2, 1e3])
def test_the_trust_region_bounds_the_move(method, condition):
    """Without it, Adam-sized directions move an ill-conditioned product by more than its norm."""
    rng = np.random.default_rng(0)
    B, A, dB, dA = make_pair(rng, (96, 64, 16), "geometric", condition, 1.0)
    dB, dA = np.sign(dB), np.sign(dA)
    W = B @ A

    def move(max_move):
        new = exact_update(B, A, dB, dA, RATE, method=method, max_move=max_move)
        return np.linalg.norm(LowRank(*new).product() - W) / np.linalg.norm(W)

    assert move(None) > 1
    assert move(jnp.float32(0.05)) <= 0.1
    assert 0 < move(0.05) <= 0.1
    np.testing.assert_allclose(move(1e9), move(None), rtol=1e-4)


@pytest.mark.parametrize("method", ["svd", "gram"])
def test_the_trust_region_leaves_small_steps_alone(method):
    rng = np.random.default_rng(0)
    arguments = make_pair(rng, (96, 64, 16), "geometric", 10, 1e-3)
    free = exact_update(*arguments, RATE, method=method)
    bound = exact_update(*arguments, RATE, method=method, max_move=0.5)
    for one, other in zip(free, bound, strict=True):
        np.testing.assert_array_equal(one, other)


def test_unknown_methods_are_named():
    with pytest.raises(ValueError, match=r"must be one of .* but is 'qr'"):
        exact_update(*(jnp.eye(3),) * 4, 0.1, method="qr")
    with pytest.raises(ValueError, match="'qr'"):
        loro(0.1, exact_method="qr")
