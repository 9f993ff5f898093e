"""The pairs of one matrix: what each method minimises, and what is exact."""

import numpy as np
import pytest

from loro_jax.compress.asvd import ALPHA
from loro_jax.compress.methods import METHODS
from loro_jax.compress.moments import Moments, output_error

M, N, RANK = 12, 20, 5


def moments_of(x_TxN):
    return Moments(x_TxN.T @ x_TxN / len(x_TxN), np.abs(x_TxN).mean(axis=0))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def inputs(rng):
    """Correlated, of very different sizes and with a mean."""
    mixed = rng.normal(size=(300, N)) @ rng.normal(size=(N, N)) * 2.0 ** -np.arange(N)
    return mixed + rng.normal(size=N)


@pytest.mark.parametrize("shape", [(M, N), (N, M), (M, M)])
@pytest.mark.parametrize("name", METHODS)
def test_pairs_are_balanced_and_exact_at_full_rank(rng, name, shape):
    W = rng.normal(size=shape)
    moments = moments_of(rng.normal(size=(100, shape[1])))
    B, A = METHODS[name].pair(W, RANK, moments)
    assert (B.shape, A.shape) == ((shape[0], RANK), (RANK, shape[1]))
    np.testing.assert_allclose(B.T @ B, A @ A.T, atol=1e-10)
    B, A = METHODS[name].pair(W, min(shape), moments)
    np.testing.assert_allclose(B @ A, W, atol=1e-8)


@pytest.mark.parametrize("name", ["svd", "welore"])
def test_the_truncated_svd_leaves_out_the_tail(rng, name):
    W = rng.normal(size=(M, N))
    B, A = METHODS[name].pair(W, RANK, None)
    spectrum = np.linalg.svd(W, compute_uv=False)
    assert np.linalg.norm(W - B @ A) == pytest.approx(np.sqrt(np.sum(spectrum[RANK:] ** 2)))
    np.testing.assert_allclose(np.linalg.svd(B @ A, compute_uv=False)[:RANK], spectrum[:RANK])


def test_lord_has_the_smallest_error_of_the_outputs(rng, inputs):
    W, moments = rng.normal(size=(M, N)), moments_of(inputs)
    errors = {
        name: output_error(W, np.matmul(*method.pair(W, RANK, moments)), moments)
        for name, method in METHODS.items()
    }
    assert errors["lord"] < errors["asvd"] < errors["svd"]
    # The best rank-5 matrix: the truncated SVD of W C^(1/2), whose tail is the error.
    root = np.linalg.cholesky(moments.second)
    tail = np.linalg.svd(W @ root, compute_uv=False)
    best = np.sqrt(np.sum(tail[RANK:] ** 2) / np.sum(tail**2))
    assert errors["lord"] == pytest.approx(best, rel=1e-4)
    outputs, wrong = inputs @ W.T, inputs @ np.matmul(*METHODS["lord"].pair(W, RANK, moments)).T
    found = np.linalg.norm(outputs - wrong) / np.linalg.norm(outputs)
    assert errors["lord"] == pytest.approx(found)


def test_lord_projects_on_the_outputs_principal_directions(rng, inputs):
    """As whitening by the inputs' second moment does (SVD-LLM)."""
    W, moments = rng.normal(size=(M, N)), moments_of(inputs)
    root = np.linalg.cholesky(moments.second)
    U, S, Vt = np.linalg.svd(W @ root, full_matrices=False)
    whitened = (U[:, :RANK] * S[:RANK]) @ Vt[:RANK] @ np.linalg.inv(root)
    found = np.matmul(*METHODS["lord"].pair(W, RANK, moments))
    np.testing.assert_allclose(found, whitened, atol=1e-3 * np.abs(whitened).max())


def test_asvd_scales_the_inputs(rng, inputs):
    W, moments = rng.normal(size=(M, N)), moments_of(inputs)
    S = np.diag(np.abs(inputs).mean(axis=0) ** ALPHA)
    U, s, Vt = np.linalg.svd(W @ S, full_matrices=False)
    expected = (U[:, :RANK] * s[:RANK]) @ Vt[:RANK] @ np.linalg.inv(S)
    found = np.matmul(*METHODS["asvd"].pair(W, RANK, moments))
    np.testing.assert_allclose(found, expected, atol=1e-10)


@pytest.mark.parametrize("name", ["asvd", "lord"])
def test_a_text_that_leaves_inputs_out_gives_numbers(rng, name):
    """Fewer tokens than inputs, and inputs that are always zero."""
    W = rng.normal(size=(M, N))
    few = rng.normal(size=(3, N)) * (np.arange(N) > 4)
    for inputs in (few, np.zeros((3, N))):
        moments = moments_of(inputs)
        B, A = METHODS[name].pair(W, RANK, moments)
        assert np.isfinite(B).all()
        assert np.isfinite(A).all()
        assert output_error(W, B @ A, moments) < (1e-2 if name == "lord" else 1)
