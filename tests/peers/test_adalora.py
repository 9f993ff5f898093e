"""AdaLoRA against its formulas in NumPy, with prunes, and its budget."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loro_jax.peers import adalora
from loro_jax.peers.adalora import Budget, live_ranks, scores
from loro_jax.peers.triplets import Triplet, orthogonality_gradient

# Two stacked layers, and one; the bias is no adapter's.
SHAPES = {
    "stack": {"B": (2, 5, 3), "A": (2, 3, 4), "E": (2, 3)},
    "one": {"B": (4, 3), "A": (3, 6), "E": (3,)},
    "bias": (4,),
}
STEPS = 20
OPTIONS = {"target": 5 / 9, "initial": 0.1, "final": 0.3, "prune_every": 3, "orthogonality": 0.2}


def draw(seed, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    shapes = jax.tree.map(tuple, SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda s: jnp.array(rng.normal(size=s), dtype), shapes, is_leaf=is_shape)


def layers(tree):
    """NumPy's arrays of every single layer."""
    stack = [{k: np.array(v[i]) for k, v in tree["stack"].items()} for i in range(2)]
    return [*stack, {k: np.array(v) for k, v in tree["one"].items()}]


def by_numpy(params, gradients, rate):
    """All steps by the formulas, layer by layer: adapters, prunes, and average sensitivities."""
    state = [
        {k: [np.zeros_like(v), np.zeros_like(v)] for k, v in layer.items()}
        for layer in layers(params)
    ]
    own, counts = layers(params), []
    for t, gradient in enumerate(gradients):
        G = layers(gradient)
        for p, g in zip(own, G, strict=True):
            for name in "BA":
                X = p[name].T if name == "B" else p[name]
                D = X @ X.T - np.eye(len(X))
                of_X = 2 * D / np.sqrt((D**2).sum()) @ X
                g[name] = g[name] + 0.2 / 6 * (of_X.T if name == "B" else of_X)
        if t < 14:
            for p, g, s in zip(own, G, state, strict=True):
                for name, (mean, spread) in s.items():
                    now = np.abs(p[name] * g[name])
                    mean = 0.85 * mean + 0.15 * now
                    s[name] = [mean, 0.85 * spread + 0.15 * np.abs(now - mean)]
        for p, g in zip(own, G, strict=True):
            for name in p:
                p[name] = p[name] - rate * g[name]
        if t <= 2:
            continue
        budget = 5 if t > 14 else int(5 + 4 * (1 - (t - 2) / 12) ** 3)
        if t > 14 or t % 3 == 0:
            importance = []
            for s in state:
                ipt = {name: mean * spread for name, (mean, spread) in s.items()}
                importance.append(ipt["E"] + ipt["A"].mean(axis=1) + ipt["B"].mean(axis=0))
            threshold = np.sort(np.concatenate(importance))[::-1][budget - 1]
            for p, value in zip(own, importance, strict=True):
                p["E"] = np.where(value >= threshold, p["E"], 0.0)
            counts.append((t, budget))
    means = [{name: mean for name, (mean, _) in s.items()} for s in state]
    return own, counts, means


def test_it_is_the_formulas_of_the_method(x64):
    params = draw(0)
    gradients = [jax.tree.map(lambda x: 0.3 * x, draw(seed)) for seed in range(1, STEPS + 1)]
    expected, counts, means = by_numpy(params, gradients, 0.1)
    tx = adalora(optax.sgd(0.1), STEPS, **OPTIONS)
    state, update = tx.init(params), jax.jit(tx.update)
    live = {}
    start = params
    for t, gradient in enumerate(gradients):
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        live[t] = sum(int((layer["E"] != 0).sum()) for layer in layers(params))
    for found, wanted in zip(layers(params), expected, strict=True):
        for name in found:
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-12, atol=1e-13)
    # Not updated in the last part of the run.
    for found, wanted in zip(layers(state.mean), means, strict=True):
        for name in found:
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-12)
    bias = start["bias"] - 0.1 * sum(g["bias"] for g in gradients)
    np.testing.assert_allclose(params["bias"], bias, rtol=1e-12)
    # At every prune as many are live as the budget says; it falls, and ends at the target.
    assert [live[t] for t, _ in counts] == [budget for _, budget in counts]
    assert {t for t, _ in counts} == {3, 6, 9, 12, 15, 16, 17, 18, 19}
    assert [live[t] for t in (3, 6, 9, 19)] == [8, 6, 5, 5]
    # Between two prunes all are trained.
    assert live[4] == live[7] == 9


