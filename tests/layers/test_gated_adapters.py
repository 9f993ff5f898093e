"""Adapters with a factor for each rank: their formulas, their starts, and their live ranks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from loro_jax import peers
from loro_jax.layers.adapters import ADAPTERS, AdapterSpec, adapt, live_factors

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


@pytest.mark.parametrize("method", ["adalora", "increlora", "sora", "codyra"])
def test_ranks_of_any_network_are_chosen(method):
    options = {
        "adalora": {"total_steps": 8, "target": 0.5, "initial": 0.0, "prune_every": 1},
        "increlora": {"total_steps": 8, "target": 0.5, "grow_from": 0, "grow_every": 1},
        "sora": {"threshold": 0.1, "penalty": 0.0},
        "codyra": {"total_steps": 8, "threshold": 0.1, "stages": 2},
    }
    kind = method if method in KINDS else "gated"
    rngs = nnx.Rngs(0)
    network = nnx.Sequential(nnx.Linear(6, 5, rngs=rngs), jnp.tanh, nnx.Linear(5, 4, rngs=rngs))
    adapted = adapt(network, AdapterSpec(kind=kind, rank=4))
    tx = getattr(peers, method)(optax.adam(0.03), **options[method])
    optimizer = nnx.Optimizer(adapted, tx, wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (16, 6))
    y = jnp.sin(x[:, :4])

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(adapted, optimizer)) for _ in range(8)]
    assert losses[-1] < losses[0]
    adapters = [adapted.layers[i].adapter for i in (0, 2)]
    live = sum(live_factors(adapter)[0].shape[1] for adapter in adapters)
    if method in ("adalora", "increlora"):
        assert live == 4
    else:
        assert live < 8
