"""Trion against its equations in NumPy, Muon and its defining properties."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loro_jax.memory import count_bytes
from loro_jax.peers.muon import scale_by_muon
from loro_jax.peers.trion import SHAPE_FACTORS, scale_by_trion, trion
from tests.peers.projected_methods import CommonChecks, gradients, run
from tests.peers.test_dct_adamw import basis, largest, longer_first


@pytest.mark.slow
class TestCommon(CommonChecks):
    @staticmethod
    def make(learning_rate, rank, update_every=None, **settings):
        del update_every  # columns are chosen at each step
        return trion(learning_rate, rank, **settings)

    def test_the_svd_is_computed_only_where_a_projector_is_renewed(self):
        """Nothing is factorised at all."""
        tx, params = trion(0.1, 2, projected={"w": True}), {"w": jnp.ones((2, 4, 6))}
        jaxpr = str(jax.make_jaxpr(tx.update)(params, tx.init(params), params))
        assert "top_k[" in jaxpr
        assert not any(name in jaxpr for name in ("svd[", "qr[", "eigh[", "custom_vmap_call"))

    def test_bfloat16_is_computed_in_float32(self):
        """The projections', and the others' Adam."""
        spec = {"w": True, "b": False}
        narrow = [{"w": G, "b": G[0]} for G in gradients((4, 6), 3, dtype=jnp.bfloat16)]
        wide = jax.tree.map(lambda G: G.astype(jnp.float32), narrow)
        params = {"w": jnp.zeros((4, 6)), "b": jnp.zeros(6)}
        few = jax.tree.map(lambda W: W.astype(jnp.bfloat16), params)
        got, states = run(trion(0.1, 2, projected=spec), few, narrow)
        expected, others = run(trion(0.1, 2, projected=spec), params, wide)
        for mine, theirs in zip(got, expected, strict=True):
            assert jax.tree.all(jax.tree.map(lambda W: W.dtype == jnp.bfloat16, mine))
            rounded = jax.tree.map(lambda W: W.astype(jnp.float32), mine)
            # One rounding to bfloat16, of 1 / 256.
            chex.assert_trees_all_close(rounded, theirs, rtol=5e-3, atol=1e-6)
        chex.assert_trees_all_close(states[-1], others[-1], rtol=1e-5, atol=1e-7)

    def test_chains_and_optax_tree_maps(self):
        params = {"w": jnp.ones((4, 6)), "b": jnp.ones(3)}
        tx = optax.chain(
            optax.clip_by_global_norm(1.0), trion(0.1, 2, projected={"w": True, "b": False})
        )
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params, value=1.0)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        direction, W = scale_by_trion(2), jnp.ones((4, 6))
        _, state = direction.update(W, direction.init(W))
        doubled = optax.tree_utils.tree_map_params(direction, lambda x: 2 * x, state)
        np.testing.assert_array_equal(doubled.momentum, 2 * state.momentum)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"rank": 0}, "rank must be a whole number of at least 1, is 0"),
            ({"rank": 1.5}, "rank must be a whole number"),
            ({"momentum": 1.0}, "momentum must be in"),
            ({"newton_schulz_steps": 0}, "newton_schulz_steps must be at least 1"),
            ({"lr_scale": 0.0}, "lr_scale must be above 0"),
            ({"shape_factor": "kim"}, "shape_factor must be one of kj, kimi, dion, is 'kim'"),
        ],
    )
    def test_bad_settings(self, settings, message):
        settings = {"rank": 2, "projected": {"w": True}, **settings}
        with pytest.raises(ValueError, match=message):
            trion(0.1, settings.pop("rank"), **settings)

    def test_bad_projected(self):
        with pytest.raises(ValueError, match=r"trion: .* leaf \['b'\] has shape \(3,\)"):
            trion(0.1, 2, projected={"b": True}).init({"b": jnp.ones(3)})


def polynomial(m):
    """Five Newton-Schulz steps, on singular values."""
    U, s, Vt = np.linalg.svd(m, full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (U * s) @ Vt


def algorithm(grads, rank, mu):
    """The paper's rules, the longer side first: yields steps without c, momentum and columns."""
    M, Q = 0.0, basis(min(grads[0].shape))
    for G in map(longer_first, grads):
        M = M + G
        columns = largest(M @ Q, rank)
        Q_I = Q[:, columns]
        m = M @ Q_I
        M = M - (1 - mu) * m @ Q_I.T
        yield polynomial(m) @ Q_I.T, M, set(columns.tolist())


