"""The recorded trajectory of the authors' PyTorch optimizer, step by step.

Sixty float32 steps on a two-layer regression with exact steps at 19, 39 and 59. The recording is
part of the tests (``loro_trajectory.npz``; its problem and rules are in ``trajectory.md``).
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loro_jax import LowRank, adam, loro
from tests.helpers import some_fast

RECORD = np.load(pathlib.Path(__file__).parent / "loro_trajectory.npz")
META = json.loads(str(RECORD["meta"]))


def replay(**changes):
    params = {
        "first": {"B": jnp.array(RECORD["B1"]), "A": jnp.array(RECORD["A1"])},
        "second": LowRank(jnp.array(RECORD["B2"]), jnp.array(RECORD["A2"])),
        "bias": jnp.zeros(24),
    }
    rates = jnp.array(RECORD["lrs"], jnp.float32)
    X, Y = jnp.array(RECORD["X"]), jnp.array(RECORD["Y"])
    settings = {
        "exact_every": META["K"],
        "lr_scale": META["r"] / META["hidden"],
        "weight_decay": META["wd"],
        "moments": {"all": "reset"}[META["refresh"]],
    }
    constants = {name: META[name] for name in ("b1", "b2", "eps")}
    of_adam = {name: changes.pop(name) for name in constants if name in changes}
    direction = adam(**{**constants, **of_adam})
    tx = loro(lambda step: rates[step], direction=direction, **{**settings, **changes})

    def loss_fn(params):
        W1 = params["first"]["B"] @ params["first"]["A"]
        prediction = jnp.tanh(X @ W1.T) @ params["second"].product().T + params["bias"]
        return jnp.mean((prediction - Y) ** 2)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params)
        return loss, optax.apply_updates(params, updates), state

    state = tx.init(params)
    losses, kept = [], {}
    for t in range(META["steps"]):
        loss, params, state = step(params, state)
        losses.append(float(loss))
        if t in RECORD["keep"]:
            kept[t] = params
    assert step._cache_size() == 1
    return np.array(losses), kept


def relative_error(found, recorded):
    return np.linalg.norm(found - recorded) / np.linalg.norm(recorded)


def weight_errors(kept):
    errors = {}
    for i, t in enumerate(RECORD["keep"]):
        pair = LowRank(**kept[t]["first"])
        errors[f"W1 after {t}"] = relative_error(pair.product(), RECORD["W1"][i])
        errors[f"W2 after {t}"] = relative_error(kept[t]["second"].product(), RECORD["W2"][i])
        errors[f"bias after {t}"] = relative_error(kept[t]["bias"], RECORD["bias"][i])
    return errors


@pytest.mark.parametrize("method", some_fast(["graph", "gram", "svd"], ["graph", "svd"]))
def test_every_loss_and_every_weight_of_the_recording(method):
    losses, kept = replay(exact_method=method)
    np.testing.assert_allclose(losses, RECORD["losses"], atol=1e-5, rtol=0)
    errors = weight_errors(kept)
    worst_loss = np.max(np.abs(losses - RECORD["losses"]))
    print(f"losses within {worst_loss:.1e}, weights within {max(errors.values()):.1e} (relative)")
    assert max(errors.values()) < 1e-4, errors
    final = kept[META["steps"] - 1]
    factors = {**final["first"], "B2": final["second"].B, "A2": final["second"].A}
    for name, key in (("B", "B1"), ("A", "A1"), ("B2", "B2"), ("A2", "A2")):
        values = np.linalg.svd(factors[name], compute_uv=False)
        np.testing.assert_allclose(values, RECORD[f"final_sv_{key}"], rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"exact_every": None},
        {"exact_every": META["K"] + 1},
        {"moments": "keep"},
        {"moments": "reset_factors"},
        {"lr_scale": 1.0},
        {"eps": 1e-3},
        {"b2": 0.99},
    ],
    ids=str,
)
@pytest.mark.slow
def test_the_recording_tells_each_rule_from_its_neighbours(changes):
    """Were a rule ignored, the comparison above would not notice; so it must matter here."""
    losses, kept = replay(**changes)
    assert max(weight_errors(kept).values()) > 1e-3
    assert np.max(np.abs(losses - RECORD["losses"])) > 1e-5
