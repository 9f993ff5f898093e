import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loro_jax import warmup_cosine, with_restarts
from loro_jax.peers.relora import jagged_schedule, merge_and_restart

# The compiler takes most of the time here. These keys are quicker to compile than the default
# ones, and a whole restart, little optimised, is quicker than its operations one by one.
KEY = jax.random.key(3, impl="unsafe_rbg")
merge_jit = jax.jit(merge_and_restart, static_argnames=("scale", "keep", "pruning"))


def problem(layers=(), m=20, n=30, r=10, dtype=jnp.float32):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.array(rng.normal(size=(*layers, *shape)), dtype)

    moments = ((draw(m, r), draw(r, n)), (draw(m, r), draw(r, n)))
    return draw(m, n), draw(m, r), draw(r, n), moments


def function(W0, B, A, scale):
    W0, B, A = (np.asarray(x, np.float64) for x in (W0, B, A))
    return W0 + scale * B @ A


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("layers", [(), (2, 2)])
def test_a_merge_keeps_the_function(x64, layers):
    W0, B, A, moments = problem(layers, dtype=jnp.float64)
    W1, B1, A1, _ = merge_jit(KEY, W0, B, A, moments, scale=0.25)
    np.testing.assert_allclose(function(W1, B1, A1, 0.25), function(W0, B, A, 0.25), atol=1e-13)
    assert np.all(B1 == 0)
    assert np.abs(W1 - W0).max() > 0.1


def test_a_bf16_merge_rounds_the_sum_once():
    W0, B, A, moments = problem((2,), dtype=jnp.bfloat16)
    W1, _, _, _ = merge_jit(KEY, W0, B, A, moments, scale=0.25)
    wanted = function(W0, B, A, 0.25)
    # Half a unit in the last of bfloat16's 8 bits; a product formed in bfloat16 errs more.
    assert np.all(np.abs(np.asarray(W1, np.float64) - wanted) <= 2.0**-8 * np.abs(wanted) + 1e-6)


def test_A_is_kaiming_uniform_and_new_for_every_key_and_layer():
    W0, B, A, moments = problem((2,), m=64, n=400, r=50)
    new = np.asarray(merge_jit(KEY, W0, B, A, moments, scale=1.0)[2])
    bound = 1 / np.sqrt(400)
    assert np.abs(new).max() <= bound
    assert np.abs(new).max() > 0.999 * bound
    np.testing.assert_allclose(new.std(), bound / np.sqrt(3), rtol=0.02)
    np.testing.assert_allclose(new.mean(), 0, atol=0.02 * bound)
    np.testing.assert_allclose((new < bound / 2).mean(), 0.75, atol=0.01)  # flat, not a bell
    assert np.abs(np.corrcoef(new[0].ravel(), new[1].ravel())[0, 1]) < 0.03
    other = merge_jit(jax.random.key(4, impl="unsafe_rbg"), W0, B, A, moments, scale=1.0)[2]
    assert np.abs(np.corrcoef(new.ravel(), np.asarray(other).ravel())[0, 1]) < 0.03


@pytest.mark.parametrize("pruning", ["random", "magnitude"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 1.0])
def test_the_stated_share_of_every_matrix_survives_unchanged(pruning, keep):
    W0, B, A, moments = problem((3,))
    pruned = merge_jit(KEY, W0, B, A, moments, scale=1.0, keep=keep, pruning=pruning)[3]
    assert jax.tree.structure(pruned) == jax.tree.structure(moments)
    for before, after in zip(leaves(moments), leaves(pruned), strict=True):
        survived = after != 0
        np.testing.assert_array_equal(survived.sum((-1, -2)), round(keep * before[0].size))
        np.testing.assert_array_equal(after[survived], before[survived])


def test_a_thousandth_survives_by_default():
    W0, B, A, moments = problem(m=200, n=300, r=10)
    pruned = merge_jit(KEY, W0, B, A, moments, scale=1.0)[3]
    assert [int((leaf != 0).sum()) for leaf in leaves(pruned)] == [2, 3, 2, 3]


def test_pruning_by_magnitude_keeps_the_largest():
    W0, B, A, moments = problem((3,))
    pruned = merge_jit(KEY, W0, B, A, moments, scale=1.0, keep=0.1, pruning="magnitude")[3]
    for before, after in zip(leaves(moments), leaves(pruned), strict=True):
        for old, new in zip(before, after, strict=True):
            assert np.abs(new[new != 0]).min() > np.abs(old[new == 0]).max()


def test_random_pruning_does_not_look_at_the_size_and_draws_for_each_matrix():
    W0, B, A, moments = problem((2,), m=100, n=100, r=50)
    pruned = merge_jit(KEY, W0, B, A, moments, scale=1.0, keep=0.5)[3]
    for before, after in zip(leaves(moments), leaves(pruned), strict=True):
        np.testing.assert_allclose(np.abs(after).sum() / np.abs(before).sum(), 0.5, atol=0.03)
    (mu_B, _), (nu_B, _) = pruned
    masks = [np.asarray(x).ravel() != 0 for x in (mu_B[0], mu_B[1], nu_B[0])]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        np.testing.assert_allclose((masks[i] & masks[j]).mean(), 0.25, atol=0.03)


