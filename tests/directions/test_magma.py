"""Magma's mask: its average, the agreement against float64, and an untouched direction inside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loro_jax import LowRank, adam, loro, orthogonal
from loro_jax.directions.magma import magma
from loro_jax.directions.protocol import Direction
from loro_jax.pairs import pairs_of
from tests.directions.test_orthogonal import draw, gradients, pair

LAYERS = 40


def stacks():
    B, A = draw(0, LAYERS, 8, 3), draw(1, LAYERS, 3, 6)
    return {"w": LowRank(B, A)}


def run(direction, params, steps):
    found, state, moves = pairs_of(params), direction.init(params), []
    update = jax.jit(lambda g, s: direction.update(g, s, params, found))
    for seed in range(steps):
        grads = {"w": LowRank(*gradients(params["w"].B, params["w"].A, seed))}
        now, state = update(grads, state)
        moves.append((grads, now))
    return moves, state


def test_moments_are_those_without_the_mask_and_moves_are_scaled_or_zero():
    params = stacks()
    plain, kept = run(orthogonal(), params, 5)
    masked, state = run(magma(orthogonal()), params, 5)
    jax.tree.map(np.testing.assert_array_equal, state.inner, kept)
    ratios = []
    for (_, one), (_, other) in zip(plain, masked, strict=True):
        for side in ("B", "A"):
            x, y = np.float64(getattr(one["w"], side)), np.float64(getattr(other["w"], side))
            ratio = np.sum(x * y, axis=(1, 2)) / np.sum(x * x, axis=(1, 2))
            np.testing.assert_allclose(y, ratio[:, None, None] * x, atol=1e-6)
            ratios.append(ratio)
    ratios = np.array(ratios)
    # 400 draws: half of them, within four standard deviations.
    assert 0.4 < np.mean(ratios > 0) < 0.6
    # The mask is another one for each factor and step.
    assert len({tuple(row > 0) for row in ratios}) == len(ratios)
    assert np.all((ratios == 0) | ((ratios > 0.3) & (ratios < 0.7)))


def test_the_agreement_is_that_of_float64():
    params = stacks()
    moves, state = run(magma(orthogonal(0.9), tau=0.5), params, 3)
    mu, s = 0.0, 0.5
    for grads, _ in moves:
        g = np.float64(grads["w"].B)
        mu = 0.9 * mu + 0.1 * g
        norms = np.linalg.norm(mu, axis=(1, 2)) * np.linalg.norm(g, axis=(1, 2))
        s = 0.9 * s + 0.1 / (1 + np.exp(-np.sum(mu * g, axis=(1, 2)) / norms / 0.5))
    np.testing.assert_allclose(state.agreement["w"].B[:, 0, 0], s, rtol=1e-5)


def test_steps_of_loro_and_members_that_share_their_masks():
    B, A = pair()
    tx = loro(0.1, direction=magma(orthogonal(), seed=3), exact_every=2, moments="reset")

    def two_steps(scale):
        params = {"w": LowRank(B, A)}
        state = tx.init(params)
        for seed in (7, 8, 9):
            grads = {"w": LowRank(*gradients(B * scale, A, seed))}
            updates, state = tx.update(grads, state, params)
        return updates, state

    together, states = jax.jit(jax.vmap(two_steps))(jnp.array([1.0, 3.0]))
    np.testing.assert_array_equal(states.factors.key[0], states.factors.key[1])
    alone, state = jax.jit(two_steps)(jnp.float32(3.0))
    # An exact step resets moments, not the key.
    np.testing.assert_array_equal(state.factors.key, states.factors.key[0])
    np.testing.assert_allclose(together["w"].B[1], alone["w"].B, atol=1e-5)


def test_a_key_is_a_seed_too():
    params = stacks()
    states = [magma(orthogonal(), seed=seed).init(params) for seed in (5, jax.random.key(5), 6)]
    np.testing.assert_array_equal(states[0].key, states[1].key)
    assert np.any(states[0].key != states[2].key)


def test_adam_inside_is_masked_on_all_steps():
    direction = magma(adam(), keep=1.0)
    assert type(direction) is Direction
    (_, move), *_ = run(direction, stacks(), 1)[0]
    assert 0.4 < float(jnp.abs(move["w"].B).max()) < 0.7


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="magma: keep must be above 0 and at most 1, but is 0"):
        magma(orthogonal(), keep=0)
    with pytest.raises(ValueError, match="magma: tau must be above 0, but is -1"):
        magma(orthogonal(), tau=-1)
    direction = magma(Direction(lambda params: (), lambda *arguments: arguments[:2]))
    with pytest.raises(ValueError, match="must have mu, but is a tuple"):
        direction.init({})
