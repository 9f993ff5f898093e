"""Adapters of any network: what they compute, what they train, and what they leave alone."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from loro_jax import find_pairs, loro
from loro_jax.layers.adapters import (
    ADAPTERS,
    AdaptedLinear,
    Adapter,
    AdapterSpec,
    adapt,
    merge_adapters,
)
from loro_jax.layers.common import Fixed, ProjectionSpec
from loro_jax.layers.dense import Dense
from loro_jax.layers.low_rank import LowRankLinear
from tests.conftest import ROOT
from tests.helpers import some_fast

SPEC = AdapterSpec(rank=2)


def rngs():
    return nnx.Rngs(0)


def network():
    return nnx.Sequential(nnx.Linear(6, 5, rngs=rngs()), nnx.Linear(5, 4, rngs=rngs()))


class Stack(nnx.Module):
    """Three layers whose weights are stacked."""

    def __init__(self, base):
        make = nnx.split_rngs(splits=3)(nnx.vmap(base, in_axes=0, out_axes=0))
        self.layers = make(nnx.Rngs(1))

    def __call__(self, x):
        graphdef, state = nnx.split(self.layers)
        return jax.lax.scan(lambda x, s: (nnx.merge(graphdef, s)(x), None), x, state)[0]


def shaken(model, seed=1):
    """The network with random values in all that is trained."""
    rng = np.random.default_rng(seed)
    for _, leaf in nnx.iter_graph(model):
        if isinstance(leaf, nnx.Param):
            leaf[...] = jnp.asarray(rng.normal(scale=0.3, size=leaf.shape), leaf.dtype)
    return model


def inputs(n=6, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(3), (2, 7, n), dtype)


BIAS = ProjectionSpec(use_bias=True, dtype=None)
RANK = ProjectionSpec(rank=3, dtype=None)
BASES = {
    "flax": lambda rngs: nnx.Linear(6, 6, rngs=rngs),
    "dense with bias": lambda rngs: Dense(6, 6, BIAS, rngs),
    "low rank": lambda rngs: LowRankLinear(6, 6, RANK, rngs),
}


# All adapters on one base, and one on all.
PAIRS = list(itertools.product(BASES, ADAPTERS))
FAST = [pair for pair in PAIRS if pair[0] == "flax" or pair[1] == "lora"]


@pytest.mark.parametrize("base_and_kind", some_fast(PAIRS, FAST), ids="-".join)
def test_it_starts_as_the_network_and_merges_into_it(x64, base_and_kind):
    base, kind = base_and_kind
    model = Stack(BASES[base])
    x = inputs(dtype=jnp.float64)
    spec = AdapterSpec(kind=kind, rank=2, param_dtype=jnp.float64)
    adapted, before = adapt(model, spec), model(x)
    np.testing.assert_array_equal(adapted(x), before)
    # The function of each adapted layer is that of its merged weight.
    shaken(adapted)
    y = adapted(x)
    assert float(jnp.abs(y - before).max()) > 1e-3
    merged = merge_adapters(adapted)
    assert not any(isinstance(m, AdaptedLinear) for _, m in nnx.iter_graph(merged))
    # Weights of the base are float32.
    chex.assert_trees_all_close(merged(x), y, atol=1e-5)
    assert not jax.tree.leaves(nnx.state(merged, Fixed))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_only_adapters_train(kind):
    adapted = adapt(network(), AdapterSpec(kind=kind, rank=2))
    shaken(adapted)
    graphdef, trained, fixed = nnx.split(adapted, nnx.Param, ...)
    assert all("adapter" in path for path, _ in nnx.to_flat_state(trained))
    x = inputs()
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p, fixed)(x) ** 2)))
    grads = gradient(trained)
    for leaf in jax.tree.leaves(grads):
        assert float(jnp.abs(leaf).max()) > 0
    assert jax.tree.leaves(nnx.state(adapted, Fixed))


def test_lora_is_its_formula(x64):
    layer = nnx.Linear(6, 5, rngs=rngs())
    for spec, scale in (
        (AdapterSpec(rank=4, alpha=8), 2.0),
        (AdapterSpec(rank=4, alpha=8, rank_stabilised=True), 4.0),
    ):
        adapted = shaken(adapt(layer, spec))
        B, A, x = (
            np.asarray(v, np.float64)
            for v in (adapted.adapter.B[...], adapted.adapter.A[...], inputs())
        )
        expected = x @ (np.asarray(layer.kernel[...]).T + scale * B @ A).T + np.asarray(
            layer.bias[...]
        )
        np.testing.assert_allclose(adapted(inputs()), expected, atol=1e-5)


@pytest.mark.parametrize("base", ["flax", "dense with bias"])
def test_factors_that_are_not_zero_are_absorbed(base):
    model = Stack(BASES[base])
    adapted = adapt(model, AdapterSpec(rank=2, alpha=3.0, initialiser="xavier"))
    assert float(jnp.abs(adapted.layers.adapter.B[...]).min()) > 0
    chex.assert_trees_all_close(adapted(inputs()), model(inputs()), atol=1e-5)
    chex.assert_trees_all_close(merge_adapters(adapted)(inputs()), model(inputs()), atol=1e-5)


def test_a_product_absorbs_nothing():
    with pytest.raises(ValueError, match=r"the weight of 'layers' is a product of factors"):
        adapt(Stack(BASES["low rank"]), AdapterSpec(rank=2, initialiser="xavier"))


def test_loro_trains_the_product():
    adapted = adapt(network(), SPEC)
    graphdef, trained, fixed = nnx.split(adapted, nnx.Param, ...)
    params = nnx.to_pure_dict(trained)
    assert len(find_pairs(params)) == 2
    x, target = inputs(), jax.random.normal(jax.random.key(9), (2, 7, 4))

    def loss(params):
        state = nnx.state(adapted, nnx.Param)
        state.replace_by_pure_dict(params)
        return jnp.mean((nnx.merge(graphdef, state, fixed)(x) - target) ** 2)

    tx = loro(0.01, exact_every=5)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    before, state = loss(params), tx.init(params)
    for _ in range(30):
        params, state = step(params, state)
    assert float(loss(params)) < 0.8 * float(before)


def test_what_is_asked_for_stays_trained():
    adapted = adapt(network(), SPEC, where="layers/0", trained=["layers/1/bias"])
    paths = {
        "/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(adapted, nnx.Param))
    }
    assert paths == {"layers/0/adapter/A", "layers/0/adapter/B", "layers/1/bias"}


def test_the_given_network_is_unchanged_and_its_options_are_read():
    model = network()
    before = nnx.to_pure_dict(nnx.state(model))
    adapted = adapt(model, SPEC)
    assert adapted.layers[0].out_features == 5
    shaken(adapted)
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model)), before)
    assert adapt(model, SPEC, in_place=True) is model
    assert isinstance(model.layers[0], AdaptedLinear)


def test_a_shared_layer_has_one_adapter_and_abstract_networks_have_shapes():
    layer = nnx.Linear(5, 5, rngs=rngs())
    model = nnx.Sequential(layer, jnp.tanh, layer)
    adapted = adapt(model, SPEC)
    assert adapted.layers[0] is adapted.layers[2]
    abstract = nnx.eval_shape(lambda: adapt(network(), SPEC))
    shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(abstract, nnx.Param)))
    assert shapes["layers"][0]["adapter"] == {"A": (2, 6), "B": (5, 2)}


def test_a_network_in_16_bits_has_adapters_in_32():
    layer = nnx.Linear(6, 5, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=rngs())
    adapted = adapt(layer, SPEC)
    assert adapted.adapter.B.dtype == jnp.float32
    assert adapted(inputs(dtype=jnp.bfloat16)).dtype == jnp.bfloat16
    assert merge_adapters(adapted).kernel.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (AdapterSpec(kind="lorra"), {}, r"adapt: kind must be one of lora.*is 'lorra'"),
        (AdapterSpec(rank=5), {}, r"adapt: rank = 5 of 'layers/1', 5 inputs to 4 outputs"),
        (SPEC, {"where": "head"}, r"adapt: where = 'head' matches no layer"),
        (SPEC, {"trained": ["norm"]}, r"adapt \(trained\): where = 'norm' matches no layer"),
    ],
)
def test_bad_input_is_one_line(spec, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        adapt(network(), spec, **options)
    assert "\n" not in str(caught.value)


def test_adapters_are_not_stacked_on_adapters():
    with pytest.raises(ValueError, match=r"has adapters already; expected merge_adapters first"):
        adapt(adapt(network(), SPEC), SPEC)


def test_every_kind_documents_itself():
    readme = (ROOT / "loro_jax" / "layers" / "README.md").read_text(encoding="utf-8")
    for name, kind in ADAPTERS.items():
        assert issubclass(kind, Adapter)
        assert "dW" in kind.__doc__
        assert f"| `{name}` | " in readme.partition("## Adapters")[2]
