"""What the tests of GaLore, Fira and AdaRankGrad share: gradients, runs, and checks for all."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

B1, B2, EPS = 0.9, 0.999, 1e-8
SETTINGS = {"b1": B1, "b2": B2, "eps": EPS}


def gradients(shape, steps, seed=0, dtype=jnp.float32):
    """Gradients with well separated singular values, so that subspaces are well defined."""
    rng = np.random.default_rng(seed)
    k = min(shape[-2:])
    decay = 3.0 ** -np.arange(k)
    found = []
    for _ in range(steps):
        U, _, Vt = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
        found.append(jnp.asarray((U * decay) @ Vt, dtype))
    return found


def run(tx, params, grads, jit=True):
    """All updates and all states after the first."""
    update = jax.jit(tx.update) if jit else tx.update
    state, updates, states = tx.init(params), [], []
    for G in grads:
        move, state = update(G, state, params)
        updates.append(move)
        states.append(state)
        params = optax.apply_updates(params, move)
    return updates, states


def oriented(X):
    """The smaller side first, as the methods see a matrix."""
    return X.T if X.shape[0] > X.shape[1] else X


def same_signs(U, P):
    """Singular vectors U with the signs of P's columns, which an SVD leaves open."""
    cosines = np.sum(U * P, axis=0)
    np.testing.assert_allclose(np.abs(cosines), 1, rtol=1e-8)
    return U * np.sign(cosines)


def adam_direction(mu, nu, t):
    return (mu / (1 - B1**t)) / (np.sqrt(nu / (1 - B2**t)) + EPS)


def adam_in_numpy(grads):
    """Directions of plain Adam."""
    mu = nu = 0.0
    found = []
    for t, G in enumerate(grads, start=1):
        mu, nu = B1 * mu + (1 - B1) * G, B2 * nu + (1 - B2) * G**2
        found.append(adam_direction(mu, nu, t))
    return found


