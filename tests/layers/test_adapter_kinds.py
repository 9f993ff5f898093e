"""Forms of adapters: each against its formula, built densely, and what is special about it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loro_jax import find_pairs
from loro_jax.layers.adapters import AdapterSpec, adapt, probed, start_from_gradients
from loro_jax.layers.adapters.randlora import bases
from loro_jax.layers.common import Fixed

RANK = 3  # divides neither 8 nor 10


def made(kind, m=8, n=10, rank=RANK, **changes):
    """An adapted layer in float64, with random values in all that is trained."""
    layer = nnx.Linear(n, m, use_bias=False, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    spec = AdapterSpec(kind=kind, rank=rank, param_dtype=jnp.float64, **changes)
    adapted = adapt(layer, spec)
    rng = np.random.default_rng(1)
    for _, leaf in nnx.iter_graph(adapted):
        if isinstance(leaf, nnx.Param):
            leaf[...] = jnp.asarray(rng.normal(size=leaf.shape))
    return adapted


def arrays(adapted):
    """The adapter's arrays, and the weight (out, in)."""
    variables = nnx.to_pure_dict(nnx.state(adapted.adapter))
    found = {name: np.asarray(value) for name, value in variables.items()}
    return found, np.asarray(adapted.base.kernel[...]).T


def dense_miss(a, W):
    m, n = W.shape
    dW = np.zeros((m, n))
    for column in range(n):
        dW[:, column] = a["b"][column % RANK]
    return dW


