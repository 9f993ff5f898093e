"""Distils on eight simulated devices, and prints the terms of each step, one JSON object a mesh.

A program of its own, because the number of devices is fixed when JAX starts. Usage:
``python -m tests.training.eight_devices_teacher``.
"""

import dataclasses
import json

import jax
import numpy as np
from flax import nnx

from loro_jax.training.config import DistillationConfig
from loro_jax.training.distillation import teacher_config
from loro_jax.training.mesh import make_mesh, put_batch, tree_shardings
from loro_jax.training.step import compile_program, make_program
from models.llama import Llama
from tests.training.eight_devices import batches, config_of

MESHES = ((1, 1, 1), (2, 2, 2))
STEPS = 8


def train(sizes, start=None):
    """What a run says of itself, and the state that it starts from."""
    distillation = DistillationConfig("unread", features=1.0, penalty=0.5)
    config = dataclasses.replace(config_of("loro", sizes), distillation=distillation)
    config.validate()
    mesh = make_mesh(config.mesh, int(np.prod(sizes)))
    program, abstract = compile_program(make_program(config, mesh), mesh)
    every = range(config.batch_size)
    placed = [put_batch(mesh, batch, every, config.batch_size) for batch in batches(config)]
    start = jax.device_get(program.init()) if start is None else start
    state = jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), start, abstract)
    model = nnx.to_pure_dict(nnx.state(Llama(teacher_config(config), nnx.Rngs(1))))
    teacher = jax.tree.map(jax.device_put, model, tree_shardings(mesh, model))
    rows = []
    for batch in placed[:STEPS]:
        state, metrics = program.train_step(state, batch, teacher)
        rows.append({name: float(value) for name, value in metrics.items()})
    held = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(teacher)]
    terms = {name: [row[name] for row in rows] for name in ("loss", "feature_error", "pair_error")}
    return {"mesh": "x".join(map(str, sizes)), "teacher_bytes": sum(held), **terms}, start


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    state = None
    for sizes in MESHES:
        row, state = train(sizes, state)
        print(json.dumps(row), flush=True)
