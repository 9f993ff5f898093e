"""The transformation as a whole: rules, states, compilation, and no hanging."""

import functools
import re
import subprocess
import sys
import textwrap

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loro_jax import LowRank, adam, exact_update, loro
from tests.helpers import some_fast

# Quicker to compile, where a test is not about how an exact step is computed.
quick = functools.partial(loro, exact_method="svd")


def problem(seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "one": LowRank(jnp.array(rng.normal(size=(8, 3))), jnp.array(rng.normal(size=(3, 6)))),
        "two": {"B": jnp.array(rng.normal(size=(5, 2))), "A": jnp.array(rng.normal(size=(2, 8)))},
        "bias": jnp.array(rng.normal(size=5)),
    }
    x, y = jnp.array(rng.normal(size=(20, 6))), jnp.array(rng.normal(size=(20, 5)))

    def loss(params):
        hidden = jnp.tanh(params["one"].apply(x))
        out = LowRank(**params["two"]).apply(hidden) + params["bias"]
        return jnp.mean((out - y) ** 2)

    return params, loss


def run(tx, params, loss, steps, state=None):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params) if state is None else state
    for _ in range(steps):
        params, state = step(params, state)
    return params, state, step._cache_size()


def adam_direction(grads, b1=0.9, b2=0.999, eps=1e-6):
    """The rule in float64 numpy: direction after a list of gradients since the last refresh."""
    m = v = 0.0
    for g in grads:
        g = np.asarray(g, np.float64)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    c = len(grads)
    return m / (np.sqrt(v) + eps) * np.sqrt(1 - b2**c) / (1 - b1**c)


def test_approximate_and_exact_steps_follow_the_rules(x64):
    params, loss = problem()
    tx = quick(0.05, exact_every=2, weight_decay=0.1)
    state = tx.init(params)
    first = jax.grad(loss)(params)
    updates, state = tx.update(first, state, params)
    pair, scale = params["one"], 3 / 6
    for side in ("B", "A"):
        p, g = getattr(pair, side), getattr(first["one"], side)
        expected = -0.05 * scale * (adam_direction([g]) + 0.1 * np.asarray(p))
        np.testing.assert_allclose(getattr(updates["one"], side), expected, rtol=1e-6)
    expected = -0.05 * (adam_direction([first["bias"]]) + 0.1 * np.asarray(params["bias"]))
    np.testing.assert_allclose(updates["bias"], expected, rtol=1e-6)

    params = optax.apply_updates(params, updates)
    second = jax.grad(loss)(params)
    updates, state = tx.update(second, state, params)
    dB, dA = (adam_direction([first["two"][k], second["two"][k]]) for k in ("B", "A"))
    B, A = params["two"]["B"], params["two"]["A"]
    B_new, A_new = exact_update(B, A, jnp.array(dB), jnp.array(dA), 0.05, method="svd")
    keep = 1 - 0.05 * (2 / 5) * 0.1
    found = (B + updates["two"]["B"]) @ (A + updates["two"]["A"])
    np.testing.assert_allclose(found, keep**2 * (B_new @ A_new), rtol=1e-6)
    assert int(state.count) == 2


@pytest.mark.parametrize("moments", ["reset", "reset_factors", "keep"])
def test_moments_are_reset_where_it_says(moments):
    """After the exact third step, the fourth begins anew for those named."""
    params, loss = problem()
    tx = quick(0.05, exact_every=3, moments=moments)
    moved, after_third, _ = run(tx, params, loss, 3)
    grads = jax.grad(loss)(moved)
    _, after_fourth = tx.update(grads, after_third, moved)
    for state, refreshed, gradient, mu in (
        (
            after_fourth.factors,
            moments in ("reset", "reset_factors"),
            grads["one"].B,
            after_fourth.factors.mu["one"].B,
        ),
        (after_fourth.regular, moments == "reset", grads["bias"], after_fourth.regular.mu["bias"]),
    ):
        assert int(state.count) == (1 if refreshed else 4)
        assert np.allclose(mu, 0.1 * gradient, rtol=1e-5) == refreshed
    assert int(after_fourth.count) == 4
    assert bool(after_third.stale)
    assert not bool(after_fourth.stale)


def test_exact_every_none_is_plain_scaled_adam():
    params, loss = problem()
    never = run(quick(0.05, exact_every=None), params, loss, 7)[0]
    far = run(quick(0.05, exact_every=1000), params, loss, 7)[0]
    chex.assert_trees_all_close(never, far, rtol=1e-6, atol=1e-7)


def test_exact_steps_by_a_schedule():
    """Every second step among the first four, then never: as a K of two, then none."""
    params, loss = problem()
    scheduled = quick(0.05, exact_every=lambda step: jnp.where(step < 4, 2, 0))
    found, _, compilations = run(scheduled, params, loss, 8)
    assert compilations == 1
    expected, state, _ = run(quick(0.05, exact_every=2), params, loss, 4)
    expected, _, _ = run(quick(0.05, exact_every=10), expected, loss, 4, state)
    chex.assert_trees_all_close(expected, found, rtol=1e-5, atol=1e-6)


def test_one_compilation_and_steady_state_shapes():
    params, loss = problem()
    tx = quick(lambda step: 0.05 / (step + 1), exact_every=2)
    state = tx.init(params)
    _, after, compilations = run(tx, params, loss, 5)
    assert compilations == 1
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)


