"""Adapters with a factor for each rank: their formulas, their starts, and their live ranks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loro_jax.layers.adapters import ADAPTERS, AdapterSpec

KINDS = {"gated": "gate", "adalora": "E", "increlora": "E"}


def made(kind, **changes):
    fields = {"kind": kind, "rank": 4, "alpha": 6.0, "param_dtype": jnp.float64, **changes}
    return ADAPTERS[kind](30, 20, AdapterSpec(**fields), nnx.Rngs(0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stabilised", [False, True])
def test_the_change_is_its_formula(x64, kind, stabilised):
    adapter = made(kind, rank_stabilised=stabilised)
    g = jnp.array([0.0, 1.5, -0.25, 2.0])
    getattr(adapter, KINDS[kind])[...] = g
    adapter.B[...] = jax.random.normal(jax.random.key(1), (20, 4), jnp.float64)
    scale = 3.0 if stabilised else 6 / 4 if kind == "gated" else 6 / (4 + 1e-5)
    B, A = np.asarray(adapter.B[...]), np.asarray(adapter.A[...])
    expected = scale * B @ np.diag(g) @ A
    np.testing.assert_allclose(adapter.weight(None), expected, atol=1e-13)
    left, right = adapter.factors()
    np.testing.assert_allclose(left @ right, expected, atol=1e-13)
    x = jax.random.normal(jax.random.key(2), (2, 7, 30), jnp.float64)
    np.testing.assert_allclose(adapter(x, None), x @ expected.T, atol=1e-12)
    assert not ADAPTERS[kind].has_pair  # an exact step would mix the gates


def test_gates_start_at_random_beside_factors_of_lora():
    spec = AdapterSpec(kind="gated", rank=64)
    adapter = ADAPTERS["gated"](100, 80, spec, nnx.Rngs(0))
    assert not np.any(adapter.B[...])
    assert 0.9 < np.abs(adapter.A[...]).max() * 10 <= 1
    assert np.std(adapter.gate[...]) == pytest.approx(1, abs=0.25)
    assert np.unique(adapter.gate[...]).size == 64


@pytest.mark.parametrize("kind", ["adalora", "increlora"])
@pytest.mark.parametrize("initialiser", [None, "lora"])
def test_singular_values_start_at_zero_between_random_factors(kind, initialiser):
    """A factor of zero beside E = 0 could not be trained."""
    spec = AdapterSpec(kind=kind, rank=64, initialiser=initialiser)
    adapter = ADAPTERS[kind](100, 80, spec, nnx.Rngs(0))
    assert not np.any(adapter.E[...])
    for factor in (adapter.B[...], adapter.A[...]):
        assert np.std(factor) == pytest.approx(0.02, rel=0.05)
