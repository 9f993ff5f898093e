import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loro_jax.peers.switchlora import (
    Candidates,
    SwitchState,
    hold,
    initialise_candidates,
    initialise_switchlora,
    nothing_frozen,
    switch,
    switch_frequency,
    thaw,
)
from tests.helpers import assert_trees_match

# The compiler takes most of the time here. These keys are quicker to compile than the default
# ones, and a whole switch, little optimised, is quicker than its operations one by one.
KEY = jax.random.key(5, impl="unsafe_rbg")
OPTIONS = ("scale", "total_steps", "interval", "ratio", "freeze_steps")
switch_jit = jax.jit(switch, static_argnames=OPTIONS)
M, N, R = 14, 11, 6
# A rate of exactly two a side at step 0, so that nothing is left to chance.
TWO = {"scale": 0.25, "total_steps": 1_000, "interval": 3.0, "freeze_steps": 1}


def problem(layers=(), dtype=jnp.float32, m=M, n=N, r=R):
    rng = np.random.default_rng(1)

    def draw(*shape):
        return jnp.array(rng.normal(size=(*layers, *shape)), dtype)

    q = min(m, n) - r
    B, A = draw(m, r), draw(r, n)
    spare = Candidates(draw(m, q), draw(q, n), jnp.array(np.zeros(layers, np.int32)))
    moments = ((draw(m, r), draw(r, n)), (draw(m, r), draw(r, n)))
    return SwitchState(draw(m, n), B, A, spare, moments, nothing_frozen(B))


def function(W0, B, A, scale):
    W0, B, A = (np.asarray(x, np.float64) for x in (W0, B, A))
    return W0 + scale * B @ A


@pytest.mark.parametrize("layers", [(), (2, 2)])
def test_switches_keep_the_function(x64, layers):
    state = problem(layers, dtype=jnp.float64)
    wanted = function(*state[:3], 0.25)
    for step, key in enumerate(jax.random.split(KEY, 6)):
        before = state
        state = switch_jit(key, 0 if step < 3 else 40, state, **TWO)
        np.testing.assert_allclose(function(*state[:3], 0.25), wanted, atol=1e-12)
        assert np.abs(state[0] - before[0]).max() > 0.1
        state = state._replace(frozen=thaw(state.frozen))


def test_a_bf16_switch_keeps_the_function_but_for_one_rounding():
    state = problem((2,), jnp.bfloat16)
    W0, B, A, *_ = state
    W1, B1, A1, *_ = switch_jit(KEY, 0, state, **TWO)
    error = function(W1, B1, A1, 0.25) - function(W0, B, A, 0.25)
    # W1 alone was rounded, once, to the 8 bits of bfloat16.
    assert np.all(np.abs(error) <= 2.0**-8 * np.abs(np.asarray(W1, np.float64)) + 1e-5)


def test_a_switch_touches_the_chosen_vectors_alone():
    state = problem()
    _, B, A, spare, moments, _ = state
    _, B1, A1, spare1, moments1, frozen1 = switch_jit(KEY, 0, state, **TWO)
    rows, columns = [0, 1], [3, 4]  # B runs r // 2 = 3 ahead
    # The vectors and their candidates trade places, exactly.
    np.testing.assert_array_equal(A1[:2], spare.A[:2])
    np.testing.assert_array_equal(A1[2:], A[2:])
    np.testing.assert_array_equal(spare1.A[:2], A[:2])
    np.testing.assert_array_equal(spare1.A[2:], spare.A[2:])
    np.testing.assert_array_equal(B1[:, columns], spare.B[:, :2])
    np.testing.assert_array_equal(np.delete(B1, columns, 1), np.delete(B, columns, 1))
    np.testing.assert_array_equal(spare1.B[:, :2], B[:, columns])
    np.testing.assert_array_equal(spare1.B[:, 2:], spare.B[:, 2:])
    assert int(spare1.switched) == 2
    # The counterparts lose their moments and are frozen; the switched keep theirs.
    for (old_B, old_A), (new_B, new_A) in zip(moments, moments1, strict=True):
        assert np.all(new_B[:, rows] == 0)
        np.testing.assert_array_equal(np.delete(new_B, rows, 1), np.delete(old_B, rows, 1))
        assert np.all(new_A[columns, :] == 0)
        np.testing.assert_array_equal(np.delete(new_A, columns, 0), np.delete(old_A, columns, 0))
    assert [held.tolist() for held in frozen1] == [[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0]]


def test_vectors_and_candidates_take_turns_in_circles():
    state = problem()
    A, spare = np.asarray(state[2]), np.asarray(state[3].A)
    queue, rows, turn = list(spare), list(A), 0
    for key in jax.random.split(KEY, 9):
        state = switch_jit(key, 0, state, **TWO)
        state = state._replace(frozen=thaw(state.frozen))
        for _ in range(2):  # first out of the queue, last into it
            queue.append(rows[turn % R])
            rows[turn % R] = queue.pop(0)
            turn += 1
        np.testing.assert_array_equal(state[2], rows)


