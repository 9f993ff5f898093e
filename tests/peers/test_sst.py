import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loro_jax.layers.sst import spectral_product
from loro_jax.peers.sst import Spectral, constrained, decompose, draw_active, next_round
from loro_jax.training.config import Config
from loro_jax.training.methods import make_maintenance, make_optimizer
from models import preset

EVERY = 3
# Wide and tall.
SHAPES = [(5, 8), (8, 5)]


def weight(m, n, layers=(), seed=0):
    return jnp.array(np.random.default_rng(seed).normal(size=(*layers, m, n)))


class Reference:
    """The method as its equations say, in NumPy; the places are handed in."""

    def __init__(self, U, S, Vt, active):
        self.U, self.S, self.V, self.active = U, S, Vt.T, active
        self.count, self.moments = 0, {}

    @property
    def W(self):
        return (self.U * self.S) @ self.V.T

    def adam(self, name, g, b1=0.9, b2=0.999, eps=1e-6):
        mu, nu = self.moments.get(name, (0.0, 0.0))
        mu, nu = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * g**2
        self.moments[name] = mu, nu
        mu, nu = mu / (1 - b1**self.count), nu / (1 - b2**self.count)
        return mu / (np.sqrt(nu) + eps)

    def step(self, G, lr):
        self.count += 1
        U, V, at = self.U.copy(), self.V.copy(), self.active
        dS = np.array([U[:, i] @ G @ V[:, i] for i in range(len(self.S))])
        self.S = np.maximum(self.S - lr * self.adam("S", dS), 0)
        self.U[:, at] = U[:, at] - lr * self.adam("U", G @ V[:, at])
        self.V[:, at] = V[:, at] - lr * self.adam("V", G.T @ U[:, at])
        for X in (self.U, self.V):
            X[:, at] = X[:, at] / np.linalg.norm(X[:, at], axis=0)

    def round(self, active):
        self.U, self.S, Vt = np.linalg.svd(self.W, full_matrices=False)
        self.V, self.active, self.moments = Vt.T.copy(), active, {}


