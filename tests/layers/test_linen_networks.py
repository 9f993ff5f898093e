"""Linen networks of other packages, which can't be edited."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

from loro_jax import find_pairs, loro
from loro_jax.layers.linen import (
    factorise_params,
    kernel_layouts,
    low_rank_calls,
    merge_params,
    summary_params,
)
from tests.layers.linen_helpers import assert_close, by_pairs


def size(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.fixture(scope="module")
def experts():
    """A transformer with a mixture of experts: the network, its parameters, and tokens."""
    nano_moe = pytest.importorskip("nano_moe", reason="needs nano-moe-jax")
    config = nano_moe.NanoMoEConfig(
        vocab_size=20, d_model=16, n_heads=2, n_layers=1, d_ff=32, n_experts=2, block_size=8
    )
    model = nano_moe.NanoMoE(config)
    tokens = jax.random.randint(jax.random.key(1), (4, 8), 0, 20)
    return model, jax.jit(model.init)(jax.random.key(0), tokens)["params"], tokens


@pytest.mark.slow
def test_a_mixture_of_experts_at_full_rank_computes_the_same(experts):
    model, params, tokens = experts
    layouts = kernel_layouts(model, tokens)
    assert len(layouts) == 2 + 1 + 2 * 2 + 1
    pairs = factorise_params(params, 1.0, init="svd", layouts=layouts)
    assert {pair.name for pair in find_pairs(pairs, _all_pairs)} == set(layouts)
    y, balance = jax.jit(by_pairs(model))({"params": pairs}, tokens)
    y_wanted, balance_wanted = model.apply({"params": params}, tokens)
    assert_close(y, y_wanted)
    assert jnp.isclose(balance, balance_wanted)
    merged = merge_params(pairs, layouts=layouts)
    assert_close(model.apply({"params": merged}, tokens)[0], y_wanted)


def _all_pairs(params):
    """Names all pairs, also those of square kernels at full rank, whose factors are square."""

    def label(path, _):
        *parents, name = (entry.key for entry in path)
        return f"{'/'.join(parents)}.{name}" if name in ("B", "A") else None

    return jax.tree_util.tree_map_with_path(label, params)


@pytest.mark.slow
def test_a_mixture_of_experts_is_trained_without_recompiling(experts):
    model, params, tokens = experts
    dense = params
    where = ["block_*/**", "!**/Router_0/**"]
    params = factorise_params(params, 0.25, where=where)
    table = summary_params(params, dense=dense)
    assert (table.parameters, table.parameters_before) == (size(params), size(dense))
    assert size(params) < 0.75 * size(dense)
    tx = loro(0.01, exact_every=2, exact_method="svd")
    traced = []

    def loss(params, key):
        traced.append(1)
        apply = functools.partial(model.apply, rngs={"dropout": key}, deterministic=False)
        y, balance = apply({"params": params}, tokens)
        losses = optax.softmax_cross_entropy_with_integer_labels(y[:, :-1], tokens[:, 1:])
        return losses.mean() + 0.01 * balance

    @jax.jit
    @low_rank_calls()
    def step(params, state, key):
        value, grads = jax.value_and_grad(loss)(params, key)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for i in range(8):
        params, state, value = step(params, state, jax.random.key(i))
        losses.append(float(value))
    assert (len(traced), step._cache_size()) == (1, 1)
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.slow
def test_a_residual_network_at_full_rank_computes_the_same():
    flaxmodels = pytest.importorskip("flaxmodels", reason="needs flaxmodels")
    model = flaxmodels.ResNet18(output="logits", pretrained=None, normalize=False, num_classes=10)
    x = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    layouts = kernel_layouts(model, x)
    assert len(layouts) == 21
    # The decomposition of the wider kernels takes a minute.
    where = ["Conv_0", "BasicBlock_0/**", "BasicBlock_2/Conv_2", "Dense_0"]
    pairs = factorise_params(variables["params"], 1.0, init="svd", layouts=layouts, where=where)
    assert len(find_pairs(pairs)) == 5
    y = jax.jit(by_pairs(model, train=False))({**variables, "params": pairs}, x)
    assert_close(y, jax.jit(functools.partial(model.apply, train=False))(variables, x))
    table = summary_params(pairs, layouts=layouts)
    assert table.parameters == size(pairs)
    assert table.parameters_before == size(variables["params"])
