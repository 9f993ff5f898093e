"""Tiny runs of the real command, in this process or in others."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import train
from tests.helpers import call

ROOT = pathlib.Path(__file__).parents[2]

TEXT = "\n\n".join(
    f"Paragraph {i}: {'the quick brown fox ' * (i % 5 + 1)}jumps over {i * 37 % 101} lazy dogs."
    for i in range(400)
)

# Exact steps at 10, 20, ..., 120; checkpoints at 11 (just behind one), 22, ..., 99 (just before
# one), 110 (at one); evaluations at a beat of their own.
TINY = {
    "steps": 120,
    "batch_size": 8,
    "sequence_length": 64,
    "learning_rate": 0.01,
    "warmup_steps": 4,
    "exact_every": 10,
    "exact_method": "svd",  # the quickest to compile
    "log_every": 1,
    "eval_every": 25,
    "checkpoint_every": 11,
    "tensorboard": False,
    "data.max_eval_sequences": 8,
}

# All projections of one shape, in one layer: most of the test is compilation.
SMALL = {"model.num_layers": 1, "model.intermediate_size": 64}


def corpus(folder):
    path = folder / "corpus.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def flags(workdir, source, **changes):
    fields = {**TINY, "data.source": source, **changes}
    return [f"--workdir={workdir}", *(f"--config.{name}={value}" for name, value in fields.items())]


def with_config(arguments):
    """The arguments, with the tiny model and the paper's settings unless they name a config."""
    if any(argument.startswith("--config=") for argument in arguments):
        return arguments
    return (f"--config={ROOT}/configs/tiny.py:paper", *arguments)


def run(*arguments):
    """Runs train.py in this process: its exit status and output."""
    return call(train.main, with_config(arguments))


def start(*arguments, shared_cache=True, **environment):
    """Starts train.py in a process of its own.

    A run that others are compared with compiles everything anew (``shared_cache=False``), so that
    the comparison covers a fresh compilation too.
    """
    inherited = dict(os.environ)
    if not shared_cache:
        inherited.pop("JAX_COMPILATION_CACHE_DIR", None)
    return subprocess.Popen(
        [sys.executable, "train.py", *with_config(arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**inherited, **environment},
    )


def finish(process, timeout=600):
    """Exit status and output of a process."""
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def start_all(count, workdir, sources, environment, **changes):
    """Processes of one run; each reads a source of its own."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return [
        start(
            *flags(workdir, source, steps=24, **SMALL, **changes),
            f"--coordinator=localhost:{port}",
            f"--processes={count}",
            f"--process={process}",
            **environment,
        )
        for process, source in zip(range(count), sources, strict=True)
    ]


def finish_all(processes):
    return [finish(process, timeout=300) for process in processes]


def rows(workdir):
    """Rows of a run's metrics without their times."""
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line) for line in lines]
    times = ("tokens_per_second", "data_wait")
    return [{k: v for k, v in row.items() if k not in times} for row in parsed]
