"""Moments carried through exact steps by a rule that does not depend on the basis."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loro_jax import LowRank, adam, exact_update, loro, riemannian_gradient
from loro_jax.exact import basis
from loro_jax.exact.transport import transport_moments
from tests.exact.test_tangent import random_pair, tangent_projection
from tests.helpers import member, some_fast


def problem(signs, seed=0):
    """A regression whose pair is represented with the given signs of the inner index."""
    rng = np.random.default_rng(seed)
    B, A = rng.normal(size=(10, 4)), rng.normal(size=(4, 8))
    x, y = rng.normal(size=(40, 8)), rng.normal(size=(40, 10))
    pair = LowRank(jnp.array(B * signs), jnp.array(signs[:, None] * A))
    params = {"pair": pair, "bias": jnp.zeros(10)}

    def loss(params):
        return jnp.mean((jnp.tanh(params["pair"].apply(x)) + params["bias"] - y) ** 2)

    return params, loss


def trajectory(signs, moments, steps=50):
    params, loss = problem(signs)
    tx = loro(0.02, exact_every=9, moments=moments, exact_method="svd")

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, products = tx.init(params), []
    for _ in range(steps):
        params, state = step(params, state)
        products.append(np.asarray(params["pair"].product()))
    assert step._cache_size() == 1
    return np.array(products), state, float(loss(params))


SIGNS = (np.ones(4), np.array([1.0, -1.0, -1.0, 1.0]))


@pytest.mark.parametrize(
    "moments",
    some_fast(["transport", "reset", "reset_factors", "keep"], ["transport", "reset", "keep"]),
)
def test_runs_from_two_representations_keep_equal_products(x64, moments):
    """Fifty steps across five exact ones."""
    one, _, _ = trajectory(SIGNS[0], moments)
    other, _, _ = trajectory(SIGNS[1], moments)
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_old_moments_would_not_fit_a_basis_of_arbitrary_signs(x64, monkeypatch):
    """The control: what the test above would see if signs did not follow the old factors."""

    def as_they_come(overlap):
        r = len(overlap)
        return jnp.arange(r), jnp.ones(r, overlap.dtype)

    monkeypatch.setattr(basis, "nearest_order", as_they_come)
    jax.clear_caches()  # exact steps are traced once a process
    one, _, _ = trajectory(SIGNS[0], "keep")
    other, _, _ = trajectory(SIGNS[1], "keep")
    jax.clear_caches()
    assert np.max(np.abs(one - other)) > 1e-3


def test_transport_keeps_the_count_and_differs_from_no_refresh(x64):
    transported, state, _ = trajectory(SIGNS[0], "transport")
    kept, _, _ = trajectory(SIGNS[0], "keep")
    assert int(state.factors.count) == 50
    np.testing.assert_allclose(transported[:9], kept[:9], rtol=1e-9)
    assert np.max(np.abs(transported[9:] - kept[9:])) > 1e-3


def test_first_moments_are_those_of_the_projected_average_gradient(x64):
    B, A, G = random_pair(12, 9, 3)
    mu = (jnp.array(G @ A.T), jnp.array(B.T @ G))
    new = exact_update(jnp.array(B), jnp.array(A), *mu, 0.3)
    nu = tuple(m**2 for m in mu)
    (mu_B, mu_A), _ = transport_moments((jnp.array(B), jnp.array(A)), new, mu, nu)
    T = tangent_projection(B @ A, 3, G)
    np.testing.assert_allclose(mu_B, T @ new[1].T, atol=1e-10)
    np.testing.assert_allclose(mu_A, new[0].T @ T, atol=1e-10)


def test_moments_of_an_unmoved_pair_stay(x64):
    B, A, G = random_pair(12, 9, 3)
    old = (jnp.array(B), jnp.array(A))
    mu = (jnp.array(G @ A.T), jnp.array(B.T @ G))
    nu = (jnp.array(np.abs(B)), jnp.array(np.abs(A)))
    same_mu, same_nu = transport_moments(old, old, mu, nu)
    for found, expected in zip((*same_mu, *same_nu), (*mu, *nu), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-10)


def test_second_moments_stay_positive_and_follow_a_permutation(x64):
    B, A, _ = random_pair(12, 9, 3)
    order = np.array([2, 0, 1])
    old, new = (jnp.array(B), jnp.array(A)), (jnp.array(B[:, order]), jnp.array(A[order]))
    nu = (jnp.array(B**2), jnp.array(A**2))
    _, (nu_B, nu_A) = transport_moments(old, new, old, nu)
    np.testing.assert_allclose(nu_B, nu[0][:, order], atol=1e-10)
    np.testing.assert_allclose(nu_A, nu[1][order], atol=1e-10)


def test_batches_are_transported_pair_by_pair(x64):
    pairs = [random_pair(12, 9, 3, seed=i) for i in range(3)]
    B, A, G = (np.stack(side) for side in zip(*pairs, strict=True))
    mu = (G @ A.swapaxes(-1, -2), B.swapaxes(-1, -2) @ G)
    old = tuple(jnp.array(x) for x in (B, A))
    mu = tuple(jnp.array(x) for x in mu)
    new = exact_update(*old, *mu, 0.1)
    together = transport_moments(old, new, mu, tuple(m**2 for m in mu))
    for i in range(3):
        alone = transport_moments(*member(i, (old, new, mu, tuple(m**2 for m in mu))))
        chex.assert_trees_all_close(member(i, together), alone, rtol=0, atol=1e-10)


def deficient(kind, seed=0):
    """A pair without its rank, in float64; its product may still be anything but zero."""
    B, A, G = random_pair(12, 9, 3, seed=seed)
    if kind in ("B", "both"):
        B[:, 1] = 2 * B[:, 0]
    if kind in ("A", "both"):
        A[2] = 0
    if kind == "no B":
        B[:] = 0
    return B, A, G


def projection_of_any_rank(B, A, G):
    """On the columns of B and the rows of A."""
    P_U, P_V = B @ np.linalg.pinv(B, rcond=1e-10), np.linalg.pinv(A, rcond=1e-10) @ A
    return P_U @ G + (np.eye(len(B)) - P_U) @ G @ P_V


@pytest.mark.parametrize("kind", ["none", "B", "A", "both", "no B"])
def test_factors_without_their_rank(x64, kind):
    """Moments of the average gradient's projection, and no first moment without a second."""
    B, A, G = deficient(kind)
    T = projection_of_any_rank(B, A, G)
    mu = (jnp.array(G @ A.T), jnp.array(B.T @ G))
    old = (jnp.array(B), jnp.array(A))
    np.testing.assert_allclose(riemannian_gradient(*old, *mu), T, atol=1e-9)
    new = exact_update(*old, *mu, 0.3)
    (mu_B, mu_A), nu = transport_moments(old, new, mu, tuple(m**2 for m in mu))
    np.testing.assert_allclose(mu_B, T @ new[1].T, atol=1e-9)
    np.testing.assert_allclose(mu_A, new[0].T @ T, atol=1e-9)
    # A sum of r + 1 squares of parts: at most that many times the sum of the squares.
    for m, v in zip((mu_B, mu_A), nu, strict=True):
        assert np.all(m**2 <= 4 * v + 1e-16)


