"""GradNormLoRP against its equations in NumPy, the chain rule, and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loro_jax.memory import count_bytes, footprint
from loro_jax.peers.gradnormlorp import directions, gradnormlorp, row_norms, split_gradient
from tests.peers.projected_methods import (
    B1,
    B2,
    EPS,
    SETTINGS,
    CommonChecks,
    adam_direction,
    gradients,
    oriented,
    run,
    same_signs,
)


def weight(shape, dtype=jnp.float32):
    """A weight whose rows have lengths from 0.5 to 1.5."""
    rng = np.random.default_rng(7)
    W = rng.normal(size=shape)
    lengths = np.linspace(0.5, 1.5, shape[-2])[:, None]
    return jnp.asarray(lengths * W / np.linalg.norm(W, axis=-1, keepdims=True), dtype)


def away_from_zero(*arguments, **settings):
    """The same, of parameters to which a weight is added: some common checks begin at zero."""
    tx = gradnormlorp(*arguments, **settings)

    def shifted(params):
        move = lambda p: p + weight(p.shape[-2:], p.dtype) if p.ndim >= 2 else p  # noqa: E731
        return None if params is None else jax.tree.map(move, params)

    return optax.GradientTransformationExtraArgs(
        lambda params: tx.init(shifted(params)),
        lambda grads, state, params=None, **more: tx.update(grads, state, shifted(params), **more),
    )


@pytest.mark.slow
class TestCommon(CommonChecks):
    make = staticmethod(away_from_zero)

    def test_bfloat16_is_computed_in_float32(self):
        """One step: the next one begins at rounded weights."""
        tx = gradnormlorp(0.1, 2, projected={"w": True})
        narrow, G = ({"w": x} for x in (weight((4, 6), jnp.bfloat16), gradients((4, 6), 1)[0]))
        wide = jax.tree.map(lambda p: p.astype(jnp.float32), narrow)
        (got,), (state,) = run(tx, narrow, [G])
        (expected,), (other,) = run(tx, wide, [G])
        np.testing.assert_array_equal(got["w"], expected["w"].astype(jnp.bfloat16))
        for one, same in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(one, same)

    def test_schedule_and_decoupled_decay(self):
        params = {"w": weight((4, 6)), "b": jnp.full(3, 2.0)}
        schedule = lambda count: 0.5 / (count + 1)  # noqa: E731
        spec = {"w": True, "b": False}
        tx = gradnormlorp(schedule, 2, projected=spec, weight_decay=0.1)
        # Without a gradient all that is left is the decay, of W as of other leaves.
        still = jax.tree.map(jnp.zeros_like, params)
        state = tx.init(params)
        for rate in (0.5, 0.25):
            updates, state = jax.jit(tx.update)(still, state, params)
            for name, p in params.items():
                np.testing.assert_allclose(updates[name], -rate * 0.1 * p, rtol=1e-4, atol=1e-7)
            params = optax.apply_updates(params, updates)
        with pytest.raises(ValueError, match="needs params"):
            tx.update(still, state)

    def test_zero_gradients_do_no_harm(self):
        tx = gradnormlorp(0.1, 2, projected=True, update_every=2)
        grads = [jnp.zeros((4, 6)), *gradients((4, 6), 3), jnp.zeros((4, 6))]
        updates, states = run(tx, weight((4, 6)), grads)
        # g = |v|: the weight of the parametrisation is the weight.
        np.testing.assert_allclose(updates[0], 0, atol=1e-6)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, states)))


def weight_of(g, v):
    return g * v / jnp.linalg.norm(v, axis=-1, keepdims=True)


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (3, 4, 7)])
def test_gradients_are_those_of_the_parametrisation(x64, shape):
    rng = np.random.default_rng(1)
    G, v = (jnp.asarray(rng.normal(size=shape)) for _ in range(2))
    g = jnp.asarray(rng.normal(size=(*shape[:-1], 1)))
    assert (g < 0).any()
    expected = jax.grad(lambda g, v: jnp.sum(G * weight_of(g, v)), (0, 1))(g, v)
    W, norm = weight_of(g, v), row_norms(v)
    u = directions(W, g)
    np.testing.assert_allclose(norm * u, v, rtol=1e-12)
    for mine, theirs in zip(split_gradient(G, u, g, norm), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-10, atol=1e-12)


def paper(W, grads, states, rank, every, alpha, decay=0.0, rate=0.1):
    """The rule with v kept, by Adam on g and in the subspace of v; W after each step."""
    g, v = np.linalg.norm(W, axis=-1, keepdims=True), W.copy()
    tall = W.shape[0] > W.shape[1]
    mu = nu = mu_g = nu_g = 0.0
    found = []
    for t, G in enumerate(grads):
        norm = np.linalg.norm(v, axis=-1, keepdims=True)
        dg = np.sum(G * v / norm, axis=-1, keepdims=True)
        dv = oriented(g / norm * (G - dg * v / norm))
        if t % every == 0:
            P = same_signs(np.linalg.svd(dv)[0][:, :rank], np.asarray(states[t].projector))
        R = P.T @ dv
        mu, nu = B1 * mu + (1 - B1) * R, B2 * nu + (1 - B2) * R**2
        mu_g, nu_g = B1 * mu_g + (1 - B1) * dg, B2 * nu_g + (1 - B2) * dg**2
        D = P @ adam_direction(mu, nu, t + 1)
        v = v - rate * alpha * (D.T if tall else D)
        g = g - rate * (adam_direction(mu_g, nu_g, t + 1) + decay * g)
        found.append((g * v / np.linalg.norm(v, axis=-1, keepdims=True), g, v))
    return found


CASES = [
    ((4, 7), 2, 0.25, 0.0),
    ((7, 4), 2, 0.25, 0.1),
    ((4, 7), 4, 1.0, 0.0),  # full rank: Adam on (g, v) in the coordinates of the singular vectors
]


@pytest.mark.parametrize(("shape", "rank", "alpha", "decay"), CASES)
def test_the_paper_s_rule(x64, shape, rank, alpha, decay):
    """Over two refreshes."""
    W, grads = weight(shape, jnp.float64), gradients(shape, 8, dtype=jnp.float64)
    tx = gradnormlorp(
        0.1,
        rank,
        projected=True,
        update_every=3,
        scale=alpha,
        weight_decay=decay,
        **SETTINGS,
    )
    updates, states = run(tx, W, grads)
    expected = paper(np.asarray(W), list(map(np.asarray, grads)), states, rank, 3, alpha, decay)
    for update, state, (after, g, v) in zip(updates, states, expected, strict=True):
        W = W + update
        np.testing.assert_allclose(W, after, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(state.magnitude, g, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(state.norm[:, 0], np.linalg.norm(v, axis=-1), rtol=1e-7)


def test_a_magnitude_that_changes_its_sign_turns_the_row_round(x64):
    W = jnp.array([[0.15, 0.0, 0.0], [0.0, 1.0, 0.0]])
    grads = [W / row_norms(W)] * 4
    tx = gradnormlorp(0.1, 2, projected=True, **SETTINGS)
    updates, states = run(tx, W, grads)
    np.testing.assert_allclose(states[-1].magnitude[:, 0], [-0.25, 0.6], atol=1e-6)
    # The gradient is along v, and v has no reason to move.
    np.testing.assert_allclose(states[-1].norm, row_norms(W), atol=1e-9)
    np.testing.assert_allclose(W + sum(updates), [[-0.25, 0, 0], [0, 0.6, 0]], atol=1e-6)


def test_full_rank_equals_adam_on_both_where_the_basis_is_the_axes(x64):
    """By optax.adam on a tree of g and v, differentiated by JAX; rows without common columns."""
    shape = (3, 9)
    mask = np.kron(np.eye(3), np.ones((1, 3)))
    W = weight(shape, jnp.float64) * mask
    sizes = np.array([9.0, 3.0, 1.0])[:, None]
    rng = np.random.default_rng(2)
    grads = [jnp.asarray(sizes * mask * rng.normal(size=shape)) for _ in range(6)]
    tx = gradnormlorp(0.01, 3, projected=True, update_every=100, scale=1.0, **SETTINGS)
    updates, states = run(tx, W, grads)
    np.testing.assert_allclose(np.abs(states[0].projector), np.eye(3), atol=1e-12)

    pair, theirs = {"g": row_norms(W), "v": W}, optax.adam(0.01, B1, B2, EPS)
    state = theirs.init(pair)
    for G, update in zip(grads, updates, strict=True):
        chain = jax.grad(lambda p, G=G: jnp.sum(G * weight_of(p["g"], p["v"])))(pair)
        move, state = theirs.update(chain, state, pair)
        pair, W = optax.apply_updates(pair, move), W + update
        # Entries without a gradient are 0 up to rounding, which epsilon keeps small.
        np.testing.assert_allclose(W, weight_of(**pair), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_the_size_of_the_state(shape):
    params = {"w": jnp.ones((3, *shape)), "b": jnp.ones(40)}
    tx = gradnormlorp(0.1, 4, projected={"w": True, "b": False})
    state = jax.eval_shape(tx.init, params)
    of_galore = 40 * 4 + 2 * 4 * 60
    rows = 4 * shape[0]
    count_and_placeholders = 6
    entries = 3 * (of_galore + rows) + 2 * 40 + count_and_placeholders
    assert footprint(params, state).optimizer_bytes == count_bytes(state) == 4 * entries


def test_bfloat16_weights_follow_magnitudes_that_move_by_less_than_their_precision():
    W = jnp.asarray(weight((4, 6)), jnp.bfloat16)
    start = row_norms(W.astype(jnp.float32))
    grads = [jnp.asarray(W / start.astype(W.dtype))] * 100
    updates, states = run(gradnormlorp(1e-4, 2, projected=True), W, grads)
    for update in updates:
        W = W + update
    # A hundred steps of 1e-4; the precision of a bfloat16 of 1 is 4e-3 to 8e-3.
    np.testing.assert_allclose(states[-1].magnitude, start - 0.01, rtol=1e-3)
    np.testing.assert_allclose(row_norms(W.astype(jnp.float32)), start - 0.01, rtol=4e-3)


def test_a_row_of_zeros_stays_one():
    W = weight((4, 6)).at[1].set(0)
    updates, states = run(gradnormlorp(0.1, 2, projected=True), W, gradients((4, 6), 3))
    assert not np.any([update[1] for update in updates])
    assert np.isfinite(states[-1].norm).all()