def test_pruned_ranks_stay_zero_after_the_last_stage():
    params = draw(0, jnp.float32)
    tx = adalora(optax.adam(0.1), STEPS, **OPTIONS)
    state, update = tx.init(params), jax.jit(tx.update)
    dead = []
    for seed in range(1, STEPS + 1):
        updates, state = update(draw(seed, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
        dead.append(np.concatenate([layer["E"] == 0 for layer in layers(params)]))
    for mask in dead[16:]:
        np.testing.assert_array_equal(mask, dead[15])
    assert dead[15].sum() == 4


def test_scores_by_hand():
    mean = Triplet(
        jnp.array([[1.0, 2.0], [3.0, 4.0]]),
        jnp.array([[5.0, 6.0], [7.0, 8.0]]),
        jnp.array([9.0, 1]),
    )
    spread = Triplet(
        jnp.array([[2.0, 1.0], [1.0, 0.5]]),
        jnp.array([[1.0, 1.0], [2.0, 0.0]]),
        jnp.array([1.0, 3]),
    )
    # E: 9, 3; rows of A: (5 + 6) / 2, (14 + 0) / 2; columns of B: (2 + 3) / 2, (2 + 2) / 2.
    np.testing.assert_allclose(scores([mean], [spread])[0], [9 + 5.5 + 2.5, 3 + 7 + 2])


def test_equal_scores_keep_exactly_the_budget():
    kept = live_ranks([jnp.ones((2, 3)), jnp.ones(2)], jnp.asarray(5))
    assert sum(int(mask.sum()) for mask in kept) == 5
    assert int(live_ranks([jnp.zeros(4)], jnp.asarray(4))[0].sum()) == 4


def test_the_budget_falls_along_a_cubic_curve():
    budget = Budget(total=144, target=96, first=10, last=50, every=10)
    found = [tuple(int(x) for x in budget.at(jnp.asarray(t))) for t in (0, 10, 20, 30, 45, 50, 51)]
    # 96 + 48 (1 - (t - 10) / 40)^3, truncated.
    assert found == [(144, 0), (144, 0), (116, 1), (102, 1), (96, 0), (96, 1), (96, 1)]


@pytest.mark.parametrize("open_", [None, [True, False, True]])
def test_the_gradient_of_the_penalty(x64, open_):
    params = draw(3)["one"]
    mask = jnp.array([True] * 3 if open_ is None else open_)

    def penalty(pair):
        both = mask[:, None] & mask
        norms = [
            jnp.linalg.norm(jnp.where(both, X @ X.T - jnp.eye(3), 0))
            for X in (pair["A"], pair["B"].T)
        ]
        return sum(norms)

    expected = jax.grad(penalty)(params)
    given = None if open_ is None else mask
    B, A = orthogonality_gradient(Triplet(**params), given)
    np.testing.assert_allclose(B, expected["B"], rtol=1e-12)
    np.testing.assert_allclose(A, expected["A"], rtol=1e-12)
    # Orthonormal triplets have no gradient, and no division by zero.
    eye = Triplet(jnp.eye(4)[:, :3], jnp.eye(6)[:3], params["E"])
    assert all(float(jnp.abs(x).max()) == 0 for x in orthogonality_gradient(eye))


def test_bad_settings_are_one_line():
    with pytest.raises(ValueError, match=r"adalora: initial \+ final must be below 1.*0\.5 and"):
        adalora(optax.sgd(0.1), 10, initial=0.5, final=0.5)
    with pytest.raises(ValueError, match=r"adalora: expected sibling parameters named B, A and E"):
        adalora(optax.sgd(0.1), 10).init({"B": jnp.ones((3, 2)), "A": jnp.ones((2, 3))})
