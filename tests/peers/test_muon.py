"""Muon against optax.contrib, float64 and its defining property."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loro_jax.peers.muon import muon, scale_by_muon
from tests.peers.projected_methods import gradients

AXES = optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)


def trees(count):
    shapes = {"square": (6, 6), "tall": (9, 6), "stack": (3, 8, 8)}
    columns = {name: gradients(shape, count) for name, shape in shapes.items()}
    return [{name: column[i] for name, column in columns.items()} for i in range(count)]


def directions(tx, grads):
    state, found = tx.init(grads[0]), []
    for grad in grads:
        moves, state = tx.update(grad, state, grads[0])
        found.append(moves)
    return found


# With Nesterov, Optax corrects the average for bias, so only the first step is the same.
@pytest.mark.parametrize(("nesterov", "steps"), [(False, 6), (True, 1)])
def test_equals_optax_where_shape_factors_agree(nesterov, steps):
    grads = trees(steps)
    axes = dict.fromkeys(grads[0], AXES)
    theirs = optax.contrib.muon(-1.0, nesterov=nesterov, muon_weight_dimension_numbers=axes)
    pairs = zip(
        directions(scale_by_muon(nesterov=nesterov), grads), directions(theirs, grads), strict=True
    )
    for ours, others in pairs:
        for name in ours:
            off = np.linalg.norm(ours[name] - others[name]) / np.linalg.norm(others[name])
            assert off < 1e-4


def test_wide_matrices_take_smaller_steps():
    G = gradients((4, 16), 1)[0]
    (moves,) = directions(scale_by_muon(), [G])
    singular = np.linalg.svd(np.asarray(moves), compute_uv=False)
    assert singular.max() < 1.21 * (4 / 16) ** 0.5


def test_float64_by_singular_values(x64):
    """The quintic of the singular values, between the singular vectors."""
    grads = gradients((5, 7), 3, dtype=jnp.float64)
    mu = 0.0
    tx = scale_by_muon(0.9)
    for G, moves in zip(grads, directions(tx, grads), strict=True):
        mu = 0.9 * mu + 0.1 * np.asarray(G)
        U, s, Vt = np.linalg.svd(0.9 * mu + 0.1 * np.asarray(G), full_matrices=False)
        s = s / np.linalg.norm(s)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        np.testing.assert_allclose(moves, (U * s) @ Vt * (5 / 7) ** 0.5, atol=1e-10)


def test_other_leaves_get_adamw():
    params = {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}
    grads = [{"w": G, "b": G[0]} for G in gradients((4, 4), 5)]
    ours = muon(0.1, projected={"w": True, "b": False}, weight_decay=0.01)
    theirs = optax.adamw(0.1, weight_decay=0.01)
    for one, other in zip(
        _updates(ours, params, grads), _updates(theirs, params, grads), strict=True
    ):
        np.testing.assert_allclose(one["b"], other["b"], rtol=1e-5)


def _updates(tx, params, grads):
    state = tx.init(params)
    for grad in grads:
        updates, state = jax.jit(tx.update)(grad, state, params)
        yield updates
        params = optax.apply_updates(params, updates)


def test_weight_decay_and_schedule_follow_the_projections_own_rate():
    params = {"w": jnp.full((4, 4), 2.0)}
    grads = {"w": jnp.zeros((4, 4))}
    tx = muon(lambda step: 0.1 / (step + 1), projected={"w": True}, lr_scale=3.0, weight_decay=0.5)
    updates = list(_updates(tx, params, [grads] * 2))
    np.testing.assert_allclose(updates[0]["w"], -0.3 * 0.5 * 2.0, rtol=1e-6)
    np.testing.assert_allclose(updates[1]["w"], -0.15 * 0.5 * (2.0 - 0.3), rtol=1e-6)


def test_narrow_parameters_keep_wide_moments():
    params = jnp.ones((4, 4), jnp.bfloat16)
    tx = scale_by_muon()
    state = tx.init(params)
    moves, state = tx.update(params, state)
    assert (moves.dtype, state.mu.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"momentum": 1.0}, "momentum must be in"),
        ({"newton_schulz_steps": 0}, "newton_schulz_steps must be at least 1"),
        ({"lr_scale": 0.0}, "lr_scale must be above 0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        muon(0.1, projected={"w": True}, **settings)


def test_a_vector_is_no_projection():
    with pytest.raises(ValueError, match=r"muon: the leaf .* has shape \(4,\)"):
        muon(0.1, projected={"b": True}).init({"b": jnp.zeros(4)})
