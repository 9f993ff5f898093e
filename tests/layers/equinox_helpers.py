"""Networks in Equinox that tests factorise, and what they compare of trees."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loro_jax import find_pairs

eqx = pytest.importorskip("equinox", reason="layers for Equinox need equinox")

KEY = jax.random.key(0)


def linear(m=24, n=16, layer_class=eqx.nn.Linear, **kwargs):
    return layer_class(n, m, key=KEY, **kwargs)


class OwnCall(eqx.nn.Linear):
    def __call__(self, x, *, key=None):
        return 2 * super().__call__(x)


class OwnField(eqx.nn.Linear):
    scale: jax.Array

    def __init__(self, in_features, out_features, *, key):
        super().__init__(in_features, out_features, key=key)
        self.scale = jnp.ones(3)


class OwnInit(eqx.nn.Linear):
    def __init__(self, in_features, out_features, *, key):
        super().__init__(in_features, out_features, use_bias=False, key=key)
        self.weight = 0.02 * self.weight


class Block(eqx.Module):
    attn: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    norm: eqx.nn.LayerNorm

    def __init__(self, key):
        keys = jax.random.split(key)
        self.attn = eqx.nn.MultiheadAttention(2, 16, use_query_bias=True, key=keys[0])
        self.mlp = eqx.nn.MLP(16, 16, 24, depth=1, key=keys[1])
        self.norm = eqx.nn.LayerNorm(16)

    def __call__(self, x):
        y = jax.vmap(self.norm)(x)
        x = x + self.attn(y, y, y)
        return x + jax.vmap(self.mlp)(x)


def network():
    """Layers in modules, tuples and dicts."""
    keys = jax.random.split(KEY, 3)
    head = linear(4)
    return {"blocks": [Block(keys[0]), Block(keys[1])], "head": (head, jax.nn.relu)}


def apply(net, x):
    for block in net["blocks"]:
        x = block(x)
    return net["head"][1](jax.vmap(net["head"][0])(x))


PROJECTIONS = ["attn/query_proj", "attn/key_proj", "attn/value_proj", "attn/output_proj"]
IN_BLOCK = [*PROJECTIONS, "mlp/layers/0", "mlp/layers/1"]
ALL = [f"blocks/{i}/{path}" for i in range(2) for path in IN_BLOCK] + ["head/0"]


def paths_of(tree):
    """Paths of the pairs that LORO finds, as layers have them."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = find_pairs(eqx.filter(tree, eqx.is_inexact_array))
    return [pair.name.replace(".", "/") for pair in pairs]


def leaves_of(tree):
    return sum(x.size for x in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array)))


def assert_same(found, wanted):
    """One structure, and equal leaves of equal dtypes."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if eqx.is_array(x):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(np.asarray(x, np.float64), np.asarray(y, np.float64))
        else:
            assert x is y or x == y
