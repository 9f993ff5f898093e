"""LORO's trainer trains what the network's options make."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from loro_jax.layers.common import Fixed
from loro_jax.training.config import Config
from loro_jax.training.step import make_program
from models import Batch, Llama, next_token_loss, preset
from tests.helpers import some_fast

NETWORKS = {
    "scaffold and outputs": {"projection": "scaffold", "cross_layer": 0.5},
    "scaffold and activation": {"projection": "scaffold_cola"},
    "some columns and activation": {"projection": "lost", "lost_channels": 0.1},
}


def config(network):
    model = dataclasses.replace(preset("tiny"), **({"initialiser": "auto"} | NETWORKS[network]))
    run = Config(
        method="loro",
        direction="orthogonal",
        exact_every=0,
        batch_size=4,
        sequence_length=16,
        steps=40,
        warmup_steps=2,
        model=model,
    )
    run.validate()
    return run


def batch():
    tokens = (np.arange(17)[None] * 3 + np.arange(4)[:, None]) % 64
    ids = tokens.astype(np.int32)
    return Batch(ids[:, :-1], ids[:, 1:], np.ones((4, 16), np.float32))


@pytest.mark.parametrize("network", some_fast(NETWORKS, ["scaffold and outputs"]))
def test_the_loss_falls_and_nothing_fixed_moves(network):
    program = make_program(config(network))
    step = jax.jit(program.train_step)
    state = program.init()
    fixed, losses = jax.tree.map(np.asarray, state.fixed), []
    for _ in range(12):
        state, metrics = step(state, batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.3
    for one, other in zip(jax.tree.leaves(fixed), jax.tree.leaves(state.fixed), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_seeds_trained_together_are_each_alone():
    """Also with a traced seed: initialisation, loss and gradient under vmap."""
    run = config("scaffold and outputs")
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Llama(run.model, nnx.Rngs(0))))

    def begun(seed):
        model = Llama(run.model, nnx.Rngs(jax.random.key(seed)))
        return nnx.state(model, nnx.Param), nnx.state(model, Fixed)

    def gradient(trained, fixed):
        return jax.value_and_grad(
            lambda trained: next_token_loss(nnx.merge(graphdef, trained, fixed), batch())
        )(trained)

    together = jax.jit(lambda seeds: jax.vmap(lambda s: gradient(*begun(s)))(seeds))
    found = together(jax.numpy.arange(2))
    alone = jax.jit(lambda seed: gradient(*begun(seed)))
    for seed in range(2):
        expected = jax.tree.leaves(alone(seed))
        for one, other in zip(jax.tree.leaves(found), expected, strict=True):
            size = np.max(np.abs(other))
            np.testing.assert_allclose(one[seed], other, rtol=1e-3, atol=1e-4 * size)