@pytest.mark.parametrize(
    ("shape", "factor", "c"),
    [
        ((5, 8), "kj", 1.0),
        ((8, 5), "kj", (8 / 5) ** 0.5),
        ((6, 6), "kimi", 0.2 * 6**0.5),
        ((5, 8), "dion", (5 / 8) ** 0.5),
    ],
)
def test_the_paper_s_algorithm(x64, shape, factor, c):
    grads = gradients(shape, 7, dtype=jnp.float64)
    tx = scale_by_trion(3, 0.9, shape_factor=factor)
    updates, states = run(tx, jnp.zeros(shape, jnp.float64), grads)
    seen = []
    for got, state, (move, M, columns) in zip(
        updates, states, algorithm([np.asarray(G) for G in grads], 3, 0.9), strict=True
    ):
        np.testing.assert_allclose(longer_first(np.asarray(got)), c * move, atol=1e-9)
        np.testing.assert_allclose(longer_first(np.asarray(state.momentum)), M, atol=1e-12)
        seen.append(columns)
    assert len({frozenset(columns) for columns in seen}) > 1  # otherwise nothing is shown


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (2, 6, 6)])
def test_full_rank_is_muon(x64, shape):
    """With averages in place of sums, which the orthogonalisation does not see."""
    grads = gradients(shape, 5, dtype=jnp.float64)
    zeros = jnp.zeros(shape, jnp.float64)
    ours, _ = run(scale_by_trion(min(shape[-2:]), 0.9, shape_factor="dion"), zeros, grads)
    theirs, _ = run(scale_by_muon(0.9, nesterov=False), zeros, grads)
    np.testing.assert_allclose(ours, theirs, atol=1e-9)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_moves_have_the_rank_and_the_norm_that_are_claimed(shape):
    updates, _ = run(scale_by_trion(2), jnp.zeros(shape), gradients(shape, 4))
    c = SHAPE_FACTORS["kj"](*shape)
    for move in updates:
        values = np.linalg.svd(np.asarray(move), compute_uv=False)
        assert values[0] < 1.21 * c
        assert values[1] > 0.3 * c
        assert values[2] < 1e-5


def test_what_is_outside_of_the_subspace_is_kept_for_later():
    """One column a step: the second gradient is zero, and still the second column is taken."""
    Q = basis(4)
    G = jnp.asarray(np.outer(np.ones(6), 1.0 * Q[:, 2] + 0.99 * Q[:, 1]), jnp.float32)
    updates, _ = run(scale_by_trion(1, 0.95), jnp.zeros((6, 4)), [G, 0 * G])
    for move, column in zip(updates, (2, 1), strict=True):
        cosines = np.linalg.norm(np.asarray(move) @ Q, axis=0) / np.linalg.norm(move)
        np.testing.assert_allclose(cosines, np.eye(4)[column], atol=1e-5)


def test_weight_decay_and_schedule_follow_the_projections_own_rate():
    params = {"w": jnp.full((4, 4), 2.0), "b": jnp.full(4, 2.0)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = trion(
        lambda step: 0.1 / (step + 1),
        2,
        projected={"w": True, "b": False},
        lr_scale=3.0,
        weight_decay=0.5,
    )
    updates, _ = run(tx, params, [zeros] * 2)
    np.testing.assert_allclose(updates[0]["w"], -0.3 * 0.5 * 2.0, rtol=1e-6)
    np.testing.assert_allclose(updates[1]["w"], -0.15 * 0.5 * (2.0 - 0.3), rtol=1e-6)
    np.testing.assert_allclose(updates[0]["b"], -0.1 * 0.5 * 2.0, rtol=1e-6)


def test_injected_hyperparameters():
    names = ("rank", "projected", "newton_schulz_steps", "shape_factor", "weight_decay")
    injected = optax.inject_hyperparams(trion, static_args=(*names, "b1", "b2", "eps"))
    grads = gradients((4, 6), 2)
    tx = injected(learning_rate=0.1, rank=2, projected=True, momentum=0.5, lr_scale=2.0)
    got, _ = run(tx, jnp.zeros((4, 6)), grads)
    expected, _ = run(
        trion(0.1, 2, projected=True, momentum=0.5, lr_scale=2.0), jnp.zeros((4, 6)), grads
    )
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_the_size_of_the_state():
    """One array of each projection's size, and Adam's moments of the others."""
    params = {"w": jnp.ones((3, 40, 60), jnp.bfloat16), "b": jnp.ones(40, jnp.bfloat16)}
    state = jax.eval_shape(trion(0.1, 4, projected={"w": True, "b": False}).init, params)
    counts_of_adam_and_schedule = 2
    assert count_bytes(state) == 4 * (3 * 40 * 60 + 2 * 40 + counts_of_adam_and_schedule)
