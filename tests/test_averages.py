"""Averages of parameters across exact steps, beside averages of the products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loro_jax import LowRank, adam, exact_update, initialise, loro
from loro_jax.exact import METHODS
from loro_jax.exact.basis import nearest_order

STEPS = 300


@functools.cache
def problem():
    keys = jax.random.split(jax.random.key(5), 3)
    W = jax.random.normal(keys[0], (12, 3)) @ jax.random.normal(keys[1], (3, 10)) / 2
    return W, LowRank(*initialise(keys[2], 12, 10, 3))


def loss(pair):
    return jnp.mean((pair.product() - problem()[0]) ** 2)


def base(basis="singular"):
    rate = optax.cosine_decay_schedule(0.1, STEPS)
    return loro(rate, exact_every=20, basis=basis, max_move=0.1)


def trained(tx, params, point, evaluate):
    """The last parameters and their average, and by how much it misses that of the products."""

    def step(carry, _):
        params, state, ema, products = carry
        updates, state = tx.update(jax.grad(loss)(point(params)), state, params)
        params = optax.apply_updates(params, updates)
        ema = optax.incremental_update(point(params), ema, 0.05)
        products = optax.incremental_update(point(params).product(), products, 0.05)
        missed = jnp.linalg.norm(ema.product() - products) / jnp.linalg.norm(products)
        return (params, state, ema, products), missed

    start = point(params)
    carry = (params, tx.init(params), start, start.product())
    (params, state, ema, _), missed = jax.lax.scan(step, carry, length=STEPS)
    return float(loss(evaluate(params, state))), float(loss(ema)), np.asarray(missed)


@pytest.mark.parametrize("basis", ["singular", "nearest"])
def test_an_average_of_factors_ends_where_the_run_does(basis):
    last, ema, missed = trained(base(basis), problem()[1], lambda p: p, lambda p, _: p)
    assert last < 1e-6
    assert ema < 1e-4
    # Later exact steps are no worse for it than the steps between.
    assert missed[-100:].max() < 0.05


def test_lookahead_ends_where_the_run_does():
    start = optax.LookaheadParams.init_synced(problem()[1])
    point = lambda p: p.fast  # noqa: E731
    last, _, _ = trained(optax.lookahead(base(), 7, 0.5), start, point, lambda p, _: p.slow)
    assert last < 1e-4


def test_a_schedule_free_run_arrives():
    inner = loro(0.05, exact_every=20, direction=adam(b1=0.0), max_move=0.1)
    tx = optax.contrib.schedule_free(inner, 0.05, b1=0.9)
    evaluate = lambda p, s: optax.contrib.schedule_free_eval_params(s, p)  # noqa: E731
    last, _, _ = trained(tx, problem()[1], lambda p: p, evaluate)
    assert last < 0.02 * float(loss(problem()[1]))


@pytest.mark.parametrize("method", METHODS)
def test_singular_factors_keep_signs_and_order_through_a_short_step(method):
    rng = np.random.default_rng(0)
    U, V = (np.linalg.qr(rng.normal(size=(k, 5)))[0] for k in (12, 9))
    root = np.sqrt([1.0, 5.0, 2.0, 4.0, 3.0]) * [1, -1, 1, 1, -1]
    B, A = jnp.array(U * root, jnp.float32), jnp.array((V * root).T, jnp.float32)
    G = 1e-3 * rng.normal(size=(12, 9))
    batch = [jnp.stack([x, x]) for x in (B, A, jnp.array(G @ A.T), jnp.array(B.T @ G))]
    step = jax.jit(functools.partial(exact_update, method=method, learning_rate=1.0))
    B_new, A_new = step(*(x.astype(jnp.float32) for x in batch))
    np.testing.assert_allclose(B_new, batch[0], atol=0.02)
    np.testing.assert_allclose(A_new, batch[1], atol=0.02)
    # The basis is still that of singular vectors.
    gram = B_new[0].T @ B_new[0]
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-4)


def test_the_order_is_one_whatever_the_overlaps():
    rng = np.random.default_rng(0)
    order = rng.permutation(6)
    signs = np.where(rng.random(6) < 0.5, -1.0, 1.0)
    overlap = np.zeros((6, 6))
    overlap[order, np.arange(6)] = signs * np.arange(1, 7)
    found = nearest_order(jnp.array(overlap + 0.1 * rng.normal(size=(6, 6))))
    np.testing.assert_array_equal(found.order, order)
    np.testing.assert_array_equal(found.signs, signs)
    for other in (
        np.zeros((6, 6)),
        np.full((6, 6), np.nan),
        np.ones((6, 6)),
        np.diag([np.inf] * 6),
    ):
        found = nearest_order(jnp.array(other))
        assert sorted(found.order.tolist()) == list(range(6))
        assert set(np.abs(found.signs).tolist()) == {1.0}