class CommonChecks:
    """Holds for every method; a subclass sets ``make`` (learning_rate, rank, **settings)."""

    @staticmethod
    def make(learning_rate, rank, **settings):
        raise NotImplementedError

    @pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
    def test_stacked_layers_equal_one_by_one(self, shape):
        tx = self.make(0.1, 2, projected={"w": True}, update_every=2)
        grads = gradients((2, *shape), 5)
        stacked, _ = run(tx, {"w": jnp.zeros((2, *shape))}, [{"w": G} for G in grads])
        for layer in range(2):
            alone, _ = run(tx, {"w": jnp.zeros(shape)}, [{"w": G[layer]} for G in grads])
            for together, single in zip(stacked, alone, strict=True):
                np.testing.assert_allclose(together["w"][layer], single["w"], rtol=1e-4, atol=1e-6)

    def test_other_leaves_get_plain_adam(self):
        params = {"w": jnp.ones((4, 6)), "dense": jnp.ones((4, 6)), "b": jnp.ones(4)}
        tx = self.make(0.1, 2, projected={"w": True, "dense": False, "b": False}, **SETTINGS)
        grads = [{"w": G, "dense": 2 * G + 1, "b": G[:, 0]} for G in gradients((4, 6), 4)]
        got, _ = run(tx, params, grads)
        expected, _ = run(optax.adam(0.1, B1, B2, EPS), params, grads)
        for mine, theirs in zip(got, expected, strict=True):
            np.testing.assert_allclose(mine["dense"], theirs["dense"], rtol=1e-5)
            np.testing.assert_allclose(mine["b"], theirs["b"], rtol=1e-5)
            assert not np.allclose(mine["w"], theirs["w"], rtol=1e-2)

    def test_jit_equals_no_jit(self):
        tx = self.make(0.1, 2, projected={"w": True}, update_every=2)
        params = {"w": jnp.zeros((4, 6))}
        grads = [{"w": G} for G in gradients((4, 6), 1)]
        for one, other in zip(
            run(tx, params, grads)[0], run(tx, params, grads, jit=False)[0], strict=True
        ):
            np.testing.assert_allclose(one["w"], other["w"], rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_one_trace_and_a_stable_state(self, dtype):
        traces = []
        tx = self.make(0.1, 2, projected=lambda params: {"w": True, "b": False}, update_every=2)

        @jax.jit
        def update(grads, state, params):
            traces.append(0)
            return tx.update(grads, state, params)

        params = {"w": jnp.ones((2, 4, 6), dtype), "b": jnp.ones(3, dtype)}
        state = tx.init(params)
        kinds = jax.tree.map(lambda x: (x.shape, x.dtype), state)
        for G in gradients((2, 4, 6), 3, dtype=dtype):
            updates, state = update({"w": G, "b": jnp.ones(3, dtype)}, state, params)
            assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == kinds
            assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(updates))
        assert len(traces) == 1
        assert all(leaf.dtype in (jnp.float32, jnp.int32) for leaf in jax.tree.leaves(state))
        # Both branches must agree: that is checked while tracing.
        jax.eval_shape(
            lambda s: jax.lax.cond(True, lambda s: update(updates, s, params)[1], lambda s: s, s),
            state,
        )

    def test_bfloat16_is_computed_in_float32(self):
        tx = self.make(0.1, 2, projected={"w": True}, update_every=2)
        narrow = [{"w": G} for G in gradients((4, 6), 3, dtype=jnp.bfloat16)]
        wide = [{"w": G["w"].astype(jnp.float32)} for G in narrow]
        got, states = run(tx, {"w": jnp.zeros((4, 6), jnp.bfloat16)}, narrow)
        expected, others = run(tx, {"w": jnp.zeros((4, 6))}, wide)
        for mine, theirs in zip(got, expected, strict=True):
            np.testing.assert_array_equal(mine["w"], theirs["w"].astype(jnp.bfloat16))
        np.testing.assert_array_equal(states[-1].nu["w"], others[-1].nu["w"])

    def test_schedule_and_decoupled_decay(self):
        params = {"w": jnp.full((4, 6), 2.0), "b": jnp.full(3, 2.0)}
        grads = {"w": gradients((4, 6), 1)[0], "b": jnp.ones(3)}
        spec = {"w": True, "b": False}
        schedule = lambda count: 0.5 / (count + 1)  # noqa: E731
        plain = self.make(1.0, 2, projected=spec)
        tx = self.make(schedule, 2, projected=spec, weight_decay=0.1)
        state, bare = tx.init(params), plain.init(params)
        for rate in (0.5, 0.25):
            updates, state = jax.jit(tx.update)(grads, state, params)
            directions, bare = jax.jit(plain.update)(grads, bare, params)
            for name in params:
                expected = rate * (directions[name] - 0.1 * params[name])
                np.testing.assert_allclose(updates[name], expected, rtol=1e-5, atol=1e-7)
        with pytest.raises(ValueError, match="needs params"):
            tx.update(grads, state)

    def test_the_svd_is_computed_only_where_a_projector_is_renewed(self):
        tx = self.make(0.1, 2, projected={"w": True}, update_every=2)
        params = {"w": jnp.ones((2, 4, 6))}
        jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params).jaxpr
        outside = {equation.primitive.name for equation in jaxpr.eqns}
        assert "cond" in outside
        assert not outside & {"svd", "qr", "geqrf", "eigh", "custom_vmap_call"}

    def test_zero_gradients_do_no_harm(self):
        tx = self.make(0.1, 2, projected={"w": True}, update_every=2)
        grads = [{"w": G} for G in (jnp.zeros((4, 6)), *gradients((4, 6), 3), jnp.zeros((4, 6)))]
        updates, states = run(tx, {"w": jnp.ones((4, 6))}, grads)
        assert not np.any(updates[0]["w"])
        chex.assert_tree_all_finite((updates, states))

    def test_chains_and_optax_tree_maps(self):
        params = {"w": jnp.ones((4, 6)), "b": jnp.ones(3)}
        tx = optax.chain(
            optax.clip_by_global_norm(1.0), self.make(0.1, 2, projected={"w": True, "b": False})
        )
        state = tx.init(params)
        updates, state = jax.jit(tx.update)(params, state, params, value=1.0)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        doubled = optax.tree_utils.tree_map_params(tx, lambda x: 2 * x, state)
        np.testing.assert_array_equal(doubled[1].nu["b"], 2 * state[1].nu["b"])
        assert int(doubled[1].count) == int(state[1].count) == 1

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"rank": 0}, "rank must be a whole number of at least 1, is 0"),
            ({"rank": 1.5}, "rank must be a whole number"),
            ({"update_every": 0}, "update_every must be a whole number"),
            ({"b1": 1.0}, "b1 must be at least 0 and below 1, is 1.0"),
            ({"b2": -0.1}, "b2 must be at least 0"),
            ({"eps": -1.0}, "eps must not be negative"),
            ({"weight_decay": -1.0}, "weight_decay must not be negative"),
        ],
    )
    def test_bad_settings(self, settings, message):
        settings = {"rank": 2, "projected": {"w": True}, **settings}
        with pytest.raises(ValueError, match=message):
            self.make(0.1, settings.pop("rank"), **settings)

    @pytest.mark.parametrize(
        ("projected", "message"),
        [
            ({"w": True}, "parameters' structure"),
            ({"w": 1, "b": False}, "must hold bools, but has 1 at"),
            ({"w": True, "b": True}, r"\['b'\] has shape \(3,\)"),
        ],
    )
    def test_bad_projected(self, projected, message):
        params = {"w": jnp.ones((4, 6)), "b": jnp.ones(3)}
        with pytest.raises(ValueError, match=message):
            self.make(0.1, 2, projected=projected).init(params)

    def test_a_rank_beyond_the_smaller_side(self):
        tx = self.make(0.1, 5, projected={"w": True})
        with pytest.raises(ValueError, match=r"shape \(2, 9, 4\).*at least the rank 5"):
            tx.init({"w": jnp.ones((2, 9, 4))})
