"""DCT-AdamW against its equations in NumPy, plain Adam and its defining properties."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loro_jax.memory import count_bytes
from loro_jax.peers.cosine_columns import cosine_basis, largest_columns, moved_columns, vectors_of
from loro_jax.peers.dct_adamw import dct_adamw
from tests.peers.projected_methods import (
    B1,
    B2,
    SETTINGS,
    CommonChecks,
    adam_direction,
    adam_in_numpy,
    gradients,
    run,
)


@pytest.mark.slow
class TestCommon(CommonChecks):
    make = staticmethod(dct_adamw)

    def test_the_svd_is_computed_only_where_a_projector_is_renewed(self):
        """Nothing is factorised at all, and columns are chosen where they are renewed alone."""
        tx = dct_adamw(0.1, 2, projected={"w": True}, update_every=2)
        params = {"w": jnp.ones((2, 4, 6))}
        jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
        outside = {equation.primitive.name for equation in jaxpr.jaxpr.eqns}
        assert "cond" in outside
        assert "top_k" not in outside
        assert "top_k[" in str(jaxpr)
        assert not any(name in str(jaxpr) for name in ("svd[", "qr[", "eigh[", "custom_vmap_call"))


def basis(k):
    """Q by its formula."""
    j, i = np.arange(k)[:, None], np.arange(k)
    Q = np.sqrt(2 / k) * np.cos(np.pi * i * (2 * j + 1) / (2 * k))
    Q[:, 0] /= np.sqrt(2)
    return Q


def longer_first(G):
    return G.T if G.shape[0] < G.shape[1] else G


def largest(S, rank):
    return np.sort(np.argsort(-np.abs(S).sum(0))[:rank])


def algorithm(grads, rank, every, feedback):
    """The paper's rules: moments are rotated by matrix products. Yields directions and columns."""
    mu = nu = E = 0.0
    Q, old = basis(min(grads[0].shape)), None
    for t, G in enumerate(map(longer_first, grads)):
        X = G + E
        if t % every == 0:
            Q_I = Q[:, largest(X @ Q, rank)]
            if old is not None:
                R = old.T @ Q_I
                mu, nu = mu @ R, nu @ np.abs(R)
            old = Q_I
        a = X @ Q_I
        if feedback:
            E = X - a @ Q_I.T
        mu, nu = B1 * mu + (1 - B1) * a, B2 * nu + (1 - B2) * a**2
        yield adam_direction(mu, nu, t + 1) @ Q_I.T


@pytest.mark.parametrize(
    ("shape", "every", "feedback"),
    [((5, 8), 1, False), ((8, 5), 3, True), ((6, 6), 1, True), ((6, 6), 3, False)],
)
def test_the_paper_s_algorithm(x64, shape, every, feedback):
    grads = gradients(shape, 7, dtype=jnp.float64)
    tx = dct_adamw(0.1, 3, projected=True, update_every=every, error_feedback=feedback, **SETTINGS)
    updates, states = run(tx, jnp.zeros(shape, jnp.float64), grads)
    expected = algorithm([np.asarray(G) for G in grads], 3, every, feedback)
    for got, direction in zip(updates, expected, strict=True):
        np.testing.assert_allclose(longer_first(np.asarray(got)), -0.1 * direction, atol=1e-9)
    # Some columns go and some stay, otherwise nothing is shown.
    sets = [set(np.asarray(state.columns).tolist()) for state in states]
    pairs = list(zip(sets, sets[every:], strict=False))
    assert any(one != other for one, other in pairs)
    assert any(one & other for one, other in pairs)


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
def test_full_rank_is_adam_in_the_cosine_basis(shape):
    grads = gradients(shape, 6)
    k = min(shape)
    updates, _ = run(dct_adamw(0.1, k, projected=True, **SETTINGS), jnp.zeros(shape), grads)
    Q = basis(k)
    expected = adam_in_numpy([longer_first(np.asarray(G)) @ Q for G in grads])
    for got, direction in zip(updates, expected, strict=True):
        turned = longer_first(np.asarray(got))
        np.testing.assert_allclose(turned, -0.1 * direction @ Q.T, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 7, 512])
def test_the_basis_is_orthonormal_and_the_formula_s(k):
    Q = np.asarray(cosine_basis(k, jnp.float32), np.float64)
    np.testing.assert_allclose(Q.T @ Q, np.eye(k), atol=2e-6)
    np.testing.assert_allclose(Q, basis(k), atol=1e-6)


def test_columns_are_those_with_the_largest_norms():
    S = np.random.default_rng(0).normal(size=(3, 9, 6)).astype(np.float32)
    got = largest_columns(jnp.asarray(S), 4)
    assert got.dtype == jnp.int32
    for layer in range(3):
        np.testing.assert_array_equal(got[layer], largest(S[layer], 4))
    picked = vectors_of(jnp.asarray(basis(6)), got)
    np.testing.assert_array_equal(picked[1], jnp.asarray(basis(6).T)[got[1]])


