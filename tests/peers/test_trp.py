"""TRP against its equations in NumPy, and the properties of its truncations."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loro_jax.peers.trp import TRPState, trp, truncated
from tests.peers.projected_methods import gradients, run

ENERGY, NUCLEAR, RATE = 0.95, 0.3, 0.1


def falling(shape, seed=0, dtype=jnp.float32):
    """Matrices whose singular values fall."""
    return gradients(shape, 1, seed, dtype)[0]


def truncation(W, energy):
    """Truncation, subgradient and rank of one matrix, by the definition."""
    U, s, Vt = np.linalg.svd(W, full_matrices=False)
    rank = next(r for r in range(1, len(s) + 1) if sum(s[:r] ** 2) >= energy * sum(s**2))
    return (U[:, :rank] * s[:rank]) @ Vt[:rank], U[:, :rank] @ Vt[:rank], rank


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
def test_steps_are_those_of_the_equations(x64, shape):
    """Momentum SGD in NumPy, with truncations after steps 2 and 4 of 5."""
    W = np.asarray(falling(shape, 1, jnp.float64))
    grads = gradients(shape, 5, 2, jnp.float64)
    tx = trp(
        optax.sgd(RATE, momentum=0.5),
        lambda step: RATE / (step + 1),
        projected=True,
        update_every=2,
        energy=ENERGY,
        nuclear=NUCLEAR,
    )
    params = jnp.asarray(W)
    state, update, S, momentum, ranks = tx.init(params), jax.jit(tx.update), 0.0, 0.0, []
    for step, G in enumerate(grads):
        momentum = G + 0.5 * momentum
        W = W - RATE * momentum - NUCLEAR * RATE / (step + 1) * S
        if (step + 1) % 2 == 0:
            W, S, rank = truncation(W, ENERGY)
            ranks.append(rank)
            assert rank < 5
        updates, state = update(G, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, W, atol=1e-13)
        np.testing.assert_allclose(state.subgradient, S * np.ones(shape), atol=1e-12)
        assert int(state.rank) == (ranks[-1] if ranks else 0)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_a_truncation_keeps_its_share_by_the_fewest_values(energy):
    W = falling((3, 6, 9))
    found = truncated(W, energy)
    for before, after, S, rank in zip(W, *found, strict=True):
        s = np.linalg.svd(before, compute_uv=False)
        kept = np.linalg.svd(after, compute_uv=False)
        assert np.sum(kept**2) >= energy * np.sum(s**2) * (1 - 1e-6)
        assert np.sum(s[: int(rank) - 1] ** 2) < energy * np.sum(s**2)
        assert np.sum((before - after) ** 2) == pytest.approx(
            np.sum(s[int(rank) :] ** 2), rel=1e-4, abs=1e-10
        )
        # A subgradient of norm 1, whose product with the matrix is its nuclear norm.
        np.testing.assert_allclose(np.linalg.norm(S, 2), 1, rtol=1e-5)
        np.testing.assert_allclose(np.sum(S * after), np.sum(kept), rtol=1e-5)


def test_the_rank_never_rises_at_a_truncation():
    W, ranks = falling((4, 8, 8)), []
    for energy in (1.0, 0.99, 0.99, 0.99, 0.9, 0.9):
        W, _, rank = truncated(W, energy)
        ranks.append(np.asarray(rank))
        np.testing.assert_array_equal(rank, np.linalg.matrix_rank(W, rtol=1e-5))
    assert all((after <= before).all() for before, after in itertools.pairwise(ranks))
    assert (ranks[-1] < ranks[0]).all()


def test_the_nuclear_norm_falls_under_pure_subgradient_steps():
    """By the learning rate times lambda times the rank, exactly."""
    tx = trp(optax.sgd(RATE), RATE, projected=True, update_every=10, energy=0.999, nuclear=NUCLEAR)
    params = W = falling((6, 6))
    zeros = jnp.zeros((6, 6))
    state = tx.init(params)._replace(count=jnp.int32(9))  # the next step truncates
    norms = []
    for _ in range(4):
        updates, state = jax.jit(tx.update)(zeros, state, params)
        params = optax.apply_updates(params, updates)
        norms.append(float(jnp.linalg.norm(params, "nuc")))
    assert norms[0] < float(jnp.linalg.norm(W, "nuc"))
    falls = -np.diff(norms)
    # Fewer values than the step would make negative.
    assert int(state.rank) < 6
    np.testing.assert_allclose(falls[0], RATE * NUCLEAR * int(state.rank), rtol=1e-3)
    assert (falls > 0).all()


def test_a_truncation_is_of_all_layers_on_its_own_and_of_no_other_leaf():
    params = {"w": falling((3, 4, 7)), "dense": falling((4, 7), 3), "b": jnp.ones(4)}
    spec = {"w": True, "dense": False, "b": False}
    grads = [{"w": G, "dense": G[0], "b": G[0, :, 0]} for G in gradients((3, 4, 7), 4)]
    settings = {"update_every": 2, "energy": ENERGY}
    tx = trp(optax.adamw(0.1), 0.1, projected=spec, **settings)
    got, states = run(tx, params, grads)
    plain, _ = run(optax.adamw(0.1), params, grads)
    for mine, theirs in zip(got, plain, strict=True):
        for name in ("dense", "b"):
            np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-5)
    np.testing.assert_allclose(got[0]["w"], plain[0]["w"], rtol=1e-4)
    assert not np.allclose(got[1]["w"], plain[1]["w"], rtol=1e-2)
    assert states[-1].rank["w"].shape == (3,)
    alone = trp(optax.adamw(0.1), 0.1, projected=True, **settings)
    for layer in range(3):
        single, _ = run(alone, params["w"][layer], [G["w"][layer] for G in grads])
        for together, one in zip(got, single, strict=True):
            np.testing.assert_allclose(together["w"][layer], one, rtol=1e-3, atol=1e-5)


def test_without_a_nuclear_norm_there_is_no_state_for_it():
    params = {"w": falling((2, 4, 6)), "b": jnp.ones(4)}
    spec = {"w": True, "b": False}
    with_it, without = (
        trp(optax.sgd(0.1), 0.1, projected=spec, nuclear=weight).init(params)
        for weight in (0.1, 0.0)
    )
    assert with_it.subgradient["w"].shape == (2, 4, 6)
    assert [leaf.size for leaf in jax.tree.leaves(without.subgradient)] == [1, 1]
    assert without.rank["w"].shape == (2,)
    tx = trp(optax.sgd(0.1), 0.1, projected=spec, update_every=1, nuclear=0.0, energy=0.5)
    updates, state = jax.jit(tx.update)(
        jax.tree.map(jnp.zeros_like, params), tx.init(params), params
    )
    after = optax.apply_updates(params, updates)["w"]
    np.testing.assert_array_equal(state.rank["w"], np.linalg.matrix_rank(after, rtol=1e-5))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_trace_a_stable_state_and_no_svd_between_truncations(dtype):
    traces = []
    spec = lambda params: {"w": True, "b": False}  # noqa: E731
    tx = trp(optax.adam(0.1), 0.1, projected=spec, update_every=2)

    @jax.jit
    def update(grads, state, params):
        traces.append(0)
        return tx.update(grads, state, params)

    params = {"w": falling((2, 4, 6), dtype=dtype), "b": jnp.ones(3, dtype)}
    state = tx.init(params)
    kinds = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for G in gradients((2, 4, 6), 4, dtype=dtype):
        updates, state = update({"w": G, "b": jnp.ones(3, dtype)}, state, params)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == kinds
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(updates))
        params = optax.apply_updates(params, updates)
    assert len(traces) == 1
    chex.assert_tree_all_finite(params)
    assert state.subgradient["w"].dtype == jnp.float32
    found = truncated(params["w"].astype(jnp.float32), 0.999)
    # In 16 bits the rest is rounding.
    np.testing.assert_array_equal(found.rank, state.rank["w"])
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params).jaxpr
    outside = {equation.primitive.name for equation in jaxpr.eqns}
    assert "cond" in outside
    assert not outside & {"svd", "custom_vmap_call", "custom_jvp_call"}


def test_chains_and_optax_tree_maps():
    params = {"w": falling((4, 6)), "b": jnp.ones(3)}
    inner = trp(optax.adam(0.1), 0.1, projected={"w": True, "b": False})
    tx = optax.chain(optax.clip_by_global_norm(1.0), inner)
    updates, state = jax.jit(tx.update)(params, tx.init(params), params, value=1.0)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    doubled = optax.tree_utils.tree_map_params(tx, lambda x: 2 * x, state)
    assert isinstance(doubled[1], TRPState)
    np.testing.assert_array_equal(
        doubled[1].optimizer[0].nu["w"], 2 * state[1].optimizer[0].nu["w"]
    )


def test_a_matrix_of_zeros_has_rank_zero():
    found = truncated(jnp.zeros((3, 4)), 0.9)
    assert int(found.rank) == 0
    assert not np.any(found.W)
    assert not np.any(found.subgradient)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"update_every": 0}, "update_every must be a whole number of at least 1, is 0"),
        ({"update_every": 2.5}, "update_every must be a whole number"),
        ({"energy": 0.0}, "energy must be above 0 and at most 1, is 0.0"),
        ({"energy": 1.1}, "energy must be above 0 and at most 1"),
        ({"nuclear": -1.0}, "nuclear must not be negative, is -1.0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        trp(optax.sgd(0.1), 0.1, projected=True, **settings)


def test_bad_projections_and_no_params():
    params = {"w": jnp.ones((4, 6)), "b": jnp.ones(3)}
    for projected, message in (
        ({"w": True}, "parameters' structure"),
        ({"w": True, "b": True}, r"\['b'\] has shape \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            trp(optax.sgd(0.1), 0.1, projected=projected).init(params)
    tx = trp(optax.sgd(0.1), 0.1, projected={"w": True, "b": False})
    with pytest.raises(ValueError, match="needs params"):
        tx.update(params, tx.init(params))
