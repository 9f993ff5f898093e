"""Linen's low-rank modules, in the place of those of Flax."""

import functools
import pickle
from collections.abc import Callable

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

from loro_jax import find_pairs, loro
from loro_jax.layers.linen import (
    LowRankDense,
    LowRankDenseGeneral,
    factorise_params,
    kernel_layouts,
    merge_params,
    summary_params,
)
from tests.layers.linen_helpers import assert_close, drawn

BIASED = {"bias_init": nn.initializers.normal(1.0)}

# A module, the module of Flax whose place it takes, and the shape of an input.
COUNTERPARTS = {
    "dense": (LowRankDense(5, 2, **BIASED), nn.Dense(5, **BIASED), (2, 3, 7)),
    "without a bias": (LowRankDense(5, 0.4, use_bias=False), nn.Dense(5, use_bias=False), (3, 7)),
    "general": (
        LowRankDenseGeneral((5, 2), 2, axis=(-1, 1), **BIASED),
        nn.DenseGeneral((5, 2), axis=(-1, 1), **BIASED),
        (2, 3, 4, 6),
    ),
    "general, batch": (
        LowRankDenseGeneral((5, 2), 2, axis=(-1, 2), batch_dims=(0,), **BIASED),
        nn.DenseGeneral((5, 2), axis=(-1, 2), batch_dims=(0,), **BIASED),
        (2, 3, 4, 6),
    ),
    "dtypes": (
        LowRankDense(5, 2, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16),
        nn.Dense(5, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16),
        (3, 7),
    ),
}


@pytest.mark.parametrize("name", COUNTERPARTS)
def test_it_takes_the_place_of_a_module_of_flax(name):
    module, counterpart, shape = COUNTERPARTS[name]
    variables, x = drawn(module, shape)
    dense = counterpart.init(jax.random.key(0), x)["params"]
    layouts = kernel_layouts(module, x)
    assert layouts == kernel_layouts(counterpart, x)
    # Its parameters are those that the counterpart's become, and become those.
    chex.assert_trees_all_equal_shapes_and_dtypes(
        variables["params"], factorise_params(dense, 2, layouts=layouts)
    )
    merged = merge_params(variables["params"], layouts=layouts)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, dense)
    y, wanted = module.apply(variables, x), counterpart.apply({"params": merged}, x)
    assert (y.shape, y.dtype) == (wanted.shape, wanted.dtype)
    if y.dtype == jnp.float32:
        assert_close(y, wanted)
    else:
        np.testing.assert_allclose(y, wanted, atol=0.05)
    (row,) = summary_params(variables["params"], layouts=layouts).rows
    assert row.rank == 2
    assert row.after == sum(leaf.size for leaf in jax.tree.leaves(variables))


@pytest.mark.slow
def test_factors_start_from_the_kernel():
    x = jnp.ones((1, 400))
    init = functools.partial(LowRankDense, 200)(rank=16).init(jax.random.key(0), x)["params"]
    W = init["B"] @ init["A"]
    assert np.isclose(jnp.std(W), 400**-0.5, rtol=0.1)  # nn.Dense's
    small = LowRankDense(200, 16, kernel_init=nn.initializers.normal(1e-3))
    B, A = (small.init(jax.random.key(0), x)["params"][name] for name in "BA")
    assert np.isclose(jnp.std(B @ A), 1e-3, rtol=0.1)
    # Both factors are those of one kernel.
    fixed = jax.random.normal(jax.random.key(3), (400, 200))
    module = LowRankDense(200, 200, kernel_init=lambda *_: fixed, initialiser="svd")
    params = module.init(jax.random.key(0), x)["params"]
    np.testing.assert_allclose(params["B"] @ params["A"], fixed.T, atol=1e-4)
    lora = LowRankDense(200, 16, initialiser="lora").init(jax.random.key(0), x)["params"]
    assert not lora["B"].any()
    assert lora["A"].any()


def test_modules_of_one_network_start_differently():
    network = nn.Sequential([LowRankDense(6, 2), LowRankDense(6, 2)])
    params = drawn(network, (2, 6))[0]["params"]
    assert not np.allclose(params["layers_0"]["B"], params["layers_1"]["B"])
    assert not np.allclose(params["layers_0"]["A"], params["layers_0"]["B"].T)