def test_counts_of_single_vectors_start_anew_as_moments_do():
    counts = ((jnp.array(np.full((2, 1, R), 7)), jnp.array(np.full((2, R, 1), 7))),)
    ((for_B, for_A),) = switch_jit(KEY, 0, problem((2,))._replace(moments=counts), **TWO).moments
    assert for_B.dtype == counts[0][0].dtype
    assert for_B[1, 0].tolist() == [0, 0, 7, 7, 7, 7]
    assert for_A[1, :, 0].tolist() == [7, 7, 7, 0, 0, 7]


def test_counterparts_stay_frozen_for_five_updates():
    """A whole run: gradients, switch, hold, Adam, thaw."""
    r, options = 20, {"scale": 0.05, "total_steps": 10**6, "interval": 20.0}
    W0, B, A, spare, _, frozen = problem(m=30, n=26, r=r)
    target = W0[::-1]
    adam = optax.adam(1e-2)
    opt = adam.init((B, A))

    def loss(BA, W0):
        return jnp.mean((W0 + 0.05 * BA[0] @ BA[1] - target) ** 2)

    @jax.jit
    def step(key, t, W0, B, A, spare, opt, frozen):
        grads = jax.grad(loss)((B, A), W0)
        moments = (opt[0].mu, opt[0].nu)
        W0, B, A, spare, (mu, nu), frozen = switch(
            key, t, SwitchState(W0, B, A, spare, moments, frozen), **options
        )
        opt = (opt[0]._replace(mu=mu, nu=nu), *opt[1:])
        updates, opt = adam.update(hold(*grads, frozen), opt)
        return W0, B, A, spare, opt, thaw(frozen), updates

    moved_B, moved_A, switched = [], [], []
    for t, key in enumerate(jax.random.split(KEY, 30)):
        W0, B, A, spare, opt, frozen, updates = step(key, t, W0, B, A, spare, opt, frozen)
        moved_B.append(np.abs(updates[0]).max(0) > 0)
        moved_A.append(np.abs(updates[1]).max(1) > 0)
        switched.append(int(spare.switched))
    # Nearly one a step (the decay is slow): count when each row of A was switched.
    assert switched[-1] >= 28
    when = [next(t for t, count in enumerate(switched) if count > row) for row in range(15)]
    for row, start in enumerate(when):
        # Column `row` of B is the counterpart of that row of A, and column row + 10 was
        # switched along with it: its counterpart is row (row + 10) of A.
        still = [not moved_B[t][row] for t in range(start - 1 if start else 0, start + 6)]
        assert still == [False] * (start > 0) + [True] * 5 + [False]
        still = [not moved_A[t][(row + 10) % r] for t in range(start, start + 6)]
        assert still == [True] * 5 + [False]
    total = sum(int((~moved).sum()) for moved in moved_B)
    assert total == sum(min(5, 30 - t) for t in np.repeat(range(30), np.diff([0, *switched])))


def test_frozen_vectors_are_not_switched():
    state = problem()
    fixed = nothing_frozen(state[1])
    fixed = (fixed[0].at[0].set(1), fixed[1])
    wanted = {0: 2, 1: 2, 2: 1, 3: 0}  # half a round is three vectors
    for count, switches in wanted.items():
        frozen = (jnp.arange(R) < count).astype(jnp.int32)
        found = switch_jit(KEY, 0, state._replace(frozen=(frozen, frozen)), **TWO)
        assert int(found[3].switched) == switches


def test_the_frequency_falls_to_a_third_and_on():
    steps = np.array([0, 100, 200, 1_000])
    found = [float(switch_frequency(step, 1_000)) for step in steps]
    np.testing.assert_allclose(found, 3.0 ** -(steps / 100), rtol=1e-5)
    assert float(switch_frequency(500, 1_000, ratio=0.5)) == pytest.approx(1 / 3)


@pytest.mark.parametrize("step", [0, 100, 150])
def test_as_many_switches_as_the_frequency_says(step):
    state = problem(m=40, n=40, r=30)._replace(moments=())
    one = functools.partial(switch, scale=1.0, total_steps=1_000, interval=12.0)
    keys = jax.random.split(jax.random.key(5), 400)
    counts = jax.jit(lambda t: jax.vmap(lambda k: one(k, t, state).candidates.switched)(keys))(step)
    rate = 30 / 12 * 3.0 ** -(step / 100)
    assert set(counts.tolist()) == {int(rate), int(rate) + 1}
    np.testing.assert_allclose(counts.mean(), rate, atol=0.1)


def test_the_authors_interval_and_five_steps_are_the_defaults():
    state = problem(m=130, n=130, r=80)._replace(moments=())
    found = switch_jit(KEY, 0, state, scale=1 / 80, total_steps=1_000)
    assert int(found.candidates.switched) == 2  # 80 / 40
    assert found.frozen[0].max() == found.frozen[1].max() == 5


def test_stacked_layers_are_switched_one_by_one():
    state = problem((3,))
    options = TWO | {"interval": 4.0}  # 1.5 a side: layers differ
    key = jax.random.key(5)  # its draws are the same one by one
    stacked = switch_jit(key, 0, state, **options)
    keys = jax.random.split(key, (3,))
    for i in range(3):
        single = switch_jit(keys[i], 0, jax.tree.map(lambda x, i=i: x[i], state), **options)
        assert_trees_match(jax.tree.map(lambda x, i=i: x[i], stacked), single, rtol=1e-5, atol=1e-6)


