"""Trains adapters on eight simulated devices, and prints losses, one JSON object a mesh.

A program of its own, because the number of devices is fixed when JAX starts. Usage:
``python -m tests.training.eight_devices_adapters``.
"""

import dataclasses
import json

import jax
import numpy as np

from loro_jax.training.config import AdapterConfig
from loro_jax.training.gradient_start import batches_to_start_from, start_from_text
from loro_jax.training.mesh import make_mesh, put_batch
from loro_jax.training.step import compile_program, make_program
from tests.training.eight_devices import batches, config_of

# Fixed factors with a start from the gradient; random bases that are made in each step.
KINDS = ("lora_sb", "randlora")
MESHES = ((1, 1, 1), (2, 2, 2))
STEPS = 12


def train(kind, sizes, start=None):
    """What a run says of itself, and the state that it starts from."""
    config = config_of("lowrank", sizes)
    adapter = AdapterConfig(kind=kind, rank=4, start_sequences=20)
    config = dataclasses.replace(config, adapter=adapter, learning_rate=0.01)
    mesh = make_mesh(config.mesh, int(np.prod(sizes)))
    program, abstract = compile_program(make_program(config, mesh), mesh)
    every = range(config.batch_size)
    placed = [put_batch(mesh, batch, every, config.batch_size) for batch in batches(config)]
    start = jax.device_get(program.init()) if start is None else start
    state = jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), start, abstract)
    count = batches_to_start_from(config)
    if count:
        state = start_from_text(config, state, placed[:count], mesh)
    losses = []
    for batch in placed[:STEPS]:
        state, metrics = program.train_step(state, batch)
        losses.append(float(metrics["loss"]))
    return {"kind": kind, "mesh": "x".join(map(str, sizes)), "losses": losses}, start


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    for kind in KINDS:
        state = None
        for sizes in MESHES:
            row, state = train(kind, sizes, state)
            print(json.dumps(row), flush=True)