class Perceptron(nn.Module):
    """A network with a hook for its layers."""

    dense_cls: Callable[..., nn.Module] = nn.Dense

    @nn.compact
    def __call__(self, x):
        h = nn.relu(self.dense_cls(32, kernel_init=nn.initializers.he_normal(), name="up")(x))
        return self.dense_cls(4, name="down")(h)


@pytest.mark.slow
def test_a_network_with_a_hook_is_trained_without_recompiling():
    network = Perceptron(functools.partial(LowRankDense, rank=0.5))
    variables, x = drawn(network, (8, 12))
    params = variables["params"]
    assert {pair.name for pair in find_pairs(params)} == {"up", "down"}
    merged = merge_params(params)
    assert_close(network.apply(variables, x), Perceptron().apply({"params": merged}, x))
    labels, tx, traced = jnp.arange(8) % 4, loro(0.01, exact_every=2, exact_method="svd"), []

    def loss(params):
        traced.append(1)
        y = network.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(y, labels).mean()

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for _ in range(8):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert (len(traced), step._cache_size()) == (1, 1)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("lifted", ["scan", "vmap"])
def test_stacks(lifted):
    lift = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    named = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
    layer = functools.partial(LowRankDense, 6, rank=2, kernel_init=named)
    lift["metadata_params"] = {nn.PARTITION_NAME: "layers"}

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = layer(name="dense")(x)
            return (y, None) if lifted == "scan" else y

    if lifted == "scan":
        network, shape = nn.scan(nn.remat(Layer), length=3, **lift)(), (2, 6)
    else:
        network, shape = nn.vmap(Layer, **lift)(), (3, 2, 6)
    variables, x = drawn(network, shape)
    params = variables["params"]["dense"]
    assert (params["B"].names, params["A"].names) == (
        ("layers", "mlp", None),
        ("layers", None, "embed"),
    )
    B, A, bias = (nn.unbox(params)[name] for name in ("B", "A", "bias"))
    assert (B.shape, A.shape) == ((3, 6, 2), (3, 2, 6))
    assert not np.allclose(B[0], B[1])
    y = jax.jit(network.apply)(variables, x)
    if lifted == "scan":
        wanted = x
        for i in range(3):
            wanted = wanted @ A[i].T @ B[i].T + bias[i]
        np.testing.assert_allclose(y[0], wanted, atol=1e-5)
    else:
        np.testing.assert_allclose(y, x @ A.mT @ B.mT + bias[:, None], atol=1e-5)
    assert [pair.name for pair in find_pairs(variables["params"])] == ["dense"]


def test_checkpoints_and_shapes():
    module = LowRankDense(6, 2)
    variables, x = drawn(module, (2, 4))
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, variables)
    like = jax.tree.map(jnp.zeros_like, variables)
    read = serialization.from_bytes(like, serialization.to_bytes(variables))
    chex.assert_trees_all_equal(read, variables)
    chex.assert_trees_all_equal(pickle.loads(pickle.dumps(variables)), variables)


INVALID = {
    "too high": (
        nn.Sequential([LowRankDense(6, 5)]),
        "LowRankDense: the rank of 'layers_0', 4 inputs to 6 outputs, must be between 1 and 4, but "
        "is 5.",
    ),
    "a share": (
        nn.Sequential([LowRankDenseGeneral((3, 2), 1.5)]),
        "LowRankDenseGeneral: the rank of 'layers_0', as a share of the smaller side, must be "
        "above 0 and at most 1, but is 1.5; a whole number is a rank.",
    ),
    "an unknown initialiser": (
        LowRankDense(6, 2, initialiser="normal"),
        "initialise: unknown method 'normal'; expected one of xavier, kaiming, auto, dlr, orth, "
        "xavorth, lora, randn_X or const_X with a number X.",
    ),
}


@pytest.mark.parametrize("name", INVALID)
def test_errors(name):
    module, message = INVALID[name]
    with pytest.raises(ValueError, match=r"rank|initialise") as error:
        drawn(module, (2, 4))
    assert str(error.value) == message


def test_parameters_of_another_rank_are_refused():
    variables, x = drawn(LowRankDense(6, 2), (2, 4))
    with pytest.raises(nn.module.errors.ScopeParamShapeError, match="B"):
        LowRankDense(6, 3).apply(variables, x)