def test_under_jit_and_cond_nothing_changes():
    state = problem()

    @jax.jit
    def step(now, t, state):
        return jax.lax.cond(now, lambda s: switch(KEY, t, s, **TWO), lambda s: s, state)

    chex.assert_trees_all_equal(step(False, 0, state), state, strict=True)
    plain = switch(KEY, 0, state, **TWO)
    assert_trees_match(step(True, 0, state), plain, rtol=1e-5, atol=1e-5)


def test_dtypes_and_shapes_are_kept_also_where_they_are_mixed():
    W0, B, A, spare, moments, frozen = problem((2,))
    bf16 = functools.partial(jax.tree.map, lambda x: x.astype(jnp.bfloat16))
    for state in (
        (bf16(W0), bf16(B), bf16(A), Candidates(*bf16(spare[:2]), spare[2]), bf16(moments), frozen),
        (bf16(W0), bf16(B), bf16(A), spare, moments, frozen),
        (W0, bf16(B), A, spare, bf16(moments), frozen),
    ):
        state = SwitchState(*state)
        wanted = jax.eval_shape(lambda: state)  # noqa: B023
        assert jax.eval_shape(lambda s: switch(KEY, 0, s, **TWO), state) == wanted


@pytest.mark.parametrize(("m", "n", "r"), [(5, 7, 5), (5, 7, 1)])
def test_where_nothing_can_be_switched_nothing_is(m, n, r):
    state = problem(m=m, n=n, r=r)
    chex.assert_trees_all_equal(switch_jit(KEY, 0, state, **TWO), state, strict=True)


def test_one_spare_vector_is_enough():
    state = problem(m=7, n=9, r=6)
    found = switch_jit(KEY, 0, state, **TWO)
    assert int(found[3].switched) == 1
    np.testing.assert_allclose(function(*found[:3], 0.25), function(*state[:3], 0.25), atol=1e-5)


def test_the_initial_deviations():
    m, n, r = 150, 400, 100
    gain = np.sqrt(1 / 3)
    std_B = (r / np.sqrt(m * n)) ** 0.25 * gain**0.5
    std_A = (np.sqrt(m) * r / (np.sqrt(n) * n)) ** 0.25 * gain**0.5
    key_start, key_spare = jax.random.split(KEY)
    B, A = map(np.asarray, initialise_switchlora(key_start, m, n, r))
    spare = Candidates(*map(np.asarray, initialise_candidates(key_spare, m, n, r)))
    assert spare.B.shape == (m, min(m, n) - r)
    assert spare.A.shape == (min(m, n) - r, n)
    for vectors, std in ((B, std_B), (spare.B, std_B), (A, std_A), (spare.A, std_A)):
        np.testing.assert_allclose(vectors.std(), std, rtol=0.02)
        np.testing.assert_allclose(np.abs(vectors).max(), np.sqrt(3) * std, rtol=0.01)
    # With the scale 1 / r, the product is as large as a fresh dense layer, and steps in B and
    # in A move it equally.
    np.testing.assert_allclose((B @ A / r).std(), gain / np.sqrt(n), rtol=0.05)
    assert not np.allclose(B[:, 0], spare.B[:, 0])


def test_candidates_of_stacked_layers_by_vmap():
    keys = jax.random.split(KEY, 3)
    initialise = functools.partial(initialise_candidates, m=M, n=N, r=R)
    assert jax.eval_shape(jax.vmap(initialise), keys) == jax.eval_shape(lambda: problem((3,))[3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W0": jnp.ones((N, M))}, r"W0 of shape \(14, 11\)"),
        ({"A": jnp.ones((R + 1, N))}, "same r"),
        ({"candidates": Candidates(jnp.ones((M, 5)), jnp.ones((4, N)), 0)}, r"\(14, 5\)"),
        ({"interval": 9.0, "freeze_steps": 5}, "interval is 9.0"),
        ({"freeze_steps": -1}, "freeze_steps is -1"),
        ({"interval": 0.0, "freeze_steps": 0}, "interval is 0.0"),
        ({"total_steps": 0}, "total_steps is 0"),
        ({"ratio": -1.0}, "ratio is -1.0"),
    ],
)
def test_bad_input_is_named(change, message):
    of_state = {name: value for name, value in change.items() if name in SwitchState._fields}
    options = {name: value for name, value in change.items() if name not in of_state}
    with pytest.raises(ValueError, match=message):
        switch_jit(KEY, 0, problem()._replace(**of_state), **TWO | options)


@pytest.mark.parametrize("initialise", [initialise_switchlora, initialise_candidates])
@pytest.mark.parametrize("rank", [0, 6])
def test_bad_ranks_are_named(initialise, rank):
    with pytest.raises(ValueError, match=f"between 1 and min.* = 5, but is {rank}"):
        initialise(KEY, 5, 7, rank)
