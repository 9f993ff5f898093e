"""Fira against its equations in NumPy, GaLore and plain Adam."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loro_jax.memory import count_parameters
from loro_jax.peers.fira import fira, limit_growth
from loro_jax.peers.galore import galore
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
    make = staticmethod(fira)


def equations(grads, projectors, rank, every, alpha, gamma):
    """Norm-based scaling and limiter; also says how often the limiter acted."""
    mu = nu = 0.0
    last, acted, found = None, 0, []
    for t, G in enumerate(map(oriented, grads)):
        if t % every == 0:
            P = same_signs(np.linalg.svd(G)[0][:, :rank], projectors[t])
        R = P.T @ G
        mu, nu = B1 * mu + (1 - B1) * R, B2 * nu + (1 - B2) * R**2
        N = adam_direction(mu, nu, t + 1)
        S = G - P @ R
        for j in range(S.shape[1]):
            S[:, j] *= np.linalg.norm(N[:, j]) / (np.linalg.norm(R[:, j]) + 1e-8)
        if last is not None and np.linalg.norm(S) / last > gamma:
            S, acted = S / np.linalg.norm(S) * gamma * last, acted + 1
        last = np.linalg.norm(S)
        found.append(alpha * P @ N + S)
    return found, acted


@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_the_paper_s_equations(x64, shape):
    grads = gradients(shape, 7, dtype=jnp.float64)
    tx = fira(0.1, 2, projected=True, update_every=3, **SETTINGS)
    updates, states = run(tx, jnp.zeros(shape, jnp.float64), grads)
    projectors = [np.asarray(state.projector) for state in states]
    expected, acted = equations(
        [np.asarray(G) for G in grads],
        projectors,
        rank=2,
        every=3,
        alpha=0.25,
        gamma=1.01,
    )
    assert 0 < acted < 6  # both branches of the limiter are met
    for got, direction in zip(updates, expected, strict=True):
        np.testing.assert_allclose(oriented(np.asarray(got)), -0.1 * direction, rtol=1e-7)


@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_inside_the_subspace_it_is_galore(shape):
    grads = gradients(shape, 5)
    settings = {"projected": True, "update_every": 3}
    updates, states = run(fira(0.1, 2, **settings), jnp.zeros(shape), grads)
    others, _ = run(galore(0.1, 2, **settings), jnp.zeros(shape), grads)
    for update, other, state in zip(updates, others, states, strict=True):
        P = np.asarray(state.projector)
        update, other = oriented(np.asarray(update)), oriented(np.asarray(other))
        np.testing.assert_allclose(P @ P.T @ update, other, rtol=1e-3, atol=1e-5)
        assert np.linalg.norm(update - other) > 1e-3


def test_full_rank_leaves_no_remainder():
    grads = gradients((4, 7), 4)
    updates, _ = run(fira(0.1, 4, projected=True), jnp.zeros((4, 7)), grads)
    expected, _ = run(galore(0.1, 4, projected=True), jnp.zeros((4, 7)), grads)
    for got, other in zip(updates, expected, strict=True):
        np.testing.assert_allclose(got, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("gamma", [1.01, 1.5])
def test_the_limiter_bounds_growth(gamma):
    tx = fira(1.0, 2, projected=True, gamma=gamma, update_every=100)
    grads = [G * 10.0**t for t, G in enumerate(gradients((3, 4, 7), 5))]
    updates, states = run(tx, jnp.zeros((3, 4, 7)), grads)
    norms = np.stack([state.norm for state in states])
    assert np.all(norms[1:] <= gamma * norms[:-1] * (1 + 1e-5))
    for update, state in zip(updates, states, strict=True):
        P = np.asarray(state.projector)
        outside = update - P @ (P.mT @ np.asarray(update))
        np.testing.assert_allclose(np.linalg.norm(outside, axis=(1, 2)), state.norm, rtol=1e-3)


def test_the_limiter_keeps_what_grows_less():
    S = jnp.array([[[3.0, 4.0]], [[3.0, 4.0]], [[3.0, 4.0]], [[0.0, 0.0]]])
    limited, norm = limit_growth(S, jnp.array([0.0, 4.96, 4.0, 4.0]), 1.01)
    np.testing.assert_allclose(norm, [5.0, 5.0, 4.04, 0.0], rtol=1e-6)
    np.testing.assert_allclose(limited[:, 0, 0], [3.0, 3.0, 3 * 4.04 / 5, 0.0], rtol=1e-6)


def test_the_size_of_the_state():
    params = {"w": jnp.ones((3, 60, 40)), "b": jnp.ones(40)}
    spec = {"w": True, "b": False}
    sizes = [
        count_parameters(jax.eval_shape(make(0.1, 4, projected=spec).init, params))
        for make in (fira, galore)
    ]
    assert sizes[0] == sizes[1] + 3 + 1  # a norm for each layer, and a placeholder


def test_bad_settings():
    with pytest.raises(ValueError, match="gamma must be at least 1"):
        fira(0.1, 2, projected=True, gamma=0.9)
