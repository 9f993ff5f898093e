"""Tiny runs of train.py on GLUE: a small random RoBERTa, small tables."""

import json

from flax import nnx

from loro_jax.glue import TASKS
from models.roberta import Roberta, RobertaConfig, write_roberta
from tests.glue.samples import write_tokenizer, write_tsv
from tests.training import runs

SMALL = RobertaConfig(
    vocab_size=330,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    intermediate_size=48,
    max_position_embeddings=64,
    initializer_range=0.1,
)
TINY = {
    "steps": 60,
    "epochs": 0,
    "batch_size": 16,
    "sequence_length": 48,
    "learning_rate": 0.01,
    "log_every": 1,
    "eval_every": 30,
    "checkpoint_every": 30,
    "tensorboard": False,
}
CONFIG = f"--config={runs.ROOT}/configs/roberta_glue.py"


def write_model(folder):
    """A RoBERTa without a head, and its tokenizer."""
    write_tokenizer(folder / "tokenizer")
    files = {"tokenizer.json": (folder / "tokenizer" / "tokenizer.json").read_bytes()}
    write_roberta(Roberta(SMALL, nnx.Rngs(0)), folder / "model", files=files)
    return folder / "model"


def write_glue(folder, count=64):
    """All tasks as GLUE's own files."""
    for task in TASKS.values():
        write_tsv(folder / task.title, task, count)
    return folder


def run(workdir, model, tables, settings="loro_4", **changes):
    """Runs train.py; its exit status and output."""
    fields = {**TINY, "init_from": model, "data.source": tables, **changes}
    given = [f"--config.{name}={value}" for name, value in fields.items() if value is not None]
    return runs.run(f"{CONFIG}:{settings}", f"--workdir={workdir}", *given)


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
