"""AdaRankGrad against its equations in NumPy and GaLore, its ranks and its triggers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loro_jax.memory import count_parameters
from loro_jax.peers.adarankgrad import adarankgrad
from loro_jax.peers.galore import galore
from loro_jax.peers.subspace import adaptive_projector, moved_moments, randomised_vectors
from tests.peers.projected_methods import (
    B1,
    B2,
    SETTINGS,
    CommonChecks,
    adam_direction,
    gradients,
    oriented,
    run,
    same_signs,
)


class TestCommon(CommonChecks):
    make = staticmethod(adarankgrad)


def lost_share(G, P):
    return np.linalg.norm(G - P @ (P.T @ G)) ** 2 / np.linalg.norm(G) ** 2


def equations(grads, projectors, rank, every, alpha, eta, tolerance):
    """The blocks of the method with an exact SVD, and arrays that truly change their size."""
    P, found, ranks, renewals = None, [], [], []
    for t, G in enumerate(map(oriented, grads)):
        if t % every == 0 or np.linalg.norm(P.T @ G) < tolerance * reference:  # noqa: F821
            U = np.linalg.svd(G)[0]
            r = next((r for r in range(1, rank) if lost_share(G, U[:, :r]) <= eta), rank)
            new = same_signs(U[:, :r], projectors[t][:, :r])
            if P is None:
                mu = nu = np.zeros((r, G.shape[1]))
            else:
                C = new.T @ P
                mu, nu = C @ mu, C**2 @ nu
            P = new
            reference = np.linalg.norm(P.T @ G)  # noqa: F841
            renewals.append(t)
        R = P.T @ G
        mu, nu = B1 * mu + (1 - B1) * R, B2 * nu + (1 - B2) * R**2
        found.append(alpha * P @ adam_direction(mu, nu, t + 1))
        ranks.append(P.shape[1])
    return found, ranks, renewals


@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_the_paper_s_blocks(x64, shape):
    # Noise decides the rank, two or three; the gradient of step 2 is so small that the subspace
    # has converged.
    mixed = [0.0, 0.9, 0.0, 0.5, 4.0, 1.0, 1.0, 1.0, 0.0]
    noise = np.random.default_rng(1).normal(size=(9, *shape))
    grads = [
        (1e-3 if t == 2 else 1.0) * (G + 0.1 * m * e)
        for t, (G, m, e) in enumerate(
            zip(gradients(shape, 9, dtype=jnp.float64), mixed, noise, strict=True)
        )
    ]
    settings = {"eta": 0.02, "tolerance": 0.05, "scale": 0.25}
    tx = adarankgrad(0.1, 3, projected=True, update_every=4, **settings, **SETTINGS)
    updates, states = run(tx, jnp.zeros(shape, jnp.float64), grads)
    expected, ranks, renewals = equations(
        [np.asarray(G) for G in grads],
        [np.asarray(state.projector) for state in states],
        rank=3,
        every=4,
        alpha=0.25,
        eta=0.02,
        tolerance=0.05,
    )
    assert renewals == [0, 2, 4, 8]
    assert len(set(ranks)) > 1
    assert [int(state.rank) for state in states] == ranks
    for got, direction in zip(updates, expected, strict=True):
        np.testing.assert_allclose(
            oriented(np.asarray(got)), -0.1 * direction, rtol=1e-6, atol=1e-12
        )


@pytest.mark.parametrize("eta", [0.1, 1e-3])
def test_the_rank_is_the_smallest_that_reaches_the_threshold(eta):
    G = np.stack(gradients((12, 20), 4))
    G = G + 0.01 * np.random.default_rng(0).normal(size=G.shape).astype(np.float32)
    P, ranks = adaptive_projector(
        jnp.asarray(G),
        jnp.int32(3),
        rank=10,
        eta=eta,
    )
    for one, projector, r in zip(G, np.asarray(P), np.asarray(ranks), strict=True):
        U = np.linalg.svd(one)[0]
        assert lost_share(one, projector) <= eta * 1.001
        assert r == 1 or lost_share(one, U[:, : r - 1]) > eta
        assert not np.any(projector[:, r:])
        np.testing.assert_allclose(projector.T @ projector, np.diag(np.arange(10) < r), atol=1e-5)


def test_the_rank_stays_between_its_bounds():
    flat = jnp.eye(6, 9)
    thin = jnp.ones((6, 9))
    ranks = [
        int(adaptive_projector(G, jnp.int32(0), rank=4, eta=0.01)[1])
        for G in (flat, thin, jnp.zeros((6, 9)))
    ]
    assert ranks == [4, 1, 1]


def test_the_randomised_svd_finds_the_leading_subspace():
    rng = np.random.default_rng(0)
    U, _, Vt = np.linalg.svd(rng.normal(size=(40, 60)), full_matrices=False)
    G = jnp.asarray((U * 2.0 ** -np.arange(40)) @ Vt, jnp.float32)
    found, s = randomised_vectors(G, jax.random.key(0), 4, 4, 2)
    np.testing.assert_allclose(s, 2.0 ** -np.arange(4), rtol=1e-4)
    np.testing.assert_allclose(np.abs(np.sum(np.asarray(found) * U[:, :4], axis=0)), 1, rtol=1e-3)


def test_without_adapting_it_is_galore_until_the_subspace_changes():
    grads = gradients((4, 7), 5)
    one = adarankgrad(0.1, 2, projected=True, eta=0.0, tolerance=0.0)
    got, _ = run(one, jnp.zeros((4, 7)), grads)
    expected, _ = run(galore(0.1, 2, projected=True), jnp.zeros((4, 7)), grads)
    for mine, theirs in zip(got, expected, strict=True):  # a sign of P cancels
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-5)


def test_moments_survive_a_change_of_basis_of_the_same_subspace():
    rng = np.random.default_rng(0)
    P = np.linalg.qr(rng.normal(size=(6, 3)))[0]
    signed = P[:, [2, 0, 1]] * np.array([1.0, -1.0, 1.0])
    mu, nu = rng.normal(size=(3, 5)), rng.uniform(size=(3, 5))
    mu_new, nu_new = moved_moments(*map(jnp.asarray, (signed, P, mu, nu)))
    np.testing.assert_allclose(signed @ mu_new, P @ mu, atol=1e-5)
    np.testing.assert_allclose(nu_new, nu[[2, 0, 1]], atol=1e-5)
    other = np.linalg.qr(rng.normal(size=(6, 3)))[0]
    mu_new, nu_new = moved_moments(*map(jnp.asarray, (other, P, mu, nu)))
    np.testing.assert_allclose(mu_new, other.T @ P @ mu, atol=1e-5)
    assert np.all(nu_new >= 0)
    assert np.all(np.sum(nu_new, axis=0) <= np.sum(nu, axis=0) * 1.0001)


def test_only_the_converged_layer_is_renewed():
    first, second = gradients((2, 4, 7), 2)
    second = second.at[1].multiply(1e-3)
    tx = adarankgrad(0.1, 2, projected=True, tolerance=0.1)
    _, (before, after) = run(tx, jnp.zeros((2, 4, 7)), [first, second])
    np.testing.assert_array_equal(before.projector[0], after.projector[0])
    np.testing.assert_array_equal(before.norm[0], after.norm[0])
    assert not np.allclose(before.projector[1], after.projector[1], atol=0.1)
    assert float(after.norm[1]) < 0.01 * float(before.norm[1])
    _, (before, after) = run(
        adarankgrad(0.1, 2, projected=True, tolerance=0.0), jnp.zeros((2, 4, 7)), [first, second]
    )
    np.testing.assert_array_equal(before.projector, after.projector)


@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_updates_lie_in_the_subspace_of_the_adaptive_rank(shape):
    updates, states = run(
        adarankgrad(0.1, 3, projected=True, eta=0.1, update_every=2),
        jnp.zeros(shape),
        gradients(shape, 5),
    )
    for update, state in zip(updates, states, strict=True):
        P = np.asarray(state.projector)
        update = oriented(np.asarray(update))
        np.testing.assert_allclose(P @ P.T @ update, update, atol=1e-6)
        r = int(state.rank)
        assert 1 <= r < 3
        assert not np.any(np.asarray(state.mu)[r:])
        assert not np.any(np.asarray(state.nu)[r:])


def test_the_size_of_the_state():
    params = {"w": jnp.ones((3, 60, 40)), "b": jnp.ones(40)}
    spec = {"w": True, "b": False}
    sizes = [
        count_parameters(jax.eval_shape(make(0.1, 4, projected=spec).init, params))
        for make in (adarankgrad, galore)
    ]
    assert sizes[0] == sizes[1] + 2 * (3 + 1)  # a rank and a norm for each layer; placeholders


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eta": 1.0}, "eta must be at least 0 and below 1"),
        ({"tolerance": -0.1}, "tolerance must be at least 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        adarankgrad(0.1, 2, projected=True, **settings)