def test_the_approximate_step_copies_no_factor_past_the_branch():
    """Moments, factors and what becomes a move keep their buffers from one step to the next."""
    params = {"w": LowRank(jnp.ones((96, 16)), jnp.ones((16, 80)))}
    tx = loro(0.05, exact_every=1000)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    arguments = (params, tx.init(params), params)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
    entry = compiled.as_text().partition("ENTRY")[2]
    assert " conditional(" in entry
    assert not re.findall(r"f32\[(96,16|16,80)\]\S* copy\(", entry)


def test_a_schedule_is_read_at_the_step_from_zero():
    params, loss = problem()
    rates = jnp.array([0.0, 0.1])
    tx = loro(lambda step: rates[step], exact_every=None)
    unmoved, state, _ = run(tx, params, loss, 1)
    chex.assert_trees_all_equal(params, unmoved)
    moved, _, _ = run(tx, unmoved, loss, 1, state)
    assert not np.allclose(moved["bias"], params["bias"])


def test_the_count_saturates():
    params, loss = problem()
    tx = quick(0.05, exact_every=10)
    largest = jnp.iinfo(jnp.int32).max
    state = tx.init(params)._replace(count=jnp.array(largest, jnp.int32))
    _, state, _ = run(tx, params, loss, 2, state)
    assert int(state.count) == largest


def test_a_regular_transformation_of_ones_own():
    params, loss = problem()
    tx = quick(0.05, exact_every=2, regular=optax.sgd(0.5, momentum=0.9))
    state = tx.init(params)
    grads = jax.grad(loss)(params)
    updates, state = tx.update(grads, state, params)
    np.testing.assert_allclose(updates["bias"], -0.5 * grads["bias"], rtol=1e-6)
    _, state = tx.update(grads, state, params)
    trace = jax.tree.leaves(state.regular)
    assert all(np.any(leaf) for leaf in trace), "an exact step must not touch it"


def test_in_a_chain_with_donation_the_loss_falls():
    params, loss = problem()
    before = float(loss(params))
    tx = optax.chain(optax.clip_by_global_norm(1.0), quick(0.02, exact_every=5))
    after, _, _ = run(tx, params, loss, 60)
    assert float(loss(after)) < 0.7 * before


@pytest.mark.parametrize(
    "dtype", some_fast([jnp.bfloat16, jnp.float16, jnp.float32], [jnp.bfloat16, jnp.float32])
)
def test_updates_keep_the_parameters_dtype(dtype):
    params, loss = problem()
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    tx = quick(lambda step: jnp.float32(0.05), exact_every=2, direction=adam(mu_dtype=jnp.float32))
    state = tx.init(params)
    for _ in range(2):
        grads = jax.grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
        params = optax.apply_updates(params, updates)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.factors.mu)} == {jnp.dtype("float32")}
    # In bfloat16 second moments would never fall.
    assert {leaf.dtype for leaf in jax.tree.leaves(state.factors.nu)} == {jnp.dtype("float32")}


def test_map_params_and_abstract_init():
    params, _ = problem()
    tx = loro(0.05)
    state = tx.init(params)
    same = optax.tree.map_params(tx, lambda leaf: leaf, state)
    assert jax.tree.structure(same) == jax.tree.structure(state)
    abstract = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exact_every": 0}, "exact_every must be at least 1"),
        ({"exact_every": -3}, "but is -3"),
        ({"moments": "none"}, "moments must be one of"),
        ({"direction": adam}, "direction must be one that"),
        ({"weight_decay": (0.1, None, None)}, "is a tuple of 3"),
        ({"pairs": "some"}, 'pairs must be None, "optional", "all" or a spec'),
        ({"exact_method": "magic"}, "the method must be one of"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        loro(0.1, **settings)


def test_params_are_required():
    params, loss = problem()
    tx = loro(0.1)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(jax.grad(loss)(params), tx.init(params))


MANY_SHAPES = """
    import jax, jax.numpy as jnp, numpy as np, optax
    from loro_jax import LowRank, loro

    rng = np.random.default_rng(0)
    shapes = [(2, 96, 80, 16), (3, 64, 120, 16), (1, 120, 64, 32), (4, 80, 80, 24), (2, 56, 96, 8)]
    params = [
        LowRank(jnp.array(rng.normal(size=(b, m, r)), jnp.float32),
                jnp.array(rng.normal(size=(b, r, n)), jnp.float32))
        for b, m, n, r in shapes
    ]
    tx = loro(0.01, exact_every=2)

    def loss(params):
        return sum(jnp.mean((pair.product() - 1.0) ** 2) for pair in params)

    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "loop",
    [
        """
        step = jax.jit(step, donate_argnums=(0, 1))
        state = tx.init(params)
        for _ in range(30):
            params, state = step(params, state)
        """,
        # A batch of optimizers: vmap must not turn into batched LAPACK calls either.
        """
        ensemble = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
        state = jax.vmap(tx.init)(ensemble)
        step = jax.jit(jax.vmap(step), donate_argnums=(0, 1))
        params = ensemble
        for _ in range(6):
            params, state = step(params, state)
        """,
    ],
    ids=["jit", "vmap"],
)
def test_exact_steps_of_many_shapes_never_hang(loop):
    """Batched LAPACK calls in one program block each other on two cores; see linalg/batching.py."""
    program = (
        textwrap.dedent(MANY_SHAPES)
        + textwrap.dedent(loop)
        + textwrap.dedent("""
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(params))
        print("done")
        """)
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.stdout.strip() == "done", done.stderr[-2000:]