def test_steps_and_rounds_are_those_of_the_equations(x64):
    m, n = SHAPES[0]
    config = Config(
        method="sst",
        steps=20,
        warmup_steps=0,
        final_lr_ratio=1.0,
        learning_rate=0.1,
        exact_every=EVERY,
        restart_warmup_steps=2,
        model=preset("tiny", rank=2),
    )
    tx, maintain = make_optimizer(config), make_maintenance(config).after
    rng = np.random.default_rng(1)
    x, target = jnp.array(rng.normal(size=(7, n))), jnp.array(rng.normal(size=(7, m)))
    parts = decompose(jax.random.key(0), weight(m, n), 2)
    names = ("S", "B", "A")
    params = {"up": {name: getattr(parts, name) for name in names}}
    fixed = {"up": {name: getattr(parts, name) for name in ("U", "Vt", "active")}}
    state = tx.init(params)

    def now(params, fixed):
        return Spectral(**params["up"], **fixed["up"])

    @jax.jit
    def step(count, params, fixed, state):
        def loss(params):
            return 0.5 * jnp.sum((spectral_product(x, now(params, fixed)) - target) ** 2)

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        return maintain(count + 1, params, fixed, state)

    U, Vt = parts.vectors
    own = Reference(np.array(U), np.array(parts.S), np.array(Vt), np.array(parts.active))
    for count in range(3 * EVERY):
        # Warmed up again in the first two steps of a round other than the first.
        warmup = min(1.0, (count % EVERY) / 2) if count >= EVERY else 1.0
        own.step(np.asarray((x @ own.W.T - target).T @ x), 0.1 * warmup)
        before = fixed
        params, fixed, state = step(jnp.int32(count), params, fixed, state)
        found = now(params, fixed)
        is_end = (count + 1) % EVERY == 0
        if is_end:
            own.round(np.asarray(found.active))
            moments = jax.tree.leaves((state.factors.mu, state.factors.nu))
            moments += jax.tree.leaves((state.regular.mu, state.regular.nu))
            assert not any(leaf.any() for leaf in moments)
        else:
            for one, other in zip(*map(jax.tree.leaves, (before, fixed)), strict=True):
                np.testing.assert_array_equal(one, other)
        np.testing.assert_allclose(found.weight(), own.W, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(found.S, own.S, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(np.abs(found.B), np.abs(own.U[:, own.active]), atol=1e-7)
        np.testing.assert_allclose(np.linalg.norm(found.B, axis=0), 1)
        np.testing.assert_allclose(np.linalg.norm(found.A, axis=1), 1)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_a_new_round_leaves_the_weight_alone(x64, m, n):
    parts = decompose(jax.random.key(0), weight(m, n, (3,)), 2)
    moved = constrained(parts._replace(B=parts.B + 0.3, A=parts.A - 0.2, S=parts.S - 1.0))
    assert (np.asarray(moved.S) == 0).any()
    new = next_round(jax.random.key(1), moved)
    np.testing.assert_allclose(new.weight(), moved.weight(), atol=1e-12)
    for layer in range(3):
        _, S, _ = np.linalg.svd(moved.weight()[layer], full_matrices=False)
        np.testing.assert_allclose(new.S[layer], S, atol=1e-12)
    eye = np.broadcast_to(np.eye(5), (3, 5, 5))
    np.testing.assert_allclose(new.U.mT @ new.U, eye, atol=1e-12)
    np.testing.assert_allclose(new.Vt @ new.Vt.mT, eye, atol=1e-12)
    # The active vectors are those in the places drawn, and nothing else is out of place.
    for one, other in zip(new.vectors, (new.U, new.Vt), strict=True):
        np.testing.assert_array_equal(one, other)


def test_layers_keep_their_own_vectors():
    parts = decompose(jax.random.key(0), weight(6, 4, (2,)).astype(jnp.float32), 2)
    assert parts.active.dtype == jnp.int32
    marked = parts._replace(B=jnp.full_like(parts.B, 7.0), A=jnp.full_like(parts.A, 9.0))
    U, Vt = marked.vectors
    for layer in range(2):
        places = np.asarray(parts.active[layer])
        assert (np.diff(places) > 0).all()
        rest = np.setdiff1d(np.arange(4), places)
        np.testing.assert_array_equal(U[layer][:, places], 7)
        np.testing.assert_array_equal(Vt[layer][places], 9)
        np.testing.assert_array_equal(U[layer][:, rest], parts.U[layer][:, rest])
        np.testing.assert_array_equal(Vt[layer][rest], parts.Vt[layer][rest])


def test_places_are_drawn_with_the_probabilities_of_the_method():
    S = jnp.array([3.0, 0.0, 1.0, 4.0])
    p = 0.5 * (1 / 4 + np.asarray(S) / 8)
    assert p.sum() == pytest.approx(1)
    keys = jax.random.split(jax.random.key(0), 20_000)
    found = np.asarray(jax.jit(jax.vmap(lambda key: draw_active(key, S, 2)))(keys))
    # One after the other, without replacement.
    expected = {
        (i, j): p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
        for i in range(4)
        for j in range(i + 1, 4)
    }
    for pair, chance in expected.items():
        assert np.mean((found == pair).all(axis=1)) == pytest.approx(chance, abs=0.012)
    # If all singular values are zero, every place is as likely.
    ones = jax.vmap(lambda key: draw_active(key, jnp.zeros(4), 1))(keys)
    np.testing.assert_allclose(np.bincount(np.ravel(ones)) / 20_000, 0.25, atol=0.012)


def test_dtypes_are_kept_and_a_zero_vector_stays_finite():
    parts = decompose(jax.random.key(0), jnp.eye(6, 4, dtype=jnp.bfloat16), 3)
    new = jax.eval_shape(lambda: next_round(jax.random.key(1), parts))
    assert new == jax.eval_shape(lambda: parts)
    zero = constrained(parts._replace(B=jnp.zeros_like(parts.B)))
    assert not zero.B.any()


@pytest.mark.parametrize("rank", [0, 5])
def test_ranks_that_do_not_fit_are_named(rank):
    with pytest.raises(ValueError, match=f"rank {rank} does not fit a matrix of shape"):
        decompose(jax.random.key(0), jnp.zeros((6, 4)), rank)
