"""Trains on eight simulated devices, and prints losses and exchanges, one JSON object a mesh.

A program of its own, because the number of devices is fixed when JAX starts. Usage:
``python -m tests.training.eight_devices``.
"""

import collections
import json

import jax
import numpy as np

from loro_jax.memory import count_bytes
from loro_jax.planning.collectives import read_collectives
from loro_jax.training.config import Config, MeshConfig
from loro_jax.training.mesh import make_mesh, put_batch
from loro_jax.training.step import compile_program, make_program
from models.llama import preset
from models.loss import Batch
from tests.conftest import ROOT

CORPUS = ROOT / "loro_jax" / "text" / "corpus" / "valid.txt"
MESHES = ((1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2))
# The others have arrays of their own, whose sharding one mesh with all axes shows.
MESHES_OF = {"loro": MESHES, "full": MESHES} | dict.fromkeys(
    ("lost", "gradnormlorp", "lift", "osft", "sst", "trp"), MESHES[::4]
)
STEPS = 18


def config_of(method, mesh):
    """A small run with an exact step in eight, in two micro-batches a step."""
    return Config(
        method=method,
        steps=STEPS,
        batch_size=16,
        sequence_length=32,
        gradient_accumulation=2,
        learning_rate=0.01 if method == "loro" else 0.002,
        warmup_steps=5,
        exact_every=8,
        exact_method="svd",
        model=preset(
            "tiny",
            vocab_size=256,
            hidden_size=64,
            intermediate_size=64,
            num_heads=8,
            loss_chunk_size=16,
        ),
        mesh=MeshConfig(*mesh),
    )


def batches(config):
    """Text of the embedded corpus, byte by byte."""
    text = np.frombuffer(CORPUS.read_bytes(), np.uint8).astype(np.int32)
    size = config.batch_size * (config.sequence_length + 1)
    for step in range(STEPS):
        rows = text[np.arange(step * 97, step * 97 + size) % len(text)]
        rows = rows.reshape(config.batch_size, -1)
        # Rows of several lengths, so that a mean over devices is not the mean of their means.
        mask = (
            np.arange(config.sequence_length) < 8 + 2 * np.arange(config.batch_size)[:, None] % 24
        )
        yield Batch(rows[:, :-1], rows[:, 1:], mask.astype(np.float32))


def train(method, sizes, start=None):
    """What a run says of itself, and the state that it starts from."""
    config = config_of(method, sizes)
    mesh = make_mesh(config.mesh, int(np.prod(sizes)))
    program, abstract = compile_program(make_program(config, mesh), mesh)
    every = range(config.batch_size)
    placed = [put_batch(mesh, batch, every, config.batch_size) for batch in batches(config)]
    step = program.train_step.lower(abstract, placed[0]).compile()
    start = jax.device_get(program.init()) if start is None else start
    state = jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), start, abstract)
    losses = []
    for batch in placed:
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    exchanges = {
        name: read_collectives(step.as_text(), mesh.size, branch)
        for name, branch in (("approximate", min), ("exact", max))
    }
    by_kind = collections.Counter()
    for exchange in exchanges["approximate"]:
        by_kind[exchange.kind] += exchange.bytes * exchange.times
    row = {
        "method": method,
        "mesh": "x".join(map(str, sizes)),
        "losses": losses,
        "parameter_bytes": count_bytes(abstract.params),
        "by_kind": dict(by_kind),
        "sent": sum(exchange.sent for exchange in exchanges["approximate"]),
        "sent_exact": sum(exchange.sent for exchange in exchanges["exact"]),
    }
    return row, start


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    for method, meshes in MESHES_OF.items():
        state = None
        for sizes in meshes:
            row, state = train(method, sizes, state)
            print(json.dumps(row), flush=True)