def dense_bone(a, W):
    m, n = W.shape
    filled = np.zeros((-(-m // RANK) * RANK, -(-n // RANK) * RANK))
    filled[:m, :n] = W
    dW = np.zeros_like(filled)
    for i in range(0, len(filled), RANK):
        for j in range(0, filled.shape[1], RANK):
            block = filled[i : i + RANK, j : j + RANK]
            b = a["b"][i // RANK]
            dW[i : i + RANK, j : j + RANK] = block @ b + b
    return dW[:m, :n]


def dense_lora_sb(a, W):
    return a["B"] @ a["R"] @ a["A"]


def dense_randlora(a, W):
    m, n = W.shape
    r, k = a["l"].shape
    B, A = (np.asarray(v, np.float64) for v in bases(0, m, n, r))
    total = 0.0
    for i in range(k):
        total += B[:, i::k] @ np.diag(a["l"][:, i]) @ A @ np.diag(a["g"][i])
    total *= 16.0 / r / np.sqrt(k)
    return total if n <= m else total.T


DENSE = {
    "miss": dense_miss,
    "bone": dense_bone,
    "lora_sb": dense_lora_sb,
    "randlora": dense_randlora,
}


@pytest.mark.parametrize("shape", [(8, 10), (10, 8)])
@pytest.mark.parametrize("kind", DENSE)
def test_it_is_its_formula(x64, kind, shape):
    adapted = made(kind, *shape)
    found, W = arrays(adapted)
    dW = DENSE[kind](found, W)
    assert np.abs(dW).max() > 0.1
    x = np.random.default_rng(2).normal(size=(4, shape[1]))
    np.testing.assert_allclose(adapted(jnp.asarray(x)), x @ (W + dW).T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(adapted.adapter.weight(jnp.asarray(W)), dW, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("miss", {"b": (3, 8)}),
        ("bone", {"b": (3, 3, 3)}),
        ("lora_sb", {"R": (3, 3)}),
        ("randlora", {"l": (3, 3), "g": (3, 8)}),
    ],
)
def test_what_it_trains(kind, shapes):
    layer = nnx.Linear(10, 8, rngs=nnx.Rngs(0))
    adapted = adapt(layer, AdapterSpec(kind=kind, rank=RANK))
    state = nnx.to_pure_dict(nnx.state(adapted, nnx.Param))["adapter"]
    assert jax.tree.map(jnp.shape, state) == shapes
    assert not find_pairs(state)


def test_randlora_reaches_full_rank_and_shares_its_bases():
    class Two(nnx.Module):
        def __init__(self):
            self.one = nnx.Linear(10, 8, rngs=nnx.Rngs(0))
            self.other = nnx.Linear(10, 8, rngs=nnx.Rngs(1))

    model = adapt(Two(), AdapterSpec(kind="randlora", rank=RANK, seed=5))
    adapters = [model.one.adapter, model.other.adapter]
    # No array of a base's size is stored; all that is fixed is the seed.
    assert [a.seed[...].item() for a in adapters] == [5, 5]
    assert [leaf.size for leaf in jax.tree.leaves(nnx.state(adapters[0], Fixed))] == [1]
    for a in adapters:
        a.l[...] = jnp.ones_like(a.l[...])
    assert int(jnp.linalg.matrix_rank(adapters[0].weight(jnp.zeros((8, 10))))) == RANK
    # As soon as the scales of the bases differ, after the second step.
    for a in adapters:
        a.g[...] = jax.random.normal(jax.random.key(0), a.g.shape)
    W = jnp.zeros((8, 10))
    first = adapters[0].weight(W)
    # The same trained values make the same change: the bases are the same.
    np.testing.assert_array_equal(first, adapters[1].weight(W))
    assert int(jnp.linalg.matrix_rank(first)) == 8
    # A seed makes them again; another one makes others.
    np.testing.assert_array_equal(bases(5, 8, 10, RANK)[0], bases(5, 8, 10, RANK)[0])
    assert float(jnp.abs(bases(5, 8, 10, RANK)[0] - bases(6, 8, 10, RANK)[0]).max()) > 1
    many = np.asarray(bases(5, 200, 300, 8)[0])
    np.testing.assert_allclose([many.mean(), many.std()], [0, 1], atol=0.02)


class Network(nnx.Module):
    """A dense layer, and a stack of two."""

    def __init__(self):
        self.first = nnx.Linear(10, 8, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        make = lambda rngs: nnx.Linear(8, 8, param_dtype=jnp.float64, rngs=rngs)  # noqa: E731
        self.stack = nnx.split_rngs(splits=2)(nnx.vmap(make))(nnx.Rngs(1))

    def __call__(self, x):
        graphdef, state = nnx.split(self.stack)
        step = lambda x, s: (jnp.tanh(nnx.merge(graphdef, s)(x)), None)  # noqa: E731
        return jax.lax.scan(step, self.first(x), state)[0]


def test_lora_sb_starts_from_the_gradient(x64):
    network, x = Network(), jax.random.normal(jax.random.key(0), (6, 10), jnp.float64)
    target = jax.random.normal(jax.random.key(1), (6, 8), jnp.float64)
    loss = lambda model: jnp.mean((model(x) - target) ** 2)  # noqa: E731
    model = adapt(network, AdapterSpec(kind="lora_sb", rank=RANK, param_dtype=jnp.float64))
    before = nnx.to_pure_dict(nnx.state(model))
    gradients = nnx.grad(loss)(probed(model))
    # Probes have the gradient of the dense weights, and the network is as it was.
    dense = nnx.grad(loss)(network)
    G = {name: np.asarray(dense[name].kernel[...].mT) for name in ("first", "stack")}
    for name in G:
        np.testing.assert_allclose(gradients[name].adapter.W[...], G[name], atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model)), before)

    start_from_gradients(model, gradients, rate=0.01)
    assert float(loss(model)) < float(loss(network))
    adapter = model.stack.adapter
    for layer in range(2):
        B, R, A = (np.asarray(v[...])[layer] for v in (adapter.B, adapter.R, adapter.A))
        np.testing.assert_allclose(B.T @ B, np.eye(RANK), atol=1e-12)
        np.testing.assert_allclose(A @ A.T, np.eye(RANK), atol=1e-12)
        U, s, Vt = np.linalg.svd(-0.01 * np.sign(G["stack"][layer]))
        best = (U[:, :RANK] * s[:RANK]) @ Vt[:RANK]
        np.testing.assert_allclose(B @ R @ A, best, atol=1e-12)
    # The gradient of the core is that of the weight, projected.
    at_start = nnx.grad(loss)(model).first.adapter.R[...]
    G1 = nnx.grad(loss)(probed(merged_with_start(model))).first.adapter.W[...]
    B, A = model.first.adapter.B[...], model.first.adapter.A[...]
    np.testing.assert_allclose(at_start, B.T @ G1 @ A.T, atol=1e-8)


def merged_with_start(model):
    """An adapted network whose dense weights are those of ``model``, changes included."""
    from loro_jax.layers.adapters import merge_adapters

    return adapt(merge_adapters(model), AdapterSpec(kind="lora_sb", rank=RANK))


def test_gradients_that_do_not_fit_are_one_line():
    model = adapt(nnx.Sequential(nnx.Linear(10, 8, rngs=nnx.Rngs(0))), AdapterSpec("lora_sb", 2))
    gradients = {"layers": {0: {"adapter": {"W": jnp.ones((10, 8))}}}}
    message = r"weight of 'layers/0' has the shape \(8, 10\); .* there is one of shape \(10, 8\)"
    with pytest.raises(ValueError, match=message):
        start_from_gradients(model, gradients, 0.1)
    with pytest.raises(ValueError, match=r"but there is none"):
        start_from_gradients(model, {}, 0.1)