def test_moments_move_as_by_the_product_of_the_bases():
    rng = np.random.default_rng(0)
    old, new = (np.stack([rng.permutation(8)[:5] for _ in range(4)]) for _ in range(2))
    X = rng.normal(size=(4, 3, 5)).astype(np.float32)
    moved = np.asarray(moved_columns(jnp.asarray(X), jnp.asarray(old), jnp.asarray(new)))
    Q = np.eye(8)
    for layer in range(4):
        R = Q[:, old[layer]].T @ Q[:, new[layer]]
        assert 0 < R.sum() < 5
        np.testing.assert_array_equal(moved[layer], X[layer] @ R)  # to the bit


def test_moments_of_kept_columns_survive_and_new_ones_are_zero():
    Q, rng = basis(5), np.random.default_rng(0)

    def with_columns(columns, size):
        S = np.zeros((7, 5))
        S[:, columns] = size * rng.normal(size=(7, len(columns)))
        return S, jnp.asarray(S @ Q.T, jnp.float32)

    (first, G), (second, H) = with_columns([1, 3], 1.0), with_columns([0, 3], 100.0)
    _, states = run(dct_adamw(0.1, 2, projected=True, **SETTINGS), jnp.zeros((7, 5)), [G, H])
    for t, (state, columns) in enumerate(zip(states, ({1, 3}, {0, 3}), strict=True)):
        found = np.asarray(state.columns).tolist()
        assert found == sorted(columns)
        for place, column in enumerate(found):
            old, new = (1 - B1) * first[:, column], (1 - B1) * second[:, column]
            mu = old if t == 0 else B1 * old + new
            np.testing.assert_allclose(state.mu[:, place], mu, rtol=1e-3, atol=1e-4)
            old, new = (1 - B2) * first[:, column] ** 2, (1 - B2) * second[:, column] ** 2
            nu = old if t == 0 else B2 * old + new
            np.testing.assert_allclose(state.nu[:, place], nu, rtol=1e-3, atol=1e-5)


def test_nothing_is_lost_with_error_feedback():
    """The gradients' sum is what Adam has seen and the error that is left."""
    tx = dct_adamw(0.1, 2, projected=True, b1=0.0, error_feedback=True)
    grads, total = gradients((6, 4), 5), 0.0
    _, states = run(tx, jnp.zeros((6, 4)), grads)
    for state in states:  # without a decay the first moment is the projected gradient
        total = total + state.mu @ vectors_of(cosine_basis(4, jnp.float32), state.columns)
    np.testing.assert_allclose(total + states[-1].error.T, sum(grads), atol=1e-5)


def test_long_leaves_get_adamw():
    params = {"w": jnp.ones((4, 9)), "head": jnp.ones((2, 10, 4))}
    grads = [{"w": G, "head": jnp.ones((2, 10, 4)) * G[0, 0]} for G in gradients((4, 9), 3)]
    tx = dct_adamw(0.1, 2, projected={"w": True, "head": True}, max_side=10, weight_decay=0.01)
    got, states = run(tx, params, grads)
    expected, _ = run(optax.adamw(0.1, weight_decay=0.01), params, grads)
    assert states[0].columns["w"].shape == (2,)
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine["head"], theirs["head"], rtol=1e-5)
    with pytest.raises(ValueError, match="max_side must be at least 1"):
        dct_adamw(0.1, 2, projected=True, max_side=0)


def test_the_scale_is_of_projected_leaves_alone():
    params = {"w": jnp.ones((6, 4)), "b": jnp.ones(4)}
    grads = jax.tree.map(lambda x: jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), params)
    of = {}
    for scale in (1.0, 0.25):
        tx = dct_adamw(0.1, 2, projected={"w": True, "b": False}, scale=scale)
        of[scale], _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(of[0.25]["w"], 0.25 * of[1.0]["w"], rtol=1e-6)
    np.testing.assert_array_equal(of[0.25]["b"], of[1.0]["b"])


def test_an_injected_learning_rate():
    others = ("rank", "projected", "update_every", "error_feedback", "max_side")
    constants = ("b1", "b2", "eps", "weight_decay")
    injected = optax.inject_hyperparams(dct_adamw, static_args=(*others, *constants))
    grads = gradients((4, 6), 2)
    got, _ = run(injected(learning_rate=0.1, rank=2, projected=True), jnp.zeros((4, 6)), grads)
    expected, _ = run(dct_adamw(0.1, 2, projected=True), jnp.zeros((4, 6)), grads)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
@pytest.mark.parametrize("feedback", [False, True])
def test_the_size_of_the_state(shape, feedback):
    params = {"w": jnp.ones((3, *shape), jnp.bfloat16), "b": jnp.ones(40, jnp.bfloat16)}
    tx = dct_adamw(0.1, 4, projected={"w": True, "b": False}, error_feedback=feedback)
    state = jax.eval_shape(tx.init, params)
    count_and_placeholders = 2 + feedback
    each_layer = 4 + 2 * 60 * 4 + feedback * 40 * 60
    assert count_bytes(state) == 4 * (3 * each_layer + 2 * 40 + count_and_placeholders)
