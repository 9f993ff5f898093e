import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loro_jax import LowRank
from loro_jax.peers.restarts import lowrank_restarts, svd_projection

EVERY = 3


def problem():
    rng = np.random.default_rng(0)
    params = {
        "w": LowRank(
            jnp.asarray(rng.standard_normal((2, 8, 3)), jnp.float32),
            jnp.asarray(rng.standard_normal((2, 3, 6)), jnp.float32),
        ),
        "bias": jnp.asarray(rng.standard_normal(8), jnp.float32),
    }
    target = jnp.asarray(rng.standard_normal((2, 8, 6)), jnp.float32)
    return params, lambda p: jnp.sum((p["w"].product() - target + p["bias"][:, None]) ** 2)


class NumpyAdam:
    """The textbook's Adam on one array, in float64."""

    def __init__(self):
        self.restart()

    def restart(self):
        self.t, self.m, self.v = 0, 0.0, 0.0

    def __call__(self, g, b1=0.9, b2=0.999, eps=1e-8):
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g**2
        return self.m / (1 - b1**self.t) / (np.sqrt(self.v / (1 - b2**self.t)) + eps)


@pytest.mark.parametrize("method", [lowrank_restarts, svd_projection])
def test_seven_steps_are_those_of_the_definition(method):
    params, loss = problem()
    tx = method(0.05, every=EVERY)
    state = tx.init(params)
    scale = 1.0 if method is lowrank_restarts else 3 / 6
    reference = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(params)]
    adams = [NumpyAdam() for _ in reference]
    structure = jax.tree.structure(params)
    for step in range(1, 8):
        as_float32 = [jnp.asarray(leaf, jnp.float32) for leaf in reference]
        grads = jax.tree.leaves(jax.grad(loss)(jax.tree.unflatten(structure, as_float32)))
        bias, B, A = reference
        moves = [adam(np.asarray(g, np.float64)) for adam, g in zip(adams, grads, strict=True)]
        reference[0] = bias - 0.05 * moves[0]
        B, A = B - 0.05 * scale * moves[1], A - 0.05 * scale * moves[2]
        if step % EVERY == 0:
            U, s, Vt = np.linalg.svd(B @ A, full_matrices=False)
            root = np.sqrt(s[:, None, :3])
            B, A = U[..., :3] * root, np.swapaxes(root, 1, 2) * Vt[:, :3]
            for adam in adams:
                adam.restart()
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        product = np.asarray(params["w"].product(), np.float64)
        np.testing.assert_allclose(product, B @ A, atol=2e-4)
        if step % EVERY == 0:
            # The signs of singular vectors are anyone's: go on from ours.
            gram = np.swapaxes(params["w"].B, 1, 2) @ np.asarray(params["w"].B)
            np.testing.assert_allclose(
                gram, params["w"].A @ np.swapaxes(params["w"].A, 1, 2), atol=1e-4
            )
            assert np.abs(gram - gram * np.eye(3)).max() < 1e-4
            B, A = (np.asarray(x, np.float64) for x in (params["w"].B, params["w"].A))
        reference[1], reference[2] = B, A
        np.testing.assert_allclose(params["bias"], reference[0], atol=2e-4)


@pytest.mark.parametrize("method", [lowrank_restarts, svd_projection])
def test_the_loss_falls_under_jit(method):
    params, loss = problem()
    tx = method(0.02, every=10)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, first = tx.init(params), loss(params)
    for _ in range(100):
        params, state = step(params, state)
    assert loss(params) < 0.5 * first
    assert step._cache_size() == 1


def test_bad_intervals_are_named():
    with pytest.raises(ValueError, match="exact_every must be at least 1"):
        lowrank_restarts(0.1, every=0)
