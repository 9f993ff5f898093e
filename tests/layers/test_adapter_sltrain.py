"""SLTrain as an adapter is its formula, and trains entries of a fixed support."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from loro_jax.layers.adapters import AdapterSpec, adapt
from loro_jax.layers.common import Fixed, ProjectionSpec
from loro_jax.layers.dense import Dense

SPEC = AdapterSpec(kind="sltrain", rank=2, alpha=6.0, density=0.3)


def test_it_is_its_formula():
    base = Dense(10, 6, ProjectionSpec(use_bias=True), nnx.Rngs(0))
    model = adapt(nnx.Sequential(base), SPEC)
    adapter = model.layers[0].adapter
    for name in ("B", "A", "values"):
        leaf = getattr(adapter, name)
        leaf[...] = jax.random.normal(jax.random.key(len(name)), leaf.shape)
    S = np.zeros((6, 10), np.float32)
    np.put_along_axis(S, np.asarray(adapter.columns[...]), np.asarray(adapter.values[...]), 1)
    assert np.count_nonzero(S) == 6 * 3
    W = base.W[...] + 3 * adapter.B[...] @ adapter.A[...] + S
    x = jax.random.normal(jax.random.key(5), (4, 10))
    np.testing.assert_allclose(model(x), x @ W.T + base.bias[...], atol=1e-5)
    np.testing.assert_allclose(model.layers[0].weight(), W, atol=1e-5)


def test_entries_of_the_support_have_gradients_and_the_support_stays():
    model = adapt(nnx.Sequential(Dense(10, 6, ProjectionSpec(), nnx.Rngs(0))), SPEC)
    trained = nnx.to_pure_dict(nnx.state(model, nnx.Param))["layers"][0]["adapter"]
    assert set(trained) == {"B", "A", "values"}
    fixed = nnx.to_pure_dict(nnx.state(model, Fixed))["layers"][0]
    assert set(fixed["adapter"]) == {"columns"}
    x = jax.random.normal(jax.random.key(5), (4, 10))
    target = jax.random.normal(jax.random.key(6), (4, 6))
    grads = nnx.grad(lambda m: jnp.sum((m(x) - target) ** 2))(model)
    found = grads["layers"][0]["adapter"]["values"][...]
    full = 2 * (model(x) - target).T @ x
    columns = model.layers[0].adapter.columns[...]
    np.testing.assert_allclose(found, jnp.take_along_axis(full, columns, axis=1), rtol=1e-4)
