"""Steps that keep norms: of products and matrices, through exact steps, and the way they go."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loro_jax import LowRank, loro, orthogonal
from loro_jax.directions.constant_norms import with_constant_norms
from loro_jax.peers import muon
from tests.directions.test_orthogonal import draw


def norms(W):
    return np.linalg.norm(np.float64(W), axis=(-2, -1))


@pytest.mark.parametrize("exact_every", [None, 2])
def test_products_keep_their_norms_and_move_by_the_plain_step_scaled_back(exact_every):
    params = {"w": LowRank(draw(0, 3, 12, 4), draw(1, 3, 4, 9)), "bias": jnp.ones((2, 3))}
    inner = loro(0.3, direction=orthogonal(), exact_every=exact_every, basis="nearest")
    tx = with_constant_norms(inner)
    state, start = tx.init(params), norms(params["w"].product())
    update, plainly = jax.jit(tx.update), jax.jit(inner.update)
    for seed in range(4):
        keys = [10 * seed + i for i in range(3)]
        grads = {
            "w": LowRank(draw(keys[0], 3, 12, 4), draw(keys[1], 3, 4, 9)),
            "bias": draw(keys[2], 2, 3),
        }
        plain, _ = plainly(grads, state, params)
        updates, state = update(grads, state, params)
        np.testing.assert_array_equal(plain["bias"], updates["bias"])
        expected = np.float64(optax.apply_updates(params, plain)["w"].product())
        params = optax.apply_updates(params, updates)
        found = np.float64(params["w"].product())
        np.testing.assert_allclose(norms(found), start, rtol=1e-5)
        expected *= (start / norms(expected))[:, None, None]
        np.testing.assert_allclose(found, expected, atol=1e-5 * start.max())


def test_chosen_matrices_keep_their_norms():
    params = {"w": draw(0, 2, 6, 4), "embedding": draw(1, 5, 4), "zero": jnp.zeros((3, 3))}
    chosen = {"w": True, "embedding": False, "zero": True}
    tx = with_constant_norms(muon(0.1, projected=chosen), lambda params: chosen)
    grads = {"w": draw(2, 2, 6, 4), "embedding": draw(3, 5, 4), "zero": jnp.eye(3)}
    updates, _ = tx.update(grads, tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    np.testing.assert_allclose(norms(moved["w"]), norms(params["w"]), rtol=1e-6)
    assert float(jnp.abs(moved["w"] - params["w"]).max()) > 0.01
    assert abs(norms(moved["embedding"]) - norms(params["embedding"])) > 1e-3
    assert bool(jnp.any(moved["zero"]))
