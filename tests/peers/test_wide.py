"""Methods with Optax's Adam in bfloat16, against the same in float32."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loro_jax import LowRank
from loro_jax.peers.lift import lift
from loro_jax.peers.muon import muon
from loro_jax.peers.restarts import lowrank_restarts
from loro_jax.peers.wide import in_float32

DENSE = {"w": jnp.ones((4, 6)), "b": jnp.ones(6)}
PROJECTED = {"w": True, "b": False}
METHODS = {
    "muon": (muon(0.1, projected=PROJECTED), DENSE),
    "lift": (lift(0.1, 1, projected=PROJECTED, b2=0.999), DENSE),
    "restarts": (
        lowrank_restarts(0.1, every=10_000),
        {"w": LowRank(jnp.ones((6, 2)), jnp.ones((2, 4))), "b": jnp.ones(6)},
    ),
}


def after_a_large_gradient(tx, params, steps=1_000):
    """Returns the last update of steps with small gradients after a large one, and the state."""
    large = jax.tree.map(lambda p: jnp.full_like(p, 8), params)
    small = jax.tree.map(lambda p: jnp.full_like(p, 0.125), params)

    @jax.jit
    def run():
        _, state = tx.update(large, tx.init(params), params)

        def step(carry, _):
            return tx.update(small, carry[1], params), None

        # The updates of the scan's start only have the right form.
        return jax.lax.scan(step, (small, state), length=steps)[0]

    return run()


@pytest.mark.parametrize("method", METHODS)
def test_the_second_moment_decays_in_bfloat16(method):
    tx, params = METHODS[method]
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    expected, others = after_a_large_gradient(tx, params)
    got, state = after_a_large_gradient(tx, narrow)
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}
    chex.assert_trees_all_equal_dtypes(state, others)
    chex.assert_trees_all_close(state, others, rtol=1e-5)
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), got)
    # One rounding to bfloat16, of 1 / 256.
    chex.assert_trees_all_close(rounded, expected, rtol=5e-3, atol=1e-6)


def test_optax_alone_keeps_it_for_ever():
    W = jnp.ones(3, jnp.bfloat16)
    _, alone = after_a_large_gradient(optax.scale_by_adam(), W)
    _, wide = after_a_large_gradient(in_float32(optax.scale_by_adam()), W)
    # 64 / 1000, times 0.999 ** 1000 when it decays, and the small ones' squares.
    np.testing.assert_allclose(alone.nu, 0.064, rtol=1e-2)
    np.testing.assert_allclose(wide.nu, 0.064 * 0.999**1000 + (1 - 0.999**1000) / 64, rtol=1e-3)


def test_float32_is_left_as_it_is():
    tx = optax.adamw(0.1, weight_decay=0.1)
    for one, other in zip(
        after_a_large_gradient(tx, DENSE, 3),
        after_a_large_gradient(in_float32(tx), DENSE, 3),
        strict=True,
    ):
        chex.assert_trees_all_equal(one, other)


def test_updates_without_parameters_have_the_gradients_dtype():
    tx, W = in_float32(optax.scale_by_adam()), jnp.ones(3, jnp.bfloat16)
    updates, _ = tx.update(W, tx.init(W), extra=1)
    assert updates.dtype == jnp.bfloat16
