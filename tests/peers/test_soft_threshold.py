"""Soft thresholds, SoRA and CoDyRA."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from loro_jax.layers.adapters import AdapterSpec, adapt, live_factors, merge_adapters
from loro_jax.peers import codyra, soft_threshold, sora
from loro_jax.peers.soft_threshold import growing_threshold, is_gate, shrunk


def adapter(seed=0, dtype=jnp.float64, gate=(1.0, -2.0, 0.5)):
    rng = np.random.default_rng(seed)
    return {
        "B": jnp.array(rng.normal(size=(5, 3)), dtype),
        "A": jnp.array(rng.normal(size=(3, 4)), dtype),
        "gate": jnp.array(gate, dtype),
    }


def loss(params):
    x = jnp.cos(jnp.arange(8.0)).reshape(2, 4)
    y = ((x @ params["up"]["A"].T) * params["up"]["gate"]) @ params["up"]["B"].T
    return jnp.mean((y - 1 - params["bias"]) ** 2)


def problem(**changes):
    return {"up": adapter(**changes), "bias": jnp.zeros(5)}


def run(tx, params, steps):
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    states = []
    for _ in range(steps):
        params, state = step(params, state)
        states.append(params)
    return states


def test_it_is_the_soft_threshold():
    x = np.array([-3.0, -1.0, -0.4, 0.0, 0.4, 0.5, 0.9, 1.0, 1.1, 3.0])
    k = 0.5
    expected = np.sign(x) * np.maximum(np.abs(x) - k, 0)
    np.testing.assert_allclose(shrunk(jnp.array(x), k, dead_zone=False), expected, atol=1e-7)
    # Below k after the subtraction, the authors' code has zeros.
    expected[np.abs(x) < 2 * k] = 0
    np.testing.assert_allclose(shrunk(jnp.array(x), k), expected, atol=1e-7)


def test_it_shrinks_what_the_step_led_to(x64):
    params = problem()
    tx = optax.chain(optax.sgd(0.1), optax.masked(soft_threshold(0.05), is_gate))
    (after,) = run(tx, params, 1)
    plain = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))
    np.testing.assert_allclose(after["up"]["gate"], shrunk(plain["up"]["gate"], 0.05))
    np.testing.assert_allclose(after["up"]["B"], plain["up"]["B"])
    np.testing.assert_allclose(after["bias"], plain["bias"])


def test_sora_is_adam_with_a_penalty_and_a_proximal_step(x64):
    params = problem(gate=(1.0, -0.2, 0.02))
    rate, penalty, k = 0.01, 0.3, 0.004
    states = run(sora(optax.adam(rate), penalty=penalty, threshold=k), params, 18)
    own = {name: np.array(leaf) for name, leaf in params["up"].items()} | {"bias": np.zeros(5)}
    moments = {name: [np.zeros_like(x), np.zeros_like(x)] for name, x in own.items()}
    for t, state in enumerate(states, 1):
        tree = {"up": {n: jnp.array(own[n]) for n in ("B", "A", "gate")}}
        grads = jax.grad(loss)(tree | {"bias": jnp.array(own["bias"])})
        grads = grads["up"] | {"bias": grads["bias"]}
        for name, (m, v) in moments.items():
            g = np.array(grads[name])
            if name == "gate":
                g = g + penalty / 3 * np.sign(own[name])
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            moments[name] = [m, v]
            step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
            own[name] = own[name] - rate * step
        rest = np.maximum(np.abs(own["gate"]) - k, 0)
        own["gate"] = np.sign(own["gate"]) * np.where(rest < k, 0, rest)
        for name in ("B", "A", "gate"):
            np.testing.assert_allclose(state["up"][name], own[name], rtol=1e-9, atol=1e-12)
    assert any(np.any(np.asarray(state["up"]["gate"]) == 0) for state in states)


def test_dead_ranks_have_no_gradient_and_stay_dead(x64):
    params = problem(gate=(1.0, 0.0, 0.0))
    grads = jax.grad(loss)(params)["up"]
    assert float(jnp.abs(grads["B"][:, 1:]).max()) == 0
    assert float(jnp.abs(grads["A"][1:]).max()) == 0
    assert float(jnp.abs(grads["gate"][1:]).min()) > 0
    # Adam's steps of 0.001 are less than twice the threshold ...
    states = run(sora(optax.adam(1e-3), threshold=8e-4), params, 20)
    for state in states:
        assert np.all(np.asarray(state["up"]["gate"][1:]) == 0)
    for name, dead in (("B", np.s_[:, 1:]), ("A", np.s_[1:])):
        np.testing.assert_array_equal(states[-1]["up"][name][dead], params["up"][name][dead])
    # ... and steps of 0.01 are more.
    (after,) = run(sora(optax.adam(0.01), threshold=8e-4), params, 1)
    assert np.all(np.asarray(after["up"]["gate"]) != 0)


@pytest.mark.parametrize("kind", ["gated", "adalora"])
def test_the_output_is_that_of_the_live_ranks_alone(x64, kind):
    layer = nnx.Linear(6, 5, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    adapted = adapt(layer, AdapterSpec(kind=kind, rank=4, param_dtype=jnp.float64))
    own = adapted.adapter
    own.B[...] = jax.random.normal(jax.random.key(1), (5, 4), jnp.float64)
    getattr(own, own.gates)[...] = jnp.array([0.0, 1.5, 0.0, -0.3])
    x = jax.random.normal(jax.random.key(2), (7, 6), jnp.float64)
    B, A = live_factors(own)
    assert (B.shape, A.shape) == ((5, 2), (2, 6))
    y = adapted(x)
    np.testing.assert_allclose(layer(x) + x @ A.T @ B.T, y, atol=1e-12)
    np.testing.assert_allclose(merge_adapters(adapted)(x), y, atol=1e-12)
    # Dead ranks leave no trace, whatever they hold.
    own.B[...] = own.B[...].at[:, 0].set(1e6)
    np.testing.assert_array_equal(adapted(x), y)
    np.testing.assert_allclose(
        merge_adapters(adapted).kernel[...], layer.kernel[...] + (B @ A).T, atol=1e-12
    )


def test_stacks_have_no_single_live_factors():
    make = nnx.split_rngs(splits=2)(nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs)))
    adapted = adapt(nnx.List([make(nnx.Rngs(0))]), AdapterSpec(kind="gated", rank=2))
    with pytest.raises(ValueError, match=r"live_factors: expected the adapter of one layer"):
        live_factors(adapted[0].adapter)


def test_codyras_threshold_grows_in_the_second_half():
    # The authors' settings: 500 steps, 50 stages, up to 0.005.
    schedule = growing_threshold(500)
    values = np.linspace(0, 0.005, 50)
    found = np.array([float(schedule(t)) for t in range(500)])
    stage, expected = 0, []
    for t in range(500):
        if t >= 250 and t % 5 == 0:
            stage += 1
        expected.append(values[min(49, stage)] if t > 250 else 0.0)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert found[:251].max() == 0 < found[251]
    assert np.all(np.diff(found) >= 0)
    assert found[-1] == pytest.approx(0.005)


@pytest.mark.parametrize(("steps", "dense", "stages"), [(7, 0.4, 3), (12, 0.0, 50), (9, 1.0, 4)])
def test_codyras_threshold_of_short_runs(steps, dense, stages):
    schedule = growing_threshold(steps, 0.1, dense, stages)
    found = [float(schedule(t)) for t in range(steps)]
    assert np.all(np.diff(found) >= 0)
    assert 0 <= max(found) <= 0.1 + 1e-7
    assert all(value == 0 for t, value in enumerate(found) if t <= dense * steps)


def test_codyra_is_plain_until_then(x64):
    params = problem(gate=(1.0, -0.2, 0.02))
    plain = run(optax.adam(0.01), params, 12)
    found = run(codyra(optax.adam(0.01), 12, threshold=0.2, stages=3), params, 12)
    for one, other in zip(found[:7], plain[:7], strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    assert int((found[-1]["up"]["gate"] == 0).sum()) >= 1
    np.testing.assert_allclose(
        found[7]["up"]["gate"], shrunk(plain[7]["up"]["gate"], 0.1), atol=1e-12
    )
