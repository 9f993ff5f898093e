"""GaLore against its equations in NumPy, optax.contrib and plain Adam."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loro_jax.memory import count_parameters
from loro_jax.peers.galore import galore
from tests.peers.projected_methods import (
    B1,
    B2,
    EPS,
    SETTINGS,
    CommonChecks,
    adam_direction,
    adam_in_numpy,
    gradients,
    oriented,
    run,
    same_signs,
)


class TestCommon(CommonChecks):
    make = staticmethod(galore)


def algorithm_2(grads, projectors, rank, every, alpha):
    """The paper's Algorithm 2; the given projectors lend their columns' signs."""
    mu = nu = 0.0
    found = []
    for t, G in enumerate(map(oriented, grads)):
        if t % every == 0:
            P = same_signs(np.linalg.svd(G)[0][:, :rank], projectors[t])
        R = P.T @ G
        mu, nu = B1 * mu + (1 - B1) * R, B2 * nu + (1 - B2) * R**2
        found.append(alpha * P @ adam_direction(mu, nu, t + 1))
    return found


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)])
def test_the_paper_s_algorithm(x64, shape):
    grads = gradients(shape, 7, dtype=jnp.float64)
    tx = galore(0.1, 2, projected=True, update_every=3, scale=0.25, **SETTINGS)
    updates, states = run(tx, jnp.zeros(shape, jnp.float64), grads)
    projectors = [np.asarray(state.projector) for state in states]
    expected = algorithm_2([np.asarray(G) for G in grads], projectors, 2, 3, 0.25)
    for got, direction in zip(updates, expected, strict=True):
        np.testing.assert_allclose(oriented(np.asarray(got)), -0.1 * direction, rtol=1e-7)


@pytest.mark.parametrize("rank", [2, 6])
def test_equals_optax_on_square_matrices(rank):
    """The only shape on which optax.contrib.galore projects the paper's side."""
    params = {"w": jnp.ones((6, 6)), "b": jnp.ones(6)}
    grads = [{"w": G, "b": G[0]} for G in gradients((6, 6), 7)]
    tx = galore(0.1, rank, projected={"w": True, "b": False}, update_every=3, weight_decay=0.01)
    theirs = optax.contrib.galore(0.1, rank, update_proj_gap=3, scale=0.25, weight_decay=0.01)
    for got, expected in zip(run(tx, params, grads)[0], run(theirs, params, grads)[0], strict=True):
        np.testing.assert_allclose(got["w"], expected["w"], rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(got["b"], expected["b"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_optax_projects_the_other_side(shape):
    """Why it is not wrapped; if this fails, Optax has changed and could be."""
    theirs = optax.contrib.scale_by_galore(rank=2).init(jnp.ones(shape))
    ours = galore(0.1, 2, projected=True).init(jnp.ones(shape))
    assert theirs.projector.shape == (7, 2)
    assert ours.projector.shape == (4, 2)
    with pytest.raises(ValueError, match="dimensions"):
        optax.contrib.scale_by_galore(
            rank=2, weight_dimension_numbers=optax.contrib.GaLoreDimensionNumbers(1, 2)
        ).init(jnp.ones((3, *shape)))


@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_updates_lie_in_the_leading_subspace(shape):
    grads = gradients(shape, 6)
    updates, states = run(galore(0.1, 2, projected=True, update_every=4), jnp.zeros(shape), grads)
    for t, (update, state) in enumerate(zip(updates, states, strict=True)):
        leading = np.linalg.svd(oriented(np.asarray(grads[t - t % 4])))[0][:, :2]
        inside = leading @ (leading.T @ oriented(np.asarray(update)))
        np.testing.assert_allclose(inside, oriented(np.asarray(update)), atol=1e-6)
        gram = np.asarray(state.projector).T @ np.asarray(state.projector)
        np.testing.assert_allclose(gram, np.eye(2), atol=1e-6)


def test_full_rank_is_adam_in_rotated_coordinates():
    grads = gradients((4, 7), 5)
    tx = galore(0.1, 4, projected=True, scale=0.5, update_every=100)
    updates, _ = run(tx, jnp.zeros((4, 7)), grads)
    Q = np.linalg.svd(np.asarray(grads[0]))[0]
    expected = adam_in_numpy([Q.T @ np.asarray(G) for G in grads])
    for got, direction in zip(updates, expected, strict=True):
        np.testing.assert_allclose(got, -0.05 * Q @ direction, rtol=1e-3, atol=1e-5)


def test_full_rank_equals_adam_up_to_the_scale_where_the_basis_is_the_axes():
    rows = np.array([4.0, 3.0, 2.0, 1.0])[:, None] * np.eye(4, 7)
    grads = [jnp.asarray(rows * factor, jnp.float32) for factor in (1.0, 0.5, -2.0, 1.0)]
    updates, _ = run(galore(0.1, 4, projected=True, scale=0.25), jnp.zeros((4, 7)), grads)
    expected, _ = run(optax.adam(0.1, B1, B2, EPS), jnp.zeros((4, 7)), grads)
    for got, adam in zip(updates, expected, strict=True):
        np.testing.assert_allclose(got, 0.25 * adam, rtol=1e-4, atol=1e-7)


def test_moments_are_kept_when_the_projector_changes():
    grads = gradients((4, 7), 3)
    _, states = run(galore(0.1, 2, projected=True, update_every=2), jnp.zeros((4, 7)), grads)
    before, after = states[1], states[2]
    assert not np.allclose(before.projector, after.projector, atol=0.1)
    R = np.asarray(after.projector).T @ np.asarray(grads[2])
    np.testing.assert_allclose(after.mu, B1 * before.mu + (1 - B1) * R, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(after.nu, B2 * before.nu + (1 - B2) * R**2, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_the_size_of_the_state(shape):
    params = {"w": jnp.ones((3, *shape)), "b": jnp.ones(40)}
    tx = galore(0.1, 4, projected={"w": True, "b": False})
    state = jax.eval_shape(tx.init, params)
    count_and_placeholder = 2
    each_layer = 40 * 4 + 2 * 4 * 60
    assert count_parameters(state) == 3 * each_layer + 2 * 40 + count_and_placeholder
