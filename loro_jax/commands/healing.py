"""Perplexity over parameters of compressed models, before and after training.

DENSE is the model that python -m loro_jax compress has read; each RUN is a run of train.py that
started (--config.init_from) from one of the directories that it has written. Printed are, for the
dense model, each compressed one and each run: parameters, perplexity on --text (in disjoint
windows), tokens and minutes of training, memory of weights, gradients and optimizer state, FLOPs
per token, and the speed of greedy decoding over the dense model's, measured in turns. --out also
writes healing.json and healing.png.

Example:
  python -m loro_jax healing llama-dir runs/lord70-loro runs/lord50-loro --text=held-out.txt
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from loro_jax.command_line import Parser, failing_in_one_line
from loro_jax.commands.inspect_texts import on_text
from loro_jax.commands.source_options import naming_options
from loro_jax.errors import TrainingError
from loro_jax.planning.timing import rounds_in_turns
from loro_jax.study.healing import healing_rows, plot_healing, runs_by_start
from loro_jax.tables import environment, print_table
from loro_jax.training.trained import is_hugging_face, load_model
from models.decoding import generate
from models.huggingface.files import new_directory
from models.llama import Llama

# Tokens of the prompt. Reading them is timed, too.
_PROMPT = 16


def main(arguments: Sequence[str]) -> int:
    """Runs ``python -m loro_jax healing``; returns the exit status."""
    options = _parser().parse_args(arguments)
    options.command = " ".join(["python -m loro_jax healing", *arguments])
    return failing_in_one_line(lambda: _healing(options), naming_options)


def _healing(options: argparse.Namespace) -> None:
    _check(options)
    starts = runs_by_start(options.runs)
    dense, tokenizer = load_model(options.dense)
    perplexity = on_text(options.text, pathlib.Path(options.dense), tokenizer, options)
    rows = healing_rows(dense, starts, perplexity, lambda models: _speed_ups(models, options))
    print_table([_shown(row) for row in rows])
    if options.out:
        with new_directory(options.out) as directory:
            whole = {"command": options.command, "environment": environment(), "rows": rows}
            text = json.dumps(whole, indent=1, allow_nan=False) + "\n"
            (directory / "healing.json").write_text(text, encoding="utf-8")
            plot_healing(rows, directory / "healing.png")
        print(f"table and figure in {options.out}")


def _check(options: argparse.Namespace) -> None:
    """Raises TrainingError for what can be known before a model is read."""
    for name, least in (("window", 2), ("max_tokens", 0), ("decode", 1), ("rounds", 1)):
        if getattr(options, name) < least:
            raise TrainingError(f"--{name}={getattr(options, name)}: expected at least {least}.")
    if not is_hugging_face(options.dense):
        raise TrainingError(f"{options.dense} is no directory in Hugging Face's format.")
    out = pathlib.Path(options.out) if options.out else None
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TrainingError(f"--out={out} exists already; expected a path that does not exist.")


def _speed_ups(models: dict[str, Llama], options: argparse.Namespace) -> dict[str, float]:
    """Returns each model's greedy tokens per second over the first one's, medians of ratios."""
    vocab_size = min(model.config.vocab_size for model in models.values())
    prompt = np.random.default_rng(0).integers(vocab_size, size=_PROMPT).tolist()

    def decode(model: Llama) -> Callable[[], Any]:
        return lambda: list(generate(model, [prompt], options.decode))

    candidates = {name: decode(model) for name, model in models.items()}
    seconds = rounds_in_turns(candidates, options.rounds)
    first = next(iter(seconds.values()))
    return {
        name: statistics.median(a / b for a, b in zip(first, own, strict=True))
        for name, own in seconds.items()
    }


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """Rounds a row for the terminal; what does not apply is empty."""
    cells = {name: "" if value is None else value for name, value in row.items()}
    return {
        name: f"{value:.4g}" if isinstance(value, float) else value for name, value in cells.items()
    }


def _parser() -> Parser:
    parser = Parser("python -m loro_jax healing", __doc__)
    parser.add_argument("dense", metavar="DENSE")
    parser.add_argument("runs", metavar="RUN", nargs="+")
    parser.add_argument("--text", metavar="SOURCE", required=True, help="any source of a run")
    parser.add_argument("--window", type=int, default=256, help="tokens of a window of the text")
    parser.add_argument("--max_tokens", type=int, default=0, metavar="N", help="0: all")
    parser.add_argument("--decode", type=int, default=32, metavar="N", help="tokens to be timed")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="timings of each")
    parser.add_argument("--out", metavar="OUT", help="directory to write: JSON and a figure")
    return parser
