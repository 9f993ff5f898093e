"""IncreLoRA against its formulas in NumPy, with growth, and the score of its adapter."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from loro_jax.layers.adapters import AdapterSpec, adapt
from loro_jax.peers import increlora
from loro_jax.peers.increlora import RESERVE, SCORE_UNIT, opened_ranks

# Two stacked layers, and one; the bias is no adapter's.
SHAPES = {
    "stack": {"B": (2, 5, 4), "A": (2, 4, 6), "E": (2, 4), "score": (2,)},
    "one": {"B": (4, 4), "A": (4, 5), "E": (4,), "score": ()},
}
OPTIONS = {"target": 7 / 12, "grow_from": 1, "grow_every": 3, "top": 2, "orthogonality": 0.2}
STEPS = 16


def draw(seed, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.array(rng.normal(size=s), dtype),
        SHAPES | {"bias": (4,)},
        is_leaf=lambda x: isinstance(x, tuple),
    )


def begin(dtype=jnp.float64):
    params = draw(0, dtype)
    for name in ("stack", "one"):
        params[name] |= {"E": 0 * params[name]["E"], "score": 0 * params[name]["score"]}
    return params


def gradients(seed, dtype=jnp.float64):
    """Gradients, with scores above zero."""
    grads = jax.tree.map(lambda x: 0.3 * x, draw(seed, dtype))
    for name in ("stack", "one"):
        grads[name]["score"] = SCORE_UNIT * jnp.abs(grads[name]["score"])
    return grads


def layers(tree):
    """NumPy's arrays of every single layer."""
    stack = [{k: np.array(v[i]) for k, v in tree["stack"].items()} for i in range(2)]
    return [*stack, {k: np.array(v) for k, v in tree["one"].items()}]


def orthogonal_part(X, count):
    D = np.zeros((len(X), len(X)))
    D[:count, :count] = X[:count] @ X[:count].T - np.eye(count)
    return 2 * D / np.sqrt((D**2).sum()) @ X


def by_numpy(params, grads, rate, ranks_per_round=1):
    """All steps by the formulas, layer by layer: the adapters, and the ranks after each step."""
    own = layers(params)
    rank, mean, spread, history = [1] * 3, [0.0] * 3, [0.0] * 3, []
    for t, gradient in enumerate(grads):
        left = 7 - sum(rank)
        reserve = ranks_per_round if t > 0 and left > 0 else 0
        old = list(rank)
        G = layers(gradient)
        if left > 0:
            for i, g in enumerate(G):
                score = g["score"] / SCORE_UNIT
                mean[i] = 0.85 * mean[i] + 0.15 * score
                spread[i] = 0.85 * spread[i] + 0.15 * abs(score - mean[i])
            if t > 1 and t % 3 == 0:
                scores = [mean[i] * spread[i] if rank[i] < 4 else -1 for i in range(3)]
                for i in np.argsort(scores)[::-1][:2]:
                    more = min(ranks_per_round, left, 4 - rank[i])
                    rank[i] += more
                    left -= more
        after = ranks_per_round if sum(rank) < 7 else 0
        for p, g, before, now in zip(own, G, old, rank, strict=True):
            count = min(before + reserve, 4)
            p_B = g["B"] + 0.2 / 6 * orthogonal_part(p["B"].T, count).T
            p_A = g["A"] + 0.2 / 6 * orthogonal_part(p["A"], count)
            p["B"], p["A"] = p["B"] - rate * p_B, p["A"] - rate * p_A
            E = np.zeros(4)
            E[: now + after] = RESERVE
            E[:before] = p["E"][:before] - rate * g["E"][:before]
            p["E"] = E
        history.append(list(rank))
    return own, history


def ranks(state):
    stack, one = sorted(state.adapters, key=lambda g: -g.rank.ndim)
    return [*np.asarray(stack.rank).tolist(), int(one.rank)]


@pytest.mark.parametrize("ranks_per_round", [1, 2])
def test_it_is_the_formulas_of_the_method(x64, ranks_per_round):
    params = begin()
    grads = [gradients(seed) for seed in range(1, STEPS + 1)]
    expected, history = by_numpy(params, grads, 0.1, ranks_per_round)
    tx = increlora(optax.sgd(0.1), STEPS, ranks_per_round=ranks_per_round, **OPTIONS)
    state, update = tx.init(params), jax.jit(tx.update)
    found = []
    for gradient in grads:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        found.append(ranks(state))
    assert found == history
    # All rounds together spend the budget.
    assert sum(found[0]) == 3
    assert sum(found[-1]) == round(7 / 12 * 12)
    for own, wanted in zip(layers(params), expected, strict=True):
        for name in ("B", "A", "E"):
            np.testing.assert_allclose(own[name], wanted[name], rtol=1e-12, atol=1e-13)
        assert own["score"] == 0
    # What was never open is zero.
    for own, rank in zip(layers(params), found[-1], strict=True):
        assert np.count_nonzero(own["E"]) == rank


def product(layer):
    return (layer["B"] * layer["E"]) @ layer["A"]


def test_growth_changes_the_output_by_the_reserve_alone():
    params = begin(jnp.float32)
    tx = increlora(optax.sgd(0.0), STEPS, **OPTIONS)
    state, update = tx.init(params), jax.jit(tx.update)
    grown = 0
    for seed in range(1, STEPS + 1):
        updates, state_after = update(gradients(seed, jnp.float32), state, params)
        after = optax.apply_updates(params, updates)
        grown += ranks(state_after) != ranks(state)
        for old, new in zip(layers(params), layers(after), strict=True):
            size = RESERVE * np.abs(new["B"]).max() * np.abs(new["A"]).max()
            assert np.abs(product(new) - product(old)).max() <= 2 * size
        params, state = after, state_after
    assert grown >= 2


