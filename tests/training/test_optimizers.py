"""What the options of orthogonalised momentum do with a whole model's parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loro_jax.training.config import Config
from loro_jax.training.methods import METHODS, make_optimizer
from tests.helpers import some_fast

BASE = Config(direction="orthogonal", steps=100, warmup_steps=0, initial_lr_ratio=1.0)


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def parameters(method):
    up = {"W": draw(0, 2, 8, 6)}
    if method == "loro":
        up = {"B": draw(0, 2, 8, 3), "A": draw(1, 2, 3, 6)}
    return {
        "blocks": {"up": up, "norm": {"scale": jnp.ones((2, 6))}},
        "embedding": draw(2, 10, 6),
        "head": {"W": draw(3, 10, 6)},
        "norm": {"scale": jnp.ones(6)},
    }


def step(method, learning_rate=0.01, lr_scale=2.0, seed=0, **options):
    config = dataclasses.replace(
        BASE,
        method=method,
        exact_every=4 if method == "loro" else 0,
        restart_warmup_steps=0,
        learning_rate=learning_rate,
        lr_scale=lr_scale,
        seed=seed,
        method_options=options,
    )
    params = parameters(method)
    tx = make_optimizer(config)
    grads = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size)).reshape(p.shape), params)
    return tx.update(grads, tx.init(params), params)[0]


@pytest.mark.parametrize("method", ["loro", "full"])
def test_embedding_and_head_move_by_rows_and_all_else_as_before(method):
    plain, by_rows = step(method), step(method, regular="rows")
    for found in (by_rows["embedding"], by_rows["head"]["W"]):
        # The first step has the gradient's direction.
        np.testing.assert_allclose(np.sqrt(np.mean(np.square(found), axis=1)), 0.01, rtol=1e-3)
        assert np.ptp(np.abs(found)) > 1e-3
    for tree in (plain, by_rows):
        del tree["embedding"], tree["head"]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), plain, by_rows)


OPTIONS = {"equilibrate": True, "row_moment": 0.9, "regular": "rows"}


@pytest.mark.parametrize("method", some_fast(["loro", "full"], ["full"]))
def test_rates_and_seeds_may_be_members_of_an_ensemble(method):
    rates, scales = jnp.array([0.01, 0.03]), jnp.array([2.0, 1.0])

    def member(rate, scale, seed):
        return step(method, rate, scale, jax.random.key(seed), **OPTIONS)

    together = jax.jit(jax.vmap(member))(rates, scales, jnp.array([3, 4]))
    alone = step(method, 0.03, 1.0, 4, **OPTIONS)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x[1], y, atol=1e-5), together, alone)


@pytest.mark.parametrize(
    "method",
    [
        "loro",
        "lowrank",
        "lowrank_restarts",
        "svd_projection",
        "preconditioned",
        "preconditioned_exact",
        "spectron",
    ],
)
@pytest.mark.filterwarnings("error")
def test_factors_of_full_rank_are_pairs_too(method):
    """They move at the projections' rate, and nobody is warned of them."""
    config = dataclasses.replace(
        BASE, method=method, direction="adam", exact_every=4, lr_scale=1e-9, restart_warmup_steps=0
    )
    if not METHODS[method].periodic and method != "loro":
        config = dataclasses.replace(config, exact_every=0)
    params = parameters("full")
    params["blocks"]["up"] = {"B": draw(0, 2, 6, 6), "A": draw(1, 2, 6, 6)}
    grads = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size)).reshape(p.shape), params)
    tx = make_optimizer(config)
    moves, _ = tx.update(grads, tx.init(params), params)
    largest = jax.tree.map(lambda x: float(jnp.max(jnp.abs(x))), moves)
    assert max(largest["blocks"]["up"].values()) < 1e-6
    assert largest["embedding"] > 1e-5
