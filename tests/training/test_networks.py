"""LORO's trainer trains what the network's options make."""

import dataclasses

import jax
import numpy as np
import pytest

from loro_jax.training.config import Config
from loro_jax.training.step import make_program
from models import Batch, preset

NETWORKS = {
    "scaffold": {"projection": "scaffold", "scaffold_block": 8},
    "repeated identity": {"initialiser": "dlr"},
    "cosine": {"projection": "cola", "activation": "cos"},
    "outputs cross layers": {"cross_layer": 0.5},
    "latents cross layers": {"latent_crossing": True},
    "scaffold and outputs": {"projection": "scaffold", "cross_layer": 0.5},
    "activations cross layers": {"projection": "cola", "latent_crossing": True},
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


@pytest.mark.parametrize("network", NETWORKS)
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
