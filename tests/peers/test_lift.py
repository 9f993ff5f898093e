"""LIFT against its equations in NumPy, AdamW, and what it must leave alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loro_jax.memory import count_bytes
from loro_jax.peers.lift import lift, principal_entries, scale_by_lift
from loro_jax.planning.memory_table import held_by
from loro_jax.training.config import Config
from loro_jax.training.methods import make_optimizer
from models import preset
from tests.peers.projected_methods import EPS, adam_direction, run

B1, B2 = 0.9, 0.999
SETTINGS = {"b1": B1, "b2": B2, "eps": EPS}


def draws(shape, steps, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(steps)]


def chosen(W, count, rank):
    U, s, Vt = np.linalg.svd(W, full_matrices=False)
    return np.sort(np.argsort(-np.abs((U[:, :rank] * s[:rank]) @ Vt[:rank]).ravel())[:count])


def algorithm(W, grads, count, rank, every, lr, decay):
    """The weights after each step, and which entries were trained."""
    m = np.zeros(W.size)  # of all entries; zero where none is chosen
    v, W = m.copy(), W.copy()
    for t, G in enumerate(grads):
        if t % every == 0:
            at = chosen(W, count, rank)
            stays = np.isin(np.arange(W.size), at)
            m, v = m * stays, v * stays
        g = np.ravel(G)[at]
        m[at], v[at] = B1 * m[at] + (1 - B1) * g, B2 * v[at] + (1 - B2) * g**2
        direction = adam_direction(m[at], v[at], t + 1) + decay * W.ravel()[at]
        flat = W.ravel().copy()
        flat[at] -= lr * direction
        W = flat.reshape(W.shape)
        yield W, at


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
def test_the_paper_s_algorithm(x64, shape):
    (start,), grads = draws((2, *shape), 1, 1, jnp.float64), draws((2, *shape), 7, 2, jnp.float64)
    settings = {"filter_rank": 2, "update_every": 3, "weight_decay": 0.1}
    tx = lift(0.5, 1, projected=True, **settings, **SETTINGS)
    params, state, update = start, tx.init(start), jax.jit(tx.update)
    expected = [
        list(algorithm(np.asarray(start[i]), [np.asarray(G[i]) for G in grads], 13, 2, 3, 0.5, 0.1))
        for i in range(2)
    ]
    for t, G in enumerate(grads):
        updates, state = update(G, state, params)
        params = optax.apply_updates(params, updates)
        for layer in range(2):
            W, at = expected[layer][t]
            np.testing.assert_allclose(params[layer], W, rtol=1e-9, atol=1e-11)
            assert np.count_nonzero(updates[layer]) == len(at) == 13
    # Some entries go and some stay, otherwise nothing is shown.
    (_, first), (_, last) = expected[0][0], expected[0][-1]
    assert 0 < len(np.intersect1d(first, last)) < 13


def test_entries_that_are_not_chosen_stay_to_the_bit():
    (W,), grads = draws((6, 9), 1), draws((6, 9), 4, 1)
    tx = lift(0.1, 2, projected=True, filter_rank=2, update_every=10)
    updates, states = run(tx, W, grads)
    after = W
    for update in updates:
        after = optax.apply_updates(after, update)
    at = chosen(np.asarray(W, np.float64), 30, 2)
    same = np.ravel(W) == np.ravel(after)
    np.testing.assert_array_equal(np.flatnonzero(~same), at)
    np.testing.assert_array_equal(
        optax.tree_utils.tree_get(states[0], "entries"), principal_entries(W, 30, 2)
    )


@pytest.mark.parametrize("filter_rank", [6, 128])
def test_of_the_full_rank_the_largest_entries_are_taken(filter_rank):
    (W,) = draws((3, 6, 9), 1)
    found = principal_entries(W, 20, filter_rank)
    for layer in range(3):
        largest = np.argsort(-np.abs(np.ravel(W[layer])))[:20]
        np.testing.assert_array_equal(found[layer], np.sort(largest))


def test_with_all_entries_it_is_adamw():
    params = {"w": draws((6, 9), 1)[0], "b": jnp.ones(3)}
    grads = [{"w": G, "b": G[0, :3]} for G in draws((6, 9), 5, 1)]
    tx = lift(0.1, 4, projected={"w": True, "b": False}, update_every=2, weight_decay=0.1)
    found, _ = run(tx, params, grads)
    expected, _ = run(optax.adamw(0.1, 0.9, 0.95, 1e-6, weight_decay=0.1), params, grads)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one["w"], other["w"], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(one["b"], other["b"], rtol=1e-5)


def test_dtypes_and_a_stable_state():
    params = {"w": jnp.ones((2, 6, 9), jnp.bfloat16), "b": jnp.ones(3, jnp.bfloat16)}
    tx = lift(optax.linear_schedule(0.1, 0.0, 10), 1, projected=lambda p: {"w": True, "b": False})
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(updates))
    of_projections = state.inner_states["projections"]
    # 15 entries in each of two layers: indices and moments; and two counts.
    assert count_bytes(of_projections) == 4 * (2 * 3 * 15 + 2)
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
    outside = {equation.primitive.name for equation in jaxpr.jaxpr.eqns}
    assert "top_k" not in outside
    assert "top_k[" in str(jaxpr)


def test_the_trainer_s_options_and_what_it_holds():
    config = Config(method="lift", exact_every=4, model=preset("tiny", rank=4))
    others = held_by(Config(method="full", model=config.model)).optimizer
    others -= 2 * 4 * 2 * (4 * 32 * 32 + 3 * 32 * 48)
    entries = 2 * 4 * (4 * (32 + 32) + 3 * (32 + 48))
    assert held_by(config).optimizer - others == pytest.approx(4 * 3 * entries, abs=4 * 10)
    params = {"blocks": {"W": draws((2, 8, 9), 1)[0]}}
    moves = []
    for filter_rank in (1, 2):
        tx = make_optimizer(
            Config(**{**vars(config), "method_options": {"filter_rank": filter_rank}})
        )
        updates, _ = tx.update(params, tx.init(params), params)
        moves.append(np.asarray(updates["blocks"]["W"]) != 0)
    assert moves[0].sum() == moves[1].sum() == 2 * 4 * (8 + 9)
    assert (moves[0] != moves[1]).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1, is 0"),
        ({"rank": 1, "filter_rank": 1.5}, "filter_rank must be a whole number"),
        ({"rank": 1, "update_every": True}, "update_every must be a whole number"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        scale_by_lift(**settings)


def test_what_it_needs_is_named():
    tx = scale_by_lift(1)
    with pytest.raises(ValueError, match=r"leaf \['b'\] has shape \(3,\)"):
        tx.init({"b": jnp.ones(3)})
    with pytest.raises(ValueError, match="needs params"):
        tx.update(jnp.ones((3, 4)), tx.init(jnp.ones((3, 4))))