def test_a_batch_of_which_one_lacks_rank(x64):
    pairs = [deficient("none", 1), deficient("both", 2)]
    B, A, G = (jnp.array(np.stack(side)) for side in zip(*pairs, strict=True))
    mu = (G @ A.mT, B.mT @ G)
    new = exact_update(B, A, *mu, 0.1)
    ((mu_B, _),) = transport_moments((B, A), new, mu)
    for i, pair in enumerate(pairs):
        T = projection_of_any_rank(*pair)
        np.testing.assert_allclose(mu_B[i], T @ new[1][i].T, atol=1e-9)


def test_runs_from_factors_of_rank_zero_and_one():
    """LoRA's start, whose B is zero, and constant factors, across exact steps."""
    params, loss = problem(np.ones(4))
    shapes = params["pair"].B.shape, params["pair"].A.shape
    tx = loro(0.02, exact_every=4, moments="transport", max_move=0.5)

    @jax.jit
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), loss(params)

    for B in (jnp.zeros(shapes[0]), jnp.full(shapes[0], 0.3)):
        start = {**params, "pair": LowRank(B, jnp.full(shapes[1], 0.3).at[0].set(0.1))}
        (_, _), losses = jax.lax.scan(step, (start, tx.init(start)), length=30)
        assert losses[-1] < 0.9 * losses[0]


@pytest.mark.slow
def test_transport_needs_moments(x64):
    params, loss = problem(SIGNS[0])
    with pytest.raises(ValueError, match=r"needs a direction whose state has mu .* EmptyState"):
        loro(0.1, moments="transport", direction=optax.identity()).init(params)
    tx = loro(0.1, moments="transport", exact_every=1, direction=optax.scale_by_adam())
    _, state = tx.update(jax.grad(loss)(params), tx.init(params), params)
    own = loro(0.1, moments="transport", exact_every=1, direction=adam(eps=1e-8))
    _, expected = own.update(jax.grad(loss)(params), own.init(params), params)
    np.testing.assert_allclose(state.factors.mu["pair"].B, expected.factors.mu["pair"].B, rtol=1e-3)
