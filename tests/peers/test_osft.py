import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loro_jax.errors import TrainingError
from loro_jax.peers.osft import Split, cleaned, next_task, split, with_projected_gradient
from loro_jax.training.config import Config
from loro_jax.training.methods import make_maintenance, make_optimizer
from models import preset
from tests.peers.projected_methods import adam_direction

CONFIG = Config(
    method="osft",
    steps=20,
    warmup_steps=0,
    final_lr_ratio=1.0,
    learning_rate=0.1,
    eps=1e-8,
    model=preset("tiny", rank=2),
)


def draw(*shape, seed=0):
    return jnp.array(np.random.default_rng(seed).normal(size=shape))


def trained(parts, x, target, steps, **options):
    """The parts after each step of the trainer's optimizer on a least-squares problem."""
    config = dataclasses.replace(CONFIG, method_options=options)
    tx, after = make_optimizer(config), make_maintenance(config).after
    names = ("B", "S", "A")
    params = {"up": {name: getattr(parts, name) for name in names}}
    fixed = {"up": {name: getattr(parts, name) for name in Split._fields if name not in names}}
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        def loss(params):
            now = Split(**params["up"], **fixed["up"])
            B = with_projected_gradient(now.B, now.U_high)
            A = with_projected_gradient(now.A.mT, now.Vt_high.mT).mT
            return 0.5 * jnp.sum((x @ now._replace(B=B, A=A).weight().T - target) ** 2)

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        return after(1, params, fixed, state)[::2] if after is not None else (params, state)

    for _ in range(steps):
        params, state = step(params, state)
        yield Split(**params["up"], **fixed["up"])


def in_numpy(W, rank, x, target, steps, lr=0.1):
    """The weights after each step, and the directions of the first one's gradients."""
    U, s, Vt = np.linalg.svd(W, full_matrices=False)
    k = len(s) - rank
    Uh, sh, Vh, values = U[:, :k], s[:k], Vt[:k], [U[:, k:], s[k:], Vt[k:]]
    moments = [(0.0, 0.0)] * 3
    for t in range(1, steps + 1):
        B, S, A = values
        G = (x @ ((Uh * sh) @ Vh + (B * S) @ A).T - target).T @ x
        dB, dA = G @ A.T * S, S[:, None] * (B.T @ G)
        grads = [dB - Uh @ (Uh.T @ dB), np.diag(B.T @ G @ A.T), dA - (dA @ Vh.T) @ Vh]
        moments = [
            (0.9 * mu + 0.1 * g, 0.999 * nu + 0.001 * g**2)
            for (mu, nu), g in zip(moments, grads, strict=True)
        ]
        values = [
            v - lr * adam_direction(mu, nu, t) for v, (mu, nu) in zip(values, moments, strict=True)
        ]
        yield (Uh * sh) @ Vh + (values[0] * values[1]) @ values[2]


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
def test_steps_and_the_end_of_a_task_are_those_of_the_equations(x64, shape):
    W, x = draw(*shape), draw(7, shape[1], seed=1)
    parts = split(W, 2)
    for task in range(2):
        target = draw(7, shape[0], seed=2 + task)
        np.testing.assert_allclose(parts.weight(), W, atol=1e-12)
        expected = in_numpy(*map(np.asarray, (W, 2, x, target)), 5)
        for now, weight in zip(trained(parts, x, target, 5), expected, strict=True):
            np.testing.assert_allclose(now.weight(), weight, rtol=1e-6, atol=1e-7)
        parts, W = next_task(now), now.weight()


def test_gradients_have_no_part_along_what_is_kept(x64):
    parts = split(draw(3, 6, 9), 2)
    assert parts.U_high.shape == (3, 6, 4)

    def loss(B, A):
        return jnp.sum(jnp.sin(with_projected_gradient(B, parts.U_high))) + jnp.sum(
            jnp.sin(with_projected_gradient(A.mT, parts.Vt_high.mT))
        )

    dB, dA = jax.grad(loss, (0, 1))(parts.B, parts.A)
    np.testing.assert_allclose(parts.U_high.mT @ dB, 0, atol=1e-12)
    np.testing.assert_allclose(dA @ parts.Vt_high.mT, 0, atol=1e-12)
    assert jnp.linalg.norm(dB) > 0.1
    # What is left is the gradient of the complement.
    plain = jnp.cos(parts.B)
    rest = np.eye(6) - parts.U_high @ parts.U_high.mT
    np.testing.assert_allclose(dB, rest @ plain, atol=1e-12)


@pytest.mark.parametrize("project_steps", [False, True])
def test_inputs_of_kept_directions_are_mapped_as_before(x64, project_steps):
    """All of the change is by the trained part; with projected steps there is none."""
    W, x, target = draw(6, 9), draw(7, 9, seed=1), draw(7, 6, seed=2)
    parts = split(W, 2)
    *_, after = trained(parts, x, target, 4, project_steps=project_steps)
    assert np.linalg.norm(after.weight() - W) > 0.1
    kept = draw(5, 4, seed=3) @ parts.Vt_high
    change = kept @ (after.weight() - W).T
    np.testing.assert_allclose(change, ((kept @ after.A.T) * after.S) @ after.B.T, atol=1e-12)
    assert (np.linalg.norm(change) < 1e-12) == project_steps
    outputs = after.U_high.T @ (after.weight() - W)
    assert (np.linalg.norm(outputs) < 1e-12) == project_steps
    again = cleaned(after)
    np.testing.assert_allclose(again.U_high.T @ again.B, 0, atol=1e-12)
    np.testing.assert_allclose(again.A @ again.Vt_high.T, 0, atol=1e-12)


@pytest.mark.parametrize("rank", [0, 4])
def test_ranks_that_do_not_fit_are_named(rank):
    with pytest.raises(ValueError, match=f"{rank} trained directions do not fit"):
        split(jnp.zeros((6, 4)), rank)
    if rank:
        with pytest.raises(TrainingError, match="between 1 and 31, one less than the smaller side"):
            dataclasses.replace(CONFIG, model=preset("tiny", rank=32)).validate()
