"""FRUGAL against its equations in NumPy, and its limits: AdamW and signs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loro_jax.memory import count_bytes
from loro_jax.peers.bases import BASES
from loro_jax.peers.frugal import frugal
from tests.peers.projected_methods import (
    B1,
    B2,
    EPS,
    SETTINGS,
    CommonChecks,
    adam_direction,
    adam_in_numpy,
    run,
)

LAYERS, K, L = 3, 4, 7


@pytest.mark.slow
class TestCommon(CommonChecks):
    """With the subspace of an SVD, of half the smaller side."""

    @staticmethod
    def make(learning_rate, rank, **settings):
        return frugal(learning_rate, density=rank / 4, basis="svd", **settings)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"density": -0.1}, "density must be between 0 and 1, is -0.1"),
            ({"density": 1.5}, "density must be between 0 and 1"),
            ({"basis": "block"}, "frugal: basis must be one of svd"),
            ({"order": "mirror"}, "order must be one of descending, ascending, random"),
            ({"remainder": "sign"}, "remainder must be one of sign_sgd, sgd, no, is 'sign'"),
            ({"update_every": 0}, "update_every must be a whole number"),
            ({"b1": 1.0}, "b1 must be at least 0 and below 1, is 1.0"),
            ({"weight_decay": -1.0}, "weight_decay must not be negative"),
        ],
    )
    def test_bad_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            frugal(0.1, projected={"w": True}, **settings)

    def test_a_rank_beyond_the_smaller_side(self):
        """There is none: the density is a share. But blocks need layers."""
        with pytest.raises(ValueError, match=r"expected a leading axis of layers"):
            frugal(0.1, projected=True).init(jnp.ones((9, 4)))


def many(steps, shape=(LAYERS, K, L), seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(steps)]


def as_projection(basis, stored, shape):
    """P and P^-1 of a stored basis, as functions in NumPy."""
    if basis == "blocks":
        stored = list(stored)
        return lambda G: G[stored], lambda N: _placed(N, stored, shape)
    if stored.dtype == np.int32:
        Q = np.asarray(_basis_matrix(basis, shape[-2]), np.float64)
        stored = Q[stored].mT
    return lambda G: stored.mT @ G, lambda N: stored @ N


def _placed(N, stored, shape):
    whole = np.zeros(shape)
    whole[stored] = N
    return whole


def _basis_matrix(basis, size):
    """Rows: the vectors from which indices choose."""
    if basis == "columns":
        return np.eye(size)
    j, i = np.meshgrid(np.arange(size), np.arange(size))
    cosines = np.sqrt(2 / size) * np.cos(np.pi * i * (2 * j + 1) / (2 * size))
    cosines[0] /= np.sqrt(2)
    return cosines


def equations(grads, bases, *, basis, every, scale, c, rule, decay, lr):
    """The paper's loop; bases are those of each step."""
    W, found = np.zeros(grads[0].shape) + 1.0, []
    for t, (G, stored) in enumerate(zip(grads, bases, strict=True)):
        down, up = as_projection(basis, stored, G.shape)
        g1 = down(G)
        if t % every == 0:
            mu, nu = np.zeros(g1.shape), np.zeros(g1.shape)
        mu, nu = B1 * mu + (1 - B1) * g1, B2 * nu + (1 - B2) * g1**2
        step = up(adam_direction(mu, nu, t % every + 1))
        g0 = G - up(g1)
        step += c * {"sign_sgd": np.sign(g0), "sgd": g0, "no": 0 * g0}[rule]
        move = -lr * (scale * step + decay * W)
        found.append(move)
        W = W + move
    return found


@pytest.mark.parametrize(
    ("basis", "rule"),
    [
        ("svd", "sign_sgd"),
        ("randomised", "sgd"),
        ("dct", "sgd"),
        ("random", "no"),
        ("columns", "sign_sgd"),
        ("blocks", "sign_sgd"),
    ],
)
@pytest.mark.parametrize("tall", [False, True])
def test_the_equations(x64, basis, rule, tall):
    grads = many(5, dtype=jnp.float64)
    settings = {"scale": 0.5, "decay": 0.1, "lr": 0.1, "c": 0.3, "every": 2}
    tx = frugal(
        settings["lr"],
        projected=True,
        density=0.5,
        basis=basis,
        update_every=settings["every"],
        scale=settings["scale"],
        remainder=rule,
        remainder_scale=settings["c"],
        weight_decay=settings["decay"],
        **SETTINGS,
    )
    turned = (lambda x: x.mT) if tall else (lambda x: x)
    updates, states = run(tx, turned(jnp.ones(grads[0].shape)), [turned(G) for G in grads])
    bases = [np.asarray(state.projector) for state in states]
    assert not np.array_equal(bases[1], bases[2])
    np.testing.assert_array_equal(bases[2], bases[3])
    expected = equations([np.asarray(G) for G in grads], bases, basis=basis, rule=rule, **settings)
    # The transform is computed in float32.
    near = 1e-5 if basis == "dct" else 1e-9
    for got, move in zip(updates, expected, strict=True):
        np.testing.assert_allclose(turned(got), move, rtol=near, atol=near)


