"""Adam's moments where dtypes are narrow, complex or mixed, and numbers that are arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loro_jax import (
    LowRank,
    adam,
    exact_update,
    initialise,
    loro,
    orthogonal,
    scale_by_uncorrected_adam,
)
from loro_jax.checks import checked_numbers

NARROW = [jnp.bfloat16, jnp.float16]


def moments_after(tx, dtype, sizes):
    """The state after gradients of these sizes for three parameters of this dtype."""

    def step(state, size):
        return tx.update(jnp.full(3, size, dtype), state, jnp.zeros(3, dtype))[1], None

    return jax.lax.scan(step, tx.init(jnp.zeros(3, dtype)), jnp.asarray(sizes, jnp.float32))[0]


def averaged(decay, sizes):
    value = 0.0
    for size in sizes:
        value = decay * value + (1 - decay) * size
    return value


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("mu_dtype", [None, jnp.float32])
def test_the_second_moment_of_narrow_parameters_falls(dtype, mu_dtype):
    sizes = np.repeat([1.0, 2.0**-10], [500, 3000])
    state = moments_after(scale_by_uncorrected_adam(mu_dtype=mu_dtype), dtype, sizes)
    np.testing.assert_allclose(state.nu, averaged(0.999, sizes**2), rtol=1e-3)
    np.testing.assert_allclose(np.float32(state.mu), averaged(0.9, sizes), rtol=5e-2)


def test_squares_that_float16_does_not_have():
    for size in (2.0**-14, 2.0**10):
        state = moments_after(scale_by_uncorrected_adam(), jnp.float16, [size])
        np.testing.assert_allclose(state.nu, 1e-3 * size**2, rtol=1e-3)


@pytest.mark.parametrize("dtype", NARROW)
def test_a_slow_first_moment_falls_too(dtype):
    sizes = np.repeat([1.0, 0.0], [2000, 4000])
    state = moments_after(scale_by_uncorrected_adam(b1=0.9995), dtype, sizes)
    np.testing.assert_allclose(state.mu, averaged(0.9995, sizes), rtol=1e-3)
    params = {"w": LowRank(jnp.ones((6, 2), dtype), jnp.eye(2, 4, dtype=dtype))}
    for direction in (adam(b1=0.9995), orthogonal(0.9995)):
        tx = loro(0.01, exact_every=2, direction=direction, moments="keep")
        _, state = jax.eval_shape(tx.update, params, tx.init(params), params)
        assert state.factors.mu["w"].B.dtype == jnp.float32
    with pytest.raises(ValueError, match=r"in mu_dtype=bfloat16 .* b1=0.9995 never changes"):
        adam(b1=0.9995, mu_dtype=jnp.bfloat16)


@pytest.mark.parametrize("dtype", [*NARROW, jnp.float32])
@pytest.mark.parametrize("eps", [1e-6, 1e-8])
def test_zero_gradients_move_nothing(dtype, eps):
    params = {
        "w": LowRank(jnp.ones((6, 2), dtype), jnp.eye(2, 4, dtype=dtype)),
        "b": jnp.ones(3, dtype),
    }
    tx = loro(0.01, exact_every=None, direction=adam(eps=eps))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert all(not np.any(x) for x in jax.tree.leaves(updates))


@pytest.mark.parametrize("mu_dtype", [None, jnp.float32, jnp.bfloat16])
def test_the_moments_of_a_complex_leaf_are_those_of_its_modulus(mu_dtype):
    """As optax.scale_by_adam has them, when epsilon is small."""
    rng = np.random.default_rng(0)
    grads = (rng.normal(size=(5, 4)) + 1j * rng.normal(size=(5, 4))).astype(np.complex64)
    ours, theirs = (
        scale_by_uncorrected_adam(eps=1e-12, mu_dtype=mu_dtype),
        optax.scale_by_adam(eps=0),
    )
    params = jnp.zeros(4, jnp.complex64)
    state, expected_state = ours.init(params), theirs.init(params)
    for g in grads:
        found, state = ours.update(jnp.array(g), state)
        expected, expected_state = theirs.update(jnp.array(g), expected_state)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)
    assert (state.mu.dtype, state.nu.dtype) == (jnp.complex64, jnp.float32)
    np.testing.assert_allclose(
        state.nu, averaged(0.999, list(np.abs(grads.astype(np.complex128)) ** 2)), rtol=1e-4
    )


def test_a_complex_leaf_beside_a_pair_arrives():
    target = jnp.array([1 + 2j, -1j, 0.5], jnp.complex64)
    params = {"w": LowRank(jnp.ones((6, 2)), jnp.eye(2, 4)), "c": jnp.zeros(3, jnp.complex64)}

    def step(carry, _, tx):
        params, state = carry
        grads = jax.tree.map(jnp.zeros_like, params) | {"c": 2 * (params["c"] - target)}
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    # Numbers that inject_hyperparams hands over are complex here, as the widest dtype is.
    for factory in (loro, optax.inject_hyperparams(loro)):
        tx = factory(learning_rate=0.02, exact_every=None, weight_decay=0.0)
        start = (params, tx.init(params))
        (found, _), _ = jax.lax.scan(functools.partial(step, tx=tx), start, length=400)
        np.testing.assert_allclose(found["c"], target, atol=2e-2)
        assert found["w"].B.dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int32])
def test_an_exact_step_of_factors_that_are_not_real_is_an_error(dtype):
    B, A = jnp.ones((4, 2), dtype), jnp.ones((2, 3), dtype)
    with pytest.raises(
        ValueError, match=f"exact_update: expected real .* but B is {jnp.dtype(dtype)}"
    ):
        exact_update(B, A, B, A, 0.1)


@pytest.mark.parametrize("dtype", NARROW)
def test_injected_numbers_of_narrow_parameters(dtype):
    W = jax.random.normal(jax.random.key(7), (6, 5))
    pair = LowRank(*(x.astype(dtype) for x in initialise(jax.random.key(3), 6, 5, 2)))

    def loss(pair):
        return jnp.mean((pair.product().astype(jnp.float32) - W) ** 2)

    injected = optax.inject_hyperparams(loro)
    tx = injected(learning_rate=0.02, exact_every=None)
    params, state, step = pair, tx.init(pair), jax.jit(tx.update)
    for _ in range(20):
        updates, state = step(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    assert loss(params) < 0.9 * loss(pair)

    def of_adam(learning_rate, b1=None, b2=None, eps=None):
        given = {"b1": b1, "b2": b2, "eps": eps}
        given = {name: value for name, value in given.items() if value is not None}
        return loro(learning_rate, direction=adam(**given))

    for factory, name, value in (
        (of_adam, "b1", 0.9),
        (of_adam, "b2", 0.999),
        (of_adam, "eps", 1e-8),
        (loro, "damping", 1e-8),
    ):
        tx = optax.inject_hyperparams(factory)(learning_rate=0.02, **{name: value})
        message = (
            rf"(adam|loro): {name} is an array of {jnp.dtype(dtype)}.* hyperparam_dtype=jnp.float32"
        )
        with pytest.raises(ValueError, match=message):
            tx.init(pair)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(tx.init, pair)
    wide = optax.inject_hyperparams(of_adam, hyperparam_dtype=jnp.float32)(
        learning_rate=0.02, b2=0.999
    )
    assert wide.init(pair).hyperparams["b2"].dtype == jnp.float32


def test_numbers_as_arrays():
    assert checked_numbers("f", learning_rate=jnp.bfloat16(0.5), lr_scale=None) == [0.5, None]
    assert checked_numbers("f", b2=np.float64(0.999))[0] == 0.999
    real = checked_numbers("f", b2=jnp.complex64(0.999))[0]
    assert (real.dtype, float(real)) == (jnp.float32, float(jnp.float32(0.999)))
    with pytest.raises(ValueError, match="f: momentum is an array of int32"):
        checked_numbers("f", momentum=jnp.int32(0.95))
    with pytest.raises(ValueError, match="orthogonal: momentum is an array of bfloat16"):
        orthogonal(jnp.bfloat16(0.95))
