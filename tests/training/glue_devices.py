"""Trains a RoBERTa on four simulated devices, and prints losses, one JSON object a mesh.

A program of its own, because the number of devices is fixed when JAX starts. Usage:
``python -m tests.training.glue_devices``.
"""

import json
import pathlib
import tempfile

import jax

from loro_jax.glue import TASKS, GlueConfig, PairTokenizer, TrainBatches, load_data
from loro_jax.training.config import MeshConfig
from loro_jax.training.glue_config import Encoder, GlueAdapterConfig, GlueRun
from loro_jax.training.mesh import make_mesh, put_batch, rows_here
from loro_jax.training.step import compile_program, make_program
from tests.glue.samples import write_jsonl, write_tokenizer

MESHES = ((1, 1, 1), (1, 4, 1), (2, 1, 2))
STEPS = 8


def losses(config, data):
    """Losses of a run, and the last parameters' logits."""
    devices = make_mesh(config.mesh, 4 if config.mesh != MeshConfig(1, 1, 1) else 1)
    program, _ = compile_program(make_program(config, devices), devices)
    state, found = program.init(), []
    rows = rows_here(devices, config.batch_size)
    iterator = TrainBatches(data, config.batch_size, 0, rows)
    for _ in range(STEPS):
        batch = put_batch(devices, next(iterator), rows, config.batch_size)
        state, metrics = program.train_step(state, batch)
        found.append(float(metrics["loss"]))
    _, logits = program.eval_step(state.params, state.fixed, batch)
    return found, jax.device_get(logits).ravel().tolist()


def main():
    jax.config.update("jax_num_cpu_devices", 4)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        tokenizer = PairTokenizer(str(write_tokenizer(folder / "tokenizer")))
        task = TASKS["rte"]
        write_jsonl(folder / "RTE", task)
        data = load_data(GlueConfig(source=name), task, tokenizer, 48)
        for mesh in MESHES:
            config = GlueRun(
                method="loro",
                task="rte",
                steps=STEPS,
                warmup_steps=0,
                batch_size=16,
                sequence_length=48,
                gradient_accumulation=2,
                exact_every=5,
                exact_method="svd",
                adapter=GlueAdapterConfig(
                    kind="lora", rank=4, targets="all", initialiser="xavier", trained="head,norms"
                ),
                model=Encoder(
                    vocab_size=tokenizer.vocab_size,
                    hidden_size=32,
                    num_layers=2,
                    num_heads=4,
                    intermediate_size=64,
                    max_position_embeddings=64,
                ),
                mesh=MeshConfig(*mesh),
            )
            config.validate()
            found, logits = losses(config, data)
            print(json.dumps({"mesh": mesh, "losses": found, "logits": logits}), flush=True)


if __name__ == "__main__":
    main()
