"""GaLore, Fira and AdaRankGrad with every basis, and with every rule for moments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loro_jax.memory import count_bytes
from loro_jax.peers.adarankgrad import adarankgrad
from loro_jax.peers.bases import BASES, MOMENTS
from loro_jax.peers.fira import fira
from loro_jax.peers.galore import galore
from tests.helpers import run_module
from tests.peers.projected_methods import (
    B1,
    B2,
    SETTINGS,
    CommonChecks,
    adam_direction,
    gradients,
    run,
)

SHAPE, RANK, EVERY = (3, 4, 7), 2, 2


@pytest.mark.slow
class TestCosines(CommonChecks):
    """All checks of GaLore with a basis that is stored as indices, and moments that move."""

    make = staticmethod(functools.partial(galore, basis="dct", moments="rotate"))


def as_matrix(basis, stored, shape):
    """P (entries of the gradient, entries of R): every projection written as one matrix."""
    kind = BASES[basis]
    R = jax.eval_shape(lambda: kind.project(stored, jnp.zeros(shape)))
    size = int(np.prod(R.shape))
    lifted = [kind.lift(stored, e.reshape(R.shape), shape).reshape(-1) for e in jnp.eye(size)]
    P = np.stack(lifted, axis=1)
    np.testing.assert_allclose(P.T @ P, np.eye(size), atol=1e-6)
    return P, R.shape


def equations(grads, bases, basis, moments, alpha):
    """GaLore on the flattened gradient; the moments by the definition of each rule."""
    old, found = None, []
    for t, (G, stored) in enumerate(zip(grads, bases, strict=True)):
        if t % EVERY == 0:
            P, _ = as_matrix(basis, stored, G.shape)
            if old is None or moments == "reset":
                mu, nu, first = np.zeros(P.shape[1]), np.zeros(P.shape[1]), t
            elif moments == "rotate":
                C = P.T @ old
                mu, nu = C @ mu, C**2 @ nu
            old = P
        R = P.T @ G.reshape(-1)
        mu, nu = B1 * mu + (1 - B1) * R, B2 * nu + (1 - B2) * R**2
        found.append(alpha * (P @ adam_direction(mu, nu, t - first + 1)).reshape(G.shape))
    return found


@pytest.mark.parametrize(
    ("basis", "moments"),
    [("svd", "rotate"), ("svd", "reset"), ("randomised", "keep"), ("random", "rotate"),
     ("dct", "rotate"), ("columns", "rotate"), ("columns", "keep"), ("blocks", "rotate"),
     ("blocks", "reset")],
)  # fmt: skip
def test_galore_in_every_basis(x64, basis, moments):
    rng = np.random.default_rng(0)
    grads = [jnp.asarray(rng.normal(size=SHAPE)) for _ in range(5)]
    tx = galore(
        0.1, RANK, projected=True, update_every=EVERY, basis=basis, moments=moments, **SETTINGS
    )
    updates, states = run(tx, jnp.zeros(SHAPE), grads)
    expected = equations(
        [np.asarray(G) for G in grads], [s.projector for s in states], basis, moments, alpha=0.25
    )
    near = 1e-4 if basis == "dct" else 1e-8  # the transform is computed in float32
    for got, direction in zip(updates, expected, strict=True):
        np.testing.assert_allclose(got, -0.1 * direction, rtol=near, atol=near * 0.01)


@pytest.mark.parametrize("basis", ["randomised", "random", "dct", "columns"])
def test_fira_s_parts_in_every_basis(basis):
    """Inside of the subspace it is GaLore, outside it is the scaled rest of the gradient."""
    grads = gradients(SHAPE, 3)
    settings = {"projected": True, "update_every": EVERY, "basis": basis, "moments": "rotate"}
    updates, states = run(fira(0.1, RANK, **settings), jnp.zeros(SHAPE), grads)
    others, _ = run(galore(0.1, RANK, **settings), jnp.zeros(SHAPE), grads)
    for got, other, state, G in zip(updates, others, states, grads, strict=True):
        kind, P = BASES[basis], state.projector
        rest = np.asarray(kind.complement(P, got))
        np.testing.assert_allclose(got - rest, other, rtol=1e-3, atol=1e-5)
        # Columns of the rest have the directions of the gradient's, and are of the stored norm.
        of_gradient = np.asarray(kind.complement(P, G))
        cosines = np.sum(rest * of_gradient, axis=-2) / (
            np.linalg.norm(rest, axis=-2) * np.linalg.norm(of_gradient, axis=-2)
        )
        np.testing.assert_allclose(cosines, -1, atol=1e-3)
        norms = np.linalg.norm(rest, axis=(-2, -1))
        np.testing.assert_allclose(norms, 0.1 * state.norm, rtol=1e-3)


def test_adarankgrad_by_an_exact_svd():
    grads = gradients(SHAPE, 3)
    settings = {"projected": True, "update_every": EVERY, "eta": 0.1}
    exact, of_exact = run(adarankgrad(0.1, 3, basis="svd", **settings), jnp.zeros(SHAPE), grads)
    near, of_near = run(adarankgrad(0.1, 3, **settings), jnp.zeros(SHAPE), grads)
    for one, other in zip(exact, near, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(of_exact[-1].rank, of_near[-1].rank)


@pytest.mark.parametrize("basis", BASES)
def test_the_state_of_each_basis(basis):
    shape, rank = (8, 40, 60), 10
    tx = galore(0.1, rank, projected=True, basis=basis)
    state = jax.eval_shape(tx.init, jax.ShapeDtypeStruct(shape, jnp.bfloat16))
    stored = {"dct": 8 * 10, "columns": 8 * 10, "blocks": 2}.get(basis, 8 * 40 * 10)
    assert count_bytes(state) == 4 * (1 + stored + 2 * 8 * 10 * 60)


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("basis", ["svd", "dct"])
def test_nothing_is_computed_between_renewals(basis, moments):
    """Factorisations, sorts and random numbers are in the branch of a renewal alone."""
    tx = galore(0.1, RANK, projected=True, basis=basis, moments=moments)
    params = jnp.ones(SHAPE)
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params).jaxpr
    outside = {equation.primitive.name for equation in jaxpr.eqns}
    assert "cond" in outside
    assert not outside & {"svd", "qr", "custom_vmap_call", "custom_jvp_call", "sort", "top_k"}


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (galore, {"basis": "SVD"}, "galore: basis must be one of svd, .*, is 'SVD'"),
        (fira, {"moments": "move"}, "fira: moments must be one of keep, reset, rotate, is 'move'"),
        (fira, {"basis": "blocks"}, 'fira: basis "blocks" gives whole matrices'),
        (adarankgrad, {"basis": "dct"}, 'basis must be "randomised" or "svd", is \'dct\''),
    ],
)
def test_bad_settings(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(0.1, 2, projected=True, **settings)


@pytest.mark.slow
def test_on_several_devices_steps_are_those_of_one():
    rows = run_module("tests.peers.four_devices")
    assert len(rows) == 2 * len(BASES)
    for row in rows:
        np.testing.assert_allclose(row["several"], row["one"], rtol=1e-3, atol=1e-6)
        assert row["devices"] == 4, row
