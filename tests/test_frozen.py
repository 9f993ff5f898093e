"""What stays where it is: frozen factors, leaves without weight decay, state that is no moment."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loro_jax import LowRank, initialise, loro
from loro_jax.refresh import refreshed

PAIR = LowRank(*initialise(jax.random.key(0), 6, 5, 2))
PARAMS = {"w": PAIR, "norm": jnp.ones(3)}


def matrices(tree):
    return jax.tree.map(lambda x: x.ndim > 1, tree)


class CallableMask(dict):
    """A tree that can be called, as modules can."""

    def __call__(self, x):
        raise AssertionError("a mask that is a tree must not be called")


jax.tree_util.register_pytree_node(
    CallableMask,
    lambda node: (tuple(node.values()), tuple(node)),
    lambda keys, values: CallableMask(zip(keys, values, strict=True)),
)


@pytest.mark.parametrize("moments", ["reset", "transport"])
@pytest.mark.parametrize("frozen", ["A", "B"])
def test_a_factor_without_a_gradient_stays(frozen, moments):
    tx = loro(0.01, exact_every=2, moments=moments, exact_method="svd")
    plain = loro(0.01, exact_every=None)
    grads = {"w": LowRank(PAIR.B, PAIR.A), "norm": jnp.ones(3)}
    setattr(grads["w"], frozen, jnp.zeros_like(getattr(PAIR, frozen)))
    holes = {"w": LowRank.tree_unflatten(None, (PAIR.B, PAIR.A)), "norm": jnp.ones(3)}
    setattr(holes["w"], frozen, None)
    state, right_state, holes_state = tx.init(PARAMS), plain.init(PARAMS), tx.init(PARAMS)
    step = jax.jit(tx.update)
    for _ in range(2):
        updates, state = step(grads, state, PARAMS)
        right, right_state = plain.update(grads, right_state, PARAMS)
        without, holes_state = step(holes, holes_state, PARAMS)
    assert not np.any(getattr(updates["w"], frozen))
    assert getattr(without["w"], frozen) is None
    other = "B" if frozen == "A" else "A"
    for found in (updates, without):
        np.testing.assert_allclose(
            getattr(found["w"], other), getattr(right["w"], other), rtol=1e-5
        )


def test_a_lone_factor_is_a_parameter_like_others():
    params = {"w": PAIR, "half": LowRank.tree_unflatten(None, (jnp.ones((4, 2)), None))}
    tx = loro(0.1, exact_every=1)
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["half"].B, -0.1, rtol=1e-3)
    assert updates["half"].A is None


def test_gradients_of_another_structure_are_refused():
    tx = loro(0.1)
    with pytest.raises(ValueError, match="1 leaves for parameters with 3"):
        tx.update({"norm": jnp.ones(3)}, tx.init(PARAMS), PARAMS)


def test_without_weight_decay_updates_do_not_read_the_parameters():
    """A copy of every large parameter is saved; 0 times infinity would be NaN."""
    params = {"B": jnp.ones((4, 2)), "A": jnp.ones((2, 3)), "bias": jnp.full(3, jnp.inf)}
    grads = jax.tree.map(jnp.ones_like, params)
    for decay, finite in ((0.0, True), (0, True), (jnp.zeros([]), False)):
        tx = loro(0.1, exact_every=None, weight_decay=decay)
        updates, _ = tx.update(grads, tx.init(params), params)
        assert bool(jnp.isfinite(updates["bias"]).all()) is finite


@pytest.mark.parametrize(
    "mask",
    [
        matrices,
        matrices(PARAMS),
        {"w": True, "norm": False},
        CallableMask(norm=False, w=True),
    ],
)
def test_weight_decay_is_for_the_leaves_of_its_mask(mask):
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    params = PARAMS
    if isinstance(mask, CallableMask):
        params, zeros = CallableMask(sorted(PARAMS.items())), CallableMask(sorted(zeros.items()))
    tx = loro(0.1, exact_every=None, weight_decay=(0.1, mask))
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_array_equal(updates["norm"], 0)
    np.testing.assert_allclose(updates["w"].B, -0.1 * 0.1 * 2 / 5 * PAIR.B, rtol=1e-5)


@pytest.mark.slow
def test_exact_steps_decay_by_the_mask():
    def product(**options):
        tx = loro(0.1, exact_every=1, **options)
        updates, _ = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
        return jax.tree.map(jnp.add, PARAMS, updates)["w"].product()

    bare = product()
    np.testing.assert_array_equal(product(weight_decay=(0.5, {"w": False, "norm": True})), bare)
    keep = 1 - 0.1 * 2 / 5 * 0.5
    of_B_alone = {"w": LowRank.tree_unflatten(None, (True, False)), "norm": False}
    one = product(weight_decay=(0.5, of_B_alone))
    np.testing.assert_allclose(one, keep * bare, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(product(weight_decay=0.5), keep**2 * bare, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", [{"w": True}, {"w": 1.0, "norm": 0.0}, "norm"])
def test_a_mask_that_does_not_fit_is_named(mask):
    tx = loro(0.1, weight_decay=(0.1, mask))
    with pytest.raises(ValueError, match="loro: the mask of weight_decay"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_a_refresh_drops_moments_alone():
    direction = optax.chain(
        optax.add_noise(0.1, 0.5, 0),
        optax.inject_hyperparams(optax.scale_by_adam)(b1=0.9),
        optax.scale_by_schedule(lambda count: 1.0 / (1 + count)),
    )
    tx = loro(0.01, exact_every=2, direction=direction)
    state, step = tx.init(PARAMS), jax.jit(tx.update)
    _, state = step(PARAMS, state, PARAMS)
    noise, injected, schedule = state.factors
    injected = injected._replace(hyperparams={**injected.hyperparams, "b1": jnp.float32(0.5)})
    state = state._replace(factors=(noise, injected, schedule))
    for _ in range(2):
        _, state = step(PARAMS, state, PARAMS)
    for part in (state.factors, state.regular):
        noise, injected, schedule = part
        assert int(noise.count) == int(schedule.count) == int(injected.count) == 3
        assert int(injected.inner_state.count) == 1
    assert float(state.factors[1].hyperparams["b1"]) == 0.5
    fresh = direction.init(PARAMS)[0]
    assert not np.array_equal(jax.tree.leaves(noise.rng_key)[0], jax.tree.leaves(fresh.rng_key)[0])


def test_what_counts_as_a_moment():
    params = {"x": jnp.ones(2), "y": optax.MaskedNode()}
    state = {"m": params, "t": jnp.int32(4), "rate": jnp.float32(3.0), "inner": (jnp.int32(5),)}
    fresh = jax.tree.map(jnp.zeros_like, state)
    found = refreshed(jnp.bool_(True), fresh, state, params)
    assert found["m"]["x"].tolist() == [0.0, 0.0]
    assert (int(found["t"]), float(found["rate"]), int(found["inner"][0])) == (0, 3.0, 5)
    kept = refreshed(jnp.bool_(False), fresh, state, params)
    chex.assert_trees_all_equal(kept, state)