def test_only_open_ranks_have_moments_of_E():
    params = begin(jnp.float32)
    tx = increlora(optax.adam(0.1), STEPS, **OPTIONS)
    state, update = tx.init(params), jax.jit(tx.update)
    for seed in range(1, STEPS + 1):
        before = ranks(state)
        updates, state = update(gradients(seed, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
        for own, rank in zip(layers(state.inner[0].mu), before, strict=True):
            assert np.all(own["E"][:rank] != 0)
            assert np.all(own["E"][rank:] == 0)
            assert own["score"] == 0


def test_a_round_opens_ranks_of_the_highest_scores():
    scores = jnp.array([0.3, 0.9, 0.1, 0.5])
    room = jnp.array([3, 3, 3, 3])
    assert opened_ranks(scores, room, 9, 2, 1).tolist() == [0, 1, 0, 1]
    assert opened_ranks(scores, room, 1, 2, 1).tolist() == [0, 1, 0, 0]
    assert opened_ranks(scores, room.at[1].set(0), 9, 2, 2).tolist() == [2, 0, 0, 2]
    assert opened_ranks(scores, room, 3, 2, 2).tolist() == [0, 2, 0, 1]
    assert opened_ranks(scores, room, 0, 4, 1).tolist() == [0, 0, 0, 0]


def test_parts_that_join_have_a_curve_of_their_own(x64):
    """With a rate of 1 each step's update is the learning rate of its part."""

    def schedule(step):
        # Linear up in two steps, and down to 0 at the end of the run.
        return jnp.where(step < 2, (step + 1) / 2, (STEPS - step) / (STEPS - 2))

    params = begin()
    settings = OPTIONS | {"orthogonality": 0.0}
    tx = increlora(optax.sgd(schedule), STEPS, learning_rate=schedule, warmup_steps=2, **settings)
    state, update = tx.init(params), jax.jit(tx.update)
    moved, births = [], []
    for seed in range(1, STEPS + 1):
        grads = jax.tree.map(jnp.ones_like, gradients(seed))
        grads["one"]["score"], grads["stack"]["score"] = SCORE_UNIT, SCORE_UNIT * jnp.array([2, 3])
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        moved.append((-updates["stack"]["B"][1, 0], -updates["stack"]["E"][1]))
        births.append(next(np.asarray(g.joined) for g in state.adapters if g.rank.ndim)[1])
    opened = next(np.asarray(g.opened) for g in state.adapters if g.rank.ndim)[1]
    joined = births[-1]
    # The highest score: it grows at 3, 6 and 9; each reserve joins when the one before it opens.
    np.testing.assert_array_equal(opened, [0, 3, 6, 0])
    np.testing.assert_array_equal(joined, [0, 0, 3, 0])

    def own_rate(step, since):
        age, left = step - since, STEPS - since
        return (age + 1) / 2 if age < 2 else 1 - (age - 2) / (left - 2)

    for t, (B, E) in enumerate(moved):
        for rank in range(3):
            if t > joined[rank]:
                assert float(B[rank]) == pytest.approx(own_rate(t, joined[rank]))
            if t > opened[rank]:
                assert float(E[rank]) == pytest.approx(own_rate(t, opened[rank]))


@pytest.mark.parametrize("batch", [(7,), (2, 7)])
def test_the_score_is_that_of_the_dense_gradient(x64, batch):
    layer = nnx.Linear(6, 5, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    spec = AdapterSpec(kind="increlora", rank=3, param_dtype=jnp.float64)
    adapted = adapt(layer, spec)
    own = adapted.adapter
    own.E[...] = jnp.array([0.7, RESERVE, 0.0])
    x = jax.random.normal(jax.random.key(2), (*batch, 6), jnp.float64)
    graphdef, trained, fixed = nnx.split(adapted, nnx.Param, ...)
    grads = jax.grad(lambda p: jnp.sum(jnp.sin(nnx.merge(graphdef, p, fixed)(x))))(trained)
    dW = own.weight(None)
    plain = layer.kernel[...]
    G = jax.grad(lambda W: jnp.sum(jnp.sin(x @ (plain + W.T) + layer.bias[...])))(dW)
    expected = np.abs(np.asarray(dW) * np.asarray(G)).sum() / np.sqrt(30)
    found = grads["adapter"]["score"][...] / SCORE_UNIT
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    # The others are those of the product.
    B, A, E = (np.asarray(v[...]) for v in (own.B, own.A, own.E))
    s = 16 / (3 + 1e-5)
    np.testing.assert_allclose(dW, s * (B * E) @ A, rtol=1e-9)
    np.testing.assert_allclose(grads["adapter"]["B"][...], s * (G @ A.T) * E, rtol=1e-9)
    np.testing.assert_allclose(grads["adapter"]["A"][...], s * (B * E).T @ G, rtol=1e-9)
    np.testing.assert_allclose(
        grads["adapter"]["E"][...], s * np.einsum("mr,mn,rn->r", B, G, A), rtol=1e-9
    )


def test_scores_do_not_count_in_the_norm_of_gradients():
    grads = {"B": jnp.full((3, 2), 0.01), "score": jnp.asarray(SCORE_UNIT * 1e3)}
    assert float(optax.tree.norm(grads)) == float(optax.tree.norm({"B": grads["B"]}))


def test_an_adapter_without_a_score_is_refused():
    params = {"B": jnp.ones((3, 2)), "A": jnp.ones((2, 3)), "E": jnp.zeros(2)}
    with pytest.raises(ValueError, match=r"increlora: expected a parameter named score"):
        increlora(optax.sgd(0.1), 10).init(params)