@pytest.mark.parametrize("basis", ["columns", "blocks"])
def test_the_whole_space_is_adamw(basis):
    """Also after the steps that choose subspaces, where there is no other to choose.

    Not to the bit: the compiler may round a product and a sum once or twice.
    """
    grads = many(5)
    tx = frugal(
        0.1, projected=True, density=1.0, basis=basis, update_every=2, weight_decay=0.1, **SETTINGS
    )
    updates, _ = run(tx, jnp.ones(grads[0].shape), grads)
    expected, _ = run(
        optax.adamw(0.1, B1, B2, EPS, weight_decay=0.1), jnp.ones(grads[0].shape), grads
    )
    for got, move in zip(updates, expected, strict=True):
        np.testing.assert_allclose(got, move, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("basis", ["svd", "dct", "random"])
def test_the_whole_space_in_other_coordinates(basis):
    """Adam on the coordinates in the first basis, with no remainder made of rounding."""
    grads = many(4, shape=(1, K, L))
    tx = frugal(0.1, projected=True, density=1.0, basis=basis, update_every=2, **SETTINGS)
    updates, states = run(tx, jnp.zeros((1, K, L)), grads)
    down, up = as_projection(basis, np.asarray(states[0].projector), (1, K, L))
    expected = adam_in_numpy([down(np.asarray(G, np.float64)) for G in grads])
    for got, direction in zip(updates, expected, strict=True):
        np.testing.assert_allclose(got, -0.1 * up(direction), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_share_is_signs_without_state(dtype):
    grads = many(3, dtype=dtype)
    params = jnp.ones(grads[0].shape, dtype)
    updates, states = run(frugal(0.1, projected=True, density=0.0), params, grads)
    for got, G in zip(updates, grads, strict=True):
        np.testing.assert_array_equal(got, (-0.1 * jnp.sign(G.astype(jnp.float32))).astype(dtype))
    assert count_bytes(states[-1]) == 4 * 4  # the count, and placeholders
    signs, _ = run(optax.sign_sgd(0.1), params, grads)
    np.testing.assert_allclose(updates[-1].astype(float), signs[-1].astype(float), rtol=1e-2)


@pytest.mark.parametrize("basis", ["svd", "dct", "columns", "blocks"])
def test_moments_begin_anew_in_each_subspace(basis):
    """Right after a renewal they are those of one step from zero."""
    grads = many(5)
    tx = frugal(0.1, projected=True, density=0.5, basis=basis, update_every=2, **SETTINGS)
    _, states = run(tx, jnp.zeros(grads[0].shape), grads)
    for t in (2, 4):
        R = BASES[basis].project(states[t].projector, grads[t])
        np.testing.assert_allclose(states[t].mu, (1 - B1) * R, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(states[t].nu, (1 - B2) * R**2, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("basis", BASES)
def test_the_parts_are_orthogonal(basis):
    """By the updates alone: with c = 1 and plain gradients outside, less those without them."""
    G = many(1)[0]
    parts = {}
    for rule in ("sgd", "no"):
        tx = frugal(1.0, projected=True, density=0.5, basis=basis, remainder=rule)
        parts[rule] = np.asarray(tx.update(G, tx.init(G), G)[0], np.float64)
    inside, outside = parts["no"], parts["sgd"] - parts["no"]
    assert np.linalg.norm(inside) > 0.1
    assert np.linalg.norm(outside) > 0.1
    cosine = np.sum(inside * outside) / np.linalg.norm(inside) / np.linalg.norm(outside)
    assert abs(cosine) < 1e-6


@pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
def test_the_state_is_a_share_of_adam_s(density):
    shape = (8, 40, 60)
    of_adam = 2 * 4 * 8 * 40 * 60
    rank, layers = round(40 * density), round(8 * density)
    stored = {
        **dict.fromkeys(("svd", "randomised", "random"), 4 * 8 * 40 * rank),
        **dict.fromkeys(("dct", "columns"), 4 * 8 * rank),
        "blocks": 4 * layers,
    }
    for basis in BASES:
        tx = frugal(0.1, projected=True, density=density, basis=basis)
        state = jax.eval_shape(tx.init, jax.ShapeDtypeStruct(shape, jnp.bfloat16))
        assert count_bytes(state) == 4 + stored[basis] + density * of_adam
