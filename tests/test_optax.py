"""What Optax asks of its own contributed optimizers, asked of loro.

The first eight tests mirror optax/contrib/_common_test.py, on trees without pairs, of pairs alone,
and mixed; the others cover the wrappers that people put around an optimizer.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from orbax.checkpoint import v1 as ocp

from loro_jax import LowRank, adam, initialise, loro
from tests.helpers import some_fast


def parabola(dtype):
    target = jnp.array([1.0, -1.0, 1.0], dtype)
    return jnp.array([-1.0, 10.0, 1.0], dtype), lambda p: jnp.sum((p - target) ** 2), target


def rosenbrock(dtype):
    def loss(p):
        return (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2

    return jnp.zeros(2, dtype), loss, jnp.ones(2, dtype)


def matrix_parabola(dtype):
    target = jnp.array([[3.0, -2.0], [1.0, 4.0]], dtype)
    return jnp.zeros((2, 2), dtype), lambda p: jnp.sum((p - target) ** 2), target


def mixed_parabola(dtype):
    target = (jnp.array([1.0, -1.0, 2.0], dtype), jnp.array([[1.0, 0.0], [-1.0, 1.0]], dtype))

    def loss(params):
        return sum(jnp.sum((p - t) ** 2) for p, t in zip(params, target, strict=True))

    return (jnp.zeros(3, dtype), jnp.zeros((2, 2), dtype)), loss, target


def pair_tree(dtype=jnp.float32, seed=0):
    key = jax.random.key(seed)
    B, A = initialise(key, 6, 5, 2, "orth")
    return {"pair": LowRank(B.astype(dtype), A.astype(dtype))}


def mixed_tree(dtype=jnp.float32, seed=0):
    B, A = initialise(jax.random.key(seed + 1), 4, 6, 3, "orth")
    scanned = {"B": jnp.stack([B, 2 * B]).astype(dtype), "A": jnp.stack([A, A]).astype(dtype)}
    return {**pair_tree(dtype, seed), "scanned": scanned, "bias": jnp.ones(4, dtype)}


TREES = {
    "no pairs": lambda dtype=jnp.float32: {"w": jnp.array([1.0, 2.0], dtype)},
    "pairs": pair_tree,
    "mixed": mixed_tree,
}


# The mixed tree holds what is in the others.
TREES_AND_DTYPES = [
    ("no pairs", jnp.float16),
    ("pairs", jnp.float32),
    pytest.param("mixed", jnp.float16, marks=pytest.mark.slow),
    ("mixed", jnp.bfloat16),
    ("mixed", jnp.float32),
]


def square(params):
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def make(**settings):
    settings = {"exact_method": "svd", **settings}  # the quickest to compile
    return loro(**{"learning_rate": 1e-2, "exact_every": 2, "pairs": "optional", **settings})


def products(params):
    """The parameters with their pairs multiplied out: factors are known up to a rotation only."""
    result = dict(params)
    for name in ("pair", "scanned"):
        if name in result:
            pair = result[name]
            result[name] = LowRank(**pair).product() if isinstance(pair, dict) else pair.product()
    return result


def stepper(tx, loss=square):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return step


def take_steps(tx, params, count, loss=square):
    step, state = stepper(tx, loss), tx.init(params)
    for _ in range(count):
        params, state = step(params, state)
    return params, state


# ------------------------------------------------------------------------ the eight


@pytest.mark.parametrize("tree", TREES)
def test_extra_args_are_accepted_and_nothing_recompiles(tree):
    tx, params = make(), TREES[tree]()
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state):
        updates, state = tx.update(jax.grad(square)(params), state, params, unexpected=1)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(4):
        params, state = step(params, state)


@pytest.mark.parametrize("target", [parabola, rosenbrock, matrix_parabola, mixed_parabola])
def test_convergence_on_optax_targets(target):
    params, loss, solution = target(jnp.float32)
    tx = make()
    state = optax.tree.map_params(tx, lambda leaf: leaf, tx.init(params))

    def body(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda c: jax.lax.scan(body, c, length=30_000))((params, state))
    chex.assert_trees_all_close(params, solution, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("kind", some_fast(["sensing", "completion"], ["completion"]))
def test_convergence_on_low_rank_targets(kind):
    """A rank-3 matrix from random measurements, or from half of its entries, to 1e-3."""
    rng = np.random.default_rng(0)
    target = rng.normal(size=(20, 3)) @ rng.normal(size=(3, 15))
    if kind == "sensing":
        probes = jnp.array(rng.normal(size=(250, 20, 15)) / 16)
    else:
        chosen = np.flatnonzero(rng.random(300) < 0.6)
        probes = jnp.array(np.eye(300)[chosen].reshape(-1, 20, 15))
    seen = jnp.einsum("kmn,mn->k", probes, target)

    def loss(params):
        return jnp.sum((jnp.einsum("kmn,mn->k", probes, params.product()) - seen) ** 2)

    params = LowRank(*initialise(jax.random.key(1), 20, 15, 3))
    schedule = optax.cosine_decay_schedule(0.05, 3_000)
    tx = loro(schedule, exact_every=500, max_move=0.1)

    def body(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = (params, tx.init(params))
    (params, _), _ = jax.jit(lambda c: jax.lax.scan(body, c, length=3_000))(carry)
    error = np.linalg.norm(params.product() - target) / np.linalg.norm(target)
    assert error < 1e-3


@pytest.mark.parametrize("tree", TREES)
def test_injected_hyperparameters_equal_direct_ones(tree):
    settings = {
        "learning_rate": 0.02,
        "exact_every": 2,
        "lr_scale": 0.3,
        "weight_decay": 0.1,
        "max_move": 0.05,
        "damping": 0.1,
    }
    constants = {"b1": 0.8, "b2": 0.99, "eps": 1e-5}

    # Names, not **settings: these are what inject_hyperparams looks at.
    def factory(learning_rate, exact_every, lr_scale, weight_decay, max_move, damping, b1, b2, eps):
        return loro(
            learning_rate,
            exact_every,
            direction=adam(b1, b2, eps),
            lr_scale=lr_scale,
            weight_decay=weight_decay,
            max_move=max_move,
            damping=damping,
            pairs="optional",
            exact_method="svd",
        )

    direct = factory(**constants, **settings)
    injected = optax.inject_hyperparams(factory)(**constants, **settings)
    params = TREES[tree]()
    one, state = take_steps(direct, params, 5)
    other, injected_state = take_steps(injected, params, 5)
    assert {*settings, *constants} <= set(injected_state.hyperparams)
    chex.assert_trees_all_close(products(one), products(other), rtol=1e-4, atol=1e-5)
    inner = injected_state.inner_state
    chex.assert_trees_all_close(state.regular, inner.regular, rtol=1e-3, atol=1e-5)
    assert int(state.count) == int(inner.count) == 5
    assert int(state.factors.count) == int(inner.factors.count) == 1


@pytest.mark.parametrize(("tree", "dtype"), TREES_AND_DTYPES)
def test_updates_keep_the_dtype(tree, dtype):
    tx, params = make(), TREES[tree](dtype)
    state = jax.jit(tx.init)(params)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(jax.grad(square)(params), state, params)
        assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_multi_steps(dtype):
    params = mixed_tree(dtype)
    tx = optax.MultiSteps(make(), every_k_schedule=4)
    state = jax.jit(tx.init)(params)
    updates, _ = jax.jit(tx.update)(jax.grad(square)(params), state, params)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize(("tree", "dtype"), [*TREES_AND_DTYPES, ("mixed", jnp.float64)])
def test_the_state_is_stable_under_cond(tree, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        tx, params = make(), TREES[tree](dtype)
        state = tx.init(params)

        @jax.jit
        def step(params, state, go):
            grads = jax.grad(square)(params)
            updates, state = jax.lax.cond(
                go, lambda: tx.update(grads, state, params), lambda: (params, state)
            )
            return optax.apply_updates(params, updates), state

        for go in (True, True, False):
            params, new_state = step(params, state, go)
            chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)
            state = new_state
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("tree", TREES)
def test_a_constant_schedule_equals_a_number(tree):
    params = TREES[tree]()
    one, _ = take_steps(make(learning_rate=1e-3), params, 5)
    other, _ = take_steps(make(learning_rate=optax.constant_schedule(1e-3)), params, 5)
    chex.assert_trees_all_close(one, other, rtol=1e-6)


# ------------------------------------------------------------------------ wrappers


@pytest.mark.parametrize("method", some_fast(["svd", "graph"], ["svd"]))
def test_jit_equals_no_jit(method):
    tx, params = make(exact_method=method), mixed_tree()
    jitted, _ = take_steps(tx, params, 2)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(jax.grad(square)(params), state, params)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(products(jitted), products(params), rtol=1e-4, atol=1e-5)


def test_init_from_abstract_parameters():
    tx, params = make(), mixed_tree()
    abstract = jax.eval_shape(lambda: params)
    for state in (jax.eval_shape(tx.init, params), jax.eval_shape(tx.init, abstract)):
        chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))


def test_partition():
    """The pairs of a tree to loro, the rest to another optimizer: as with ``regular``."""
    params = mixed_tree()
    labels = {"pair": "low-rank", "scanned": "low-rank", "bias": "rest"}
    parts = optax.partition({"low-rank": make(), "rest": optax.sgd(0.1)}, labels)
    one, _ = take_steps(parts, params, 4)
    other, _ = take_steps(make(regular=optax.sgd(0.1)), params, 4)
    chex.assert_trees_all_close(one, other, rtol=1e-5, atol=1e-6)


def test_masked():
    params = mixed_tree()
    mask = {"pair": True, "scanned": False, "bias": False}
    moved, _ = take_steps(optax.masked(make(), mask), params, 1)
    expected, _ = take_steps(make(), {"pair": params["pair"]}, 1)
    chex.assert_trees_all_close(moved["pair"], expected["pair"], rtol=1e-5, atol=1e-6)


def test_apply_if_finite_skips_a_bad_step():
    tx, params = optax.apply_if_finite(make(), max_consecutive_errors=3), mixed_tree()
    state = tx.init(params)
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
    updates, state = tx.update(bad, state, params)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(updates))
    updates, _ = tx.update(jax.grad(square)(params), state, params)
    chex.assert_tree_all_finite(updates)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(updates))


def test_clipping_in_a_chain_bounds_the_gradient():
    params = mixed_tree()
    grads = jax.grad(square)(params)
    small = jax.tree.map(lambda g: g * (1e-3 / optax.tree.norm(grads)), grads)
    chained = optax.chain(optax.clip_by_global_norm(1e-3), make(direction=adam(eps=1.0)))
    one, _ = chained.update(grads, chained.init(params), params)
    alone = make(direction=adam(eps=1.0))
    other, _ = alone.update(small, alone.init(params), params)
    chex.assert_trees_all_close(one, other, rtol=1e-4)


class PairNetwork(nnx.Module):
    def __init__(self):
        pair = mixed_tree()["pair"]
        self.B, self.A, self.bias = nnx.Param(pair.B), nnx.Param(pair.A), nnx.Param(jnp.ones(6))

    def __call__(self, x):
        return x @ self.A[...].T @ self.B[...].T + self.bias[...]


def test_nnx_optimizer():
    model = PairNetwork()
    optimizer = nnx.Optimizer(model, make(learning_rate=0.05, exact_every=3), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(jnp.eye(5)) - 0.5) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


def test_linen_train_state():
    class Network(linen.Module):
        @linen.compact
        def __call__(self, x):
            init = linen.initializers.orthogonal()
            B = self.param("B", linen.with_partitioning(init, (None, None)), (6, 2))
            A = self.param("A", init, (2, 5))
            return x @ A.T @ B.T

    network = Network()
    params = network.init(jax.random.key(0), jnp.eye(5))["params"]
    state = TrainState.create(
        apply_fn=network.apply, params=params, tx=make(learning_rate=0.05, exact_every=3)
    )

    @jax.jit
    def step(state):
        loss = lambda p: jnp.mean((state.apply_fn({"params": p}, jnp.eye(5)) - 0.5) ** 2)  # noqa: E731
        value, grads = jax.value_and_grad(loss)(state.params)
        return value, state.apply_gradients(grads=grads)

    losses = []
    for _ in range(30):
        value, state = step(state)
        losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """A module that is a pytree itself, as in Equinox."""

    pair: LowRank
    bias: jax.Array
    name: str = dataclasses.field(metadata={"static": True}, default="module")


def test_equinox_style_modules():
    module = Module(mixed_tree()["pair"], jnp.ones(4))
    moved, _ = take_steps(make(), module, 4)
    assert isinstance(moved, Module)
    assert square(moved) < square(module)


def test_scan_over_steps_equals_a_loop():
    tx, params = make(), mixed_tree()
    looped, _ = take_steps(tx, params, 6)

    def body(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(square)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (scanned, _), _ = jax.lax.scan(body, (params, tx.init(params)), length=6)
    chex.assert_trees_all_close(products(looped), products(scanned), rtol=1e-4, atol=1e-5)


def test_vmap_over_an_ensemble():
    """Members may stand at different steps: each takes its exact steps at its own time."""
    tx, members = make(exact_every=3), [mixed_tree(seed=i) for i in range(2)]
    states = [take_steps(tx, m, i)[1] for i, m in enumerate(members)]
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)  # noqa: E731
    update = jax.jit(jax.vmap(lambda g, s, p: tx.update(g, s, p)))
    params, state = stack(members), stack(states)
    for _ in range(3):
        updates, state = update(params, state, params)
        params = optax.apply_updates(params, updates)
    for i, (member, own) in enumerate(zip(members, states, strict=True)):
        for _ in range(3):
            updates, own = tx.update(member, own, member)
            member = optax.apply_updates(member, updates)
        found = jax.tree.map(lambda x, i=i: x[i], params)
        chex.assert_trees_all_close(products(found), products(member), rtol=1e-4, atol=1e-5)


def test_orbax_round_trip(tmp_path):
    tx = make()
    params, state = take_steps(tx, mixed_tree(), 3)
    content = {"params": params, "state": state}
    ocp.save(tmp_path / "checkpoint", content)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), content
    )
    restored = ocp.load(tmp_path / "checkpoint", abstract)
    chex.assert_trees_all_equal(restored, content)
    assert isinstance(restored["params"]["pair"], LowRank)


@pytest.mark.parametrize(
    "direction",
    [optax.identity(), optax.trace(0.9), optax.scale_by_adam(), optax.scale_by_lion()],
    ids=["sgd", "momentum", "adam", "lion"],
)
@pytest.mark.slow
def test_any_direction_of_optax(direction):
    params = mixed_tree()
    tx = make(exact_every=3, direction=direction)
    moved, state = take_steps(tx, params, 8)
    assert square(moved) < square(params)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))


def test_a_direction_is_what_the_steps_are_made_of():
    params = pair_tree()
    grads = jax.grad(square)(params)
    tx = loro(0.1, exact_every=None, lr_scale=0.5, direction=optax.scale(3.0))
    updates, _ = tx.update(grads, tx.init(params), params)
    chex.assert_trees_all_close(
        updates, jax.tree.map(lambda g: -0.1 * 0.5 * 3.0 * g, grads), rtol=1e-6
    )
