"""CoSO against its equations in NumPy over two tasks, GaLore, and the properties of its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loro_jax.memory import count_bytes
from loro_jax.peers.coso import coso, grown_memory, next_task, shrunk
from loro_jax.peers.galore import galore
from tests.peers.projected_methods import (
    B1,
    B2,
    SETTINGS,
    CommonChecks,
    adam_direction,
    gradients,
    oriented,
    run,
    same_signs,
)


@pytest.mark.slow
class TestCommon(CommonChecks):
    make = staticmethod(coso)


def algorithm(grads, projectors, M, rank, size, every):
    """Directions of a task, and its sketch; the given projectors lend their columns' signs."""
    mu = nu = 0.0
    S = np.zeros((len(M), 0))
    found = []
    for t, G in enumerate(map(oriented, grads)):
        G = G - M @ (M.T @ G)
        if t % every == 0:
            U, s, _ = np.linalg.svd(G, full_matrices=False)
            P = same_signs(U[:, :rank], projectors[t])
            V, e, _ = np.linalg.svd(np.hstack([S, U[:, :size] * s[:size]]), full_matrices=False)
            least = e[size] if len(e) > size else 0.0
            S = V[:, :size] * np.sqrt(np.maximum(e[:size] ** 2 - least**2, 0))
        R = P.T @ G
        mu, nu = B1 * mu + (1 - B1) * R, B2 * nu + (1 - B2) * R**2
        found.append(P @ adam_direction(mu, nu, t + 1))
    return found, S


def remembered(M, S, threshold):
    """The memory with the sketch's leading directions."""
    U, s, _ = np.linalg.svd(S, full_matrices=False)
    shares = np.cumsum(s**2) / np.sum(s**2)
    return np.hstack([M, U[:, : np.argmax(shares >= threshold) + 1]])


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_two_tasks_are_those_of_the_equations(x64, shape):
    settings = {"update_every": 2, "sketch_rank": 3, "memory": 0.7, **SETTINGS}
    tx = coso(0.1, 2, projected=True, **settings)
    params = jnp.zeros(shape, jnp.float64)
    state, update, M = tx.init(params), jax.jit(tx.update), np.zeros((6, 0))
    for task in range(2):
        grads, moves, states = gradients(shape, 5, task, jnp.float64), [], []
        for G in grads:
            move, state = update(G, state, params)
            moves.append(oriented(np.asarray(move)))
            states.append(state)
        projectors = [np.asarray(state.projector) for state in states]
        expected, S = algorithm([np.asarray(G) for G in grads], projectors, M, 2, 3, 2)
        for got, direction in zip(moves, expected, strict=True):
            np.testing.assert_allclose(got, -0.1 * direction, rtol=1e-7, atol=1e-12)
            np.testing.assert_allclose(M.T @ got, 0, atol=1e-14)
        np.testing.assert_allclose(state.sketch @ state.sketch.T, S @ S.T, atol=1e-12)
        for P in projectors:
            np.testing.assert_allclose(M.T @ P, 0, atol=1e-12)
        state = next_task(state, threshold=0.9)
        M = remembered(M, S, 0.9)
        number = int(state.remembered)
        assert number == M.shape[1] > 0
        np.testing.assert_allclose(state.memory @ state.memory.T, M @ M.T, atol=1e-10)
        held = np.asarray(state.memory)
        np.testing.assert_allclose(
            held[:, :number].T @ held[:, :number], np.eye(number), atol=1e-12
        )
        assert not held[:, number:].any()
        assert not any(np.any(x) for x in (state.count, state.mu, state.nu, state.sketch))
    assert held.shape[1] == 4


@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_the_first_task_is_galore(shape):
    grads = gradients(shape, 6)
    settings = {"projected": True, "update_every": 2, "scale": 0.5}
    got, _ = run(coso(0.1, 2, **settings), jnp.zeros(shape), grads)
    expected, _ = run(galore(0.1, 2, **settings), jnp.zeros(shape), grads)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_the_error_of_the_sketch_is_bounded(x64):
    rng = np.random.default_rng(0)
    size, sketch, columns = 4, jnp.zeros((9, 4)), []
    for _ in range(12):
        new = rng.normal(size=(9, 4)) * 2.0 ** -np.arange(9)[:, None]
        columns.append(new)
        sketch = shrunk(sketch, jnp.asarray(new))
    C = np.hstack(columns)
    error = np.linalg.norm(C @ C.T - np.asarray(sketch @ sketch.T), 2)
    s = np.linalg.svd(C, compute_uv=False)
    for k in range(size):
        assert error <= np.sum(s[k:] ** 2) / (size + 1 - k) + 1e-12
    assert error > 1e-3  # something was left out


def test_a_full_memory_takes_what_it_has_columns_for():
    sketch = jnp.diag(jnp.array([3.0, 2.0, 1.0, 0.0]))
    one, number = grown_memory(jnp.zeros((4, 2)), jnp.int32(0), sketch, 0.999)
    assert int(number) == 2
    np.testing.assert_allclose(np.abs(one), np.eye(4, 2), atol=1e-6)
    again, number = grown_memory(one, number, jnp.eye(4)[:, 2:], 0.5)
    assert int(number) == 2
    np.testing.assert_array_equal(again, one)
    # An empty sketch adds nothing.
    assert int(grown_memory(jnp.zeros((4, 2)), jnp.int32(0), jnp.zeros((4, 3)), 0.98)[1]) == 0


def test_where_all_is_remembered_nothing_moves():
    params = {"w": jnp.ones((2, 4, 6)), "b": jnp.ones(3)}
    tx = coso(0.1, 2, projected={"w": True, "b": False}, memory=1.0)
    grads = [{"w": G, "b": G[0, 0, :3]} for G in gradients((2, 4, 6), 4)]
    _, states = run(tx, params, grads)
    state = next_task(states[-1], threshold=1.0)
    assert state.remembered["w"].tolist() == [4, 4]
    updates, state = jax.jit(tx.update)(grads[0], state, params)
    np.testing.assert_allclose(updates["w"], 0, atol=1e-6)
    assert np.abs(updates["b"]).min() > 0.09
    assert state.memory["b"].shape == ()


def test_the_size_of_the_state():
    params = {"w": jnp.ones((3, 40, 60), jnp.bfloat16), "b": jnp.ones(40)}
    tx = coso(0.1, 4, projected={"w": True, "b": False}, sketch_rank=10, memory=0.25)
    state = jax.eval_shape(tx.init, params)
    each_layer = 40 * 4 + 2 * 4 * 60 + 40 * 10 + 1 + 40 * 10
    count_and_placeholders = 5
    assert count_bytes(state) == 4 * (3 * each_layer + 2 * 40 + count_and_placeholders)
    assert jax.eval_shape(next_task, state) == state


def test_bad_values_are_named():
    for settings in ({"sketch_rank": 0}, {"memory": 1.5}):
        with pytest.raises(ValueError, match="sketch_rank of at least 1 and memory between 0 and"):
            coso(0.1, 2, projected=True, **settings)
    state = coso(0.1, 2, projected=True).init(jnp.zeros((4, 6)))
    with pytest.raises(ValueError, match=r"threshold must be above 0 and at most 1, is 1\.5"):
        next_task(state, threshold=1.5)
