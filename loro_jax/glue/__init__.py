"""GLUE: tasks, their tables, RoBERTa's encoding of them, batches, and metrics.

tasks.py lists the tasks; reading.py reads their files; encoding.py turns texts into ids; batches.py
defines the order of training; metrics.py evaluates. Nothing here knows a network: training is in
loro_jax/training/glue.
"""

from loro_jax.glue.batches import GlueData, TrainBatches, load_data, validation_batches
from loro_jax.glue.config import GlueConfig
from loro_jax.glue.encoding import PairTokenizer
from loro_jax.glue.metrics import METRICS, evaluate
from loro_jax.glue.reading import read_rows
from loro_jax.glue.tasks import TASKS, Task

__all__ = [
    "METRICS",
    "TASKS",
    "GlueConfig",
    "GlueData",
    "PairTokenizer",
    "Task",
    "TrainBatches",
    "evaluate",
    "load_data",
    "read_rows",
    "validation_batches",
]