def test_equal_moments_survive_in_the_stated_number():
    W0, B, A, _ = problem()
    ones = ((jnp.ones_like(B), jnp.ones_like(A)),)
    pruned = merge_jit(KEY, W0, B, A, ones, scale=1.0, keep=0.1, pruning="magnitude")[3]
    assert [leaf.sum() for leaf in leaves(pruned)] == [20, 30]


def test_stacked_layers_are_merged_and_pruned_one_by_one():
    W0, B, A, moments = problem((3,))
    options = {"scale": 0.5, "keep": 0.1, "pruning": "magnitude"}
    stacked = merge_jit(KEY, W0, B, A, moments, **options)
    for i in range(3):
        layer = jax.tree.map(lambda x, i=i: x[i], moments)
        single = merge_jit(KEY, W0[i], B[i], A[i], layer, **options)
        np.testing.assert_allclose(stacked[0][i], single[0], rtol=1e-5, atol=1e-6)
        for both, one in zip(leaves(stacked[3]), leaves(single[3]), strict=True):
            np.testing.assert_array_equal(both[i], one)


def test_under_jit_and_cond_nothing_changes():
    state = problem((2,))

    @jax.jit
    def step(now, state):
        return jax.lax.cond(
            now,
            lambda s: merge_and_restart(KEY, *s, scale=0.5, keep=0.1),
            lambda s: s,
            state,
        )

    for before, same in zip(leaves(state), leaves(step(False, state)), strict=True):
        np.testing.assert_array_equal(before, same)
    plain = merge_and_restart(KEY, *state, scale=0.5, keep=0.1)
    for wanted, found in zip(leaves(plain), leaves(step(True, state)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_dtypes_and_shapes_are_kept_also_where_they_are_mixed():
    W0, B, A, moments = problem((2,))
    bf16 = functools.partial(jax.tree.map, lambda x: x.astype(jnp.bfloat16))
    for state in (
        (bf16(W0), bf16(B), bf16(A), bf16(moments)),
        (bf16(W0), bf16(B), bf16(A), moments),
        (W0, B, bf16(A), bf16(moments)),
    ):
        found = jax.eval_shape(lambda s: merge_and_restart(KEY, *s, scale=1.0), state)
        assert found == jax.eval_shape(lambda: state)  # noqa: B023


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 1.5}, "keep is 1.5"),
        ({"keep": -0.1}, "keep is -0.1"),
        ({"pruning": "none"}, "'none'"),
        ({"W0": jnp.ones((30, 20))}, r"\(20, 30\).*\(30, 20\)"),
        ({"B": jnp.ones((20, 9))}, "same r"),
    ],
)
def test_bad_input_is_named(change, message):
    W0, B, A, moments = problem()
    arguments = {"W0": W0, "B": B, "A": A, "moments": moments, "scale": 1.0} | change
    with pytest.raises(ValueError, match=message):
        merge_and_restart(KEY, **arguments)


def test_the_jagged_cosine_climbs_in_a_line_to_the_cosine():
    cosine = warmup_cosine(1.0, 1_000, 50)
    jagged = jagged_schedule(cosine, every=200, warmup_steps=20)
    for step in (0, 25, 150, 199, 220, 399, 420, 999):  # the cosine itself
        assert float(jagged(step)) == pytest.approx(float(cosine(step)), rel=1e-6)
    for start in (200, 400, 800):
        rates = np.array([float(jagged(start + i)) for i in range(21)])
        np.testing.assert_allclose(rates, np.linspace(0, cosine(start + 20), 21), atol=1e-6)


def test_the_jagged_schedule_under_jit_and_with_a_constant():
    base = optax.linear_schedule(1.0, 0.0, 1_000)
    jagged = jagged_schedule(base, 100, 10)
    steps = jnp.arange(0, 400, 7)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(jagged))(steps), [jagged(int(step)) for step in steps], rtol=1e-6
    )
    constant, plain = jagged_schedule(0.5, 100, 10), with_restarts(0.5, 100, 10)
    assert [float(constant(t)) for t in range(99, 115)] == [float(plain(t)) for t in range(99, 115)]


def test_no_restart_warmup():
    base = optax.linear_schedule(1.0, 0.0, 1_000)
    schedule = jagged_schedule(base, 10, 0)
    assert [float(schedule(t)) for t in range(30)] == [float(base(t)) for t in range(30)]


@pytest.mark.parametrize(("every", "warmup"), [(0, 0), (10, -1), (10, 11)])
def test_bad_lengths_are_named(every, warmup):
    with pytest.raises(ValueError, match=f"every is {every} and warmup_steps is {warmup}"):
        jagged_schedule(1.0, every, warmup)
