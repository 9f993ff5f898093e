"""Variants of the orthogonalisation, of factors and of dense matrices, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loro_jax import LowRank, orthogonal
from loro_jax.directions.orthogonalisation import Orthogonalisation
from loro_jax.pairs import pairs_of
from loro_jax.peers.muon import scale_by_muon
from tests.directions.test_orthogonal import draw, gradients, orthogonalised64, pair, root64

BETA = 0.95


def variant64(M, equilibrate=False, moment=None, row_moment=0.0):
    """The variants of one matrix whose rows are the long side, and the new row moment."""
    if equilibrate:
        M = M / np.linalg.norm(M, axis=1, keepdims=True)
    X = orthogonalised64(M)
    if not row_moment:
        return X, moment
    moment = row_moment * moment + (1 - row_moment) * np.mean(X**2, axis=1, keepdims=True)
    divided = X / np.sqrt(moment)
    return divided * np.linalg.norm(X) / np.linalg.norm(divided), moment


VARIANTS = [
    {"equilibrate": True},
    {"row_moment": 0.9},
    {"equilibrate": True, "row_moment": 0.5},
]


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("wide", [False, True])
def test_two_steps_of_a_dense_matrix_are_those_of_float64(options, wide):
    tx, state, mu, moment = scale_by_muon(BETA, **options), None, 0.0, 0.0
    for seed in (1, 2):
        G = draw(seed, 24, 6)
        G = G.T if wide else G
        state = tx.init(G) if state is None else state
        moves, state = tx.update(G, state)
        tall = np.float64(G.T if wide else G)
        mu = BETA * mu + (1 - BETA) * tall
        expected, moment = variant64(BETA * mu + (1 - BETA) * tall, moment=moment, **options)
        expected = expected.T if wide else expected
        np.testing.assert_allclose(moves, expected * (G.shape[0] / G.shape[1]) ** 0.5, atol=5e-5)


@pytest.mark.parametrize("options", VARIANTS)
def test_two_steps_of_a_pair_are_those_of_float64(options):
    B, A = pair()
    params = {"w": LowRank(B, A)}
    found = pairs_of(params)
    direction = orthogonal(0.0, nesterov=False, **options)
    state = direction.init(params)
    B64, A64 = np.float64(B), np.float64(A)
    root_A, root_B = root64(A64 @ A64.T, 1e-3), root64(B64.T @ B64, 1e-3)
    half = 0.5 * (B.shape[0] / A.shape[1]) ** 0.5
    of_B = of_A = 0.0
    for seed in (7, 8):
        g_B, g_A = gradients(B, A, seed)
        moves, state = direction.update({"w": LowRank(g_B, g_A)}, state, params, found)
        X, of_B = variant64(np.float64(g_B) @ root_A, moment=of_B, **options)
        Y, of_A = variant64((root_B @ np.float64(g_A)).T, moment=of_A, **options)
        np.testing.assert_allclose(moves["w"].B, half * X @ root_A, atol=1e-4)
        np.testing.assert_allclose(moves["w"].A, half * root_B @ Y.T, atol=1e-4)


@pytest.mark.parametrize(("axis", "shape"), [(0, (24, 6)), (1, (6, 24))])
def test_equilibrated_rows_may_have_any_scale(axis, shape):
    M = draw(3, *shape)
    sizes = jnp.exp(2 * draw(4, *(s if i == axis else 1 for i, s in enumerate(shape))))
    settings = Orthogonalisation(equilibrate=True)
    np.testing.assert_allclose(settings.apply(M), settings.apply(M * sizes), atol=1e-4)
    assert not np.allclose(settings.apply(M), Orthogonalisation().apply(M), atol=1e-2)


@pytest.mark.parametrize("options", VARIANTS)
def test_what_represents_the_product_does_not_matter(options):
    B, A = pair()
    S = jnp.eye(6) + 0.3 * draw(5, 6, 6)
    moves = []
    for B_S, A_S in ((B, A), (B @ S, jnp.linalg.solve(S, A))):
        direction, params = orthogonal(damping=0.0, **options), {"w": LowRank(B_S, A_S)}
        grads = {"w": LowRank(*gradients(B_S, A_S))}
        found, _ = direction.update(grads, direction.init(params), params, pairs_of(params))
        moves.append(found["w"].B @ A_S + B_S @ found["w"].A)
    np.testing.assert_allclose(moves[0], moves[1], atol=5e-4)


@pytest.mark.slow
@pytest.mark.parametrize("options", VARIANTS)
def test_members_of_an_ensemble_and_stacked_layers_step_alone(options):
    direction = orthogonal(**options)

    def step(B, A, G):
        params = {"w": LowRank(B, A)}
        grads = {"w": LowRank(G @ A.mT, B.mT @ G)}
        return direction.update(grads, direction.init(params), params, pairs_of(params))

    B, A, G = draw(0, 2, 3, 24, 6), draw(1, 2, 3, 6, 40), draw(2, 2, 3, 24, 40)
    together = jax.vmap(step)(B, A, G)
    alone = step(B[1, 2], A[1, 2], G[1, 2])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x[1, 2], y, atol=1e-4), together, alone)


def test_zero_gradients_move_nothing():
    W = jnp.zeros((8, 4))
    tx = scale_by_muon(equilibrate=True, row_moment=0.9)
    moves, state = tx.update(W, tx.init(W))
    assert float(jnp.abs(moves).max()) == float(jnp.abs(state.rows).max()) == 0


def test_a_decay_out_of_range_is_named():
    with pytest.raises(ValueError, match=r"orthogonal: row_moment must be in \[0, 1\), but is 1.0"):
        orthogonal(row_moment=1.0)
