"""Spectra, condition numbers, norms and stable ranks of a model's matrices.

DIR is a run directory, all of whose checkpoints are read, or a directory in Hugging Face's format.
Printed are, for each projection, the measures of the product B A and of its factors (or of the
dense weight) at the last step: the median over the layers and the range. Products are never formed.
If the run has been trained with --config.inspect_every, its inspect.jsonl is part of what is shown
over training. --out also writes inspect.json, conditions.png, norms.png, stable_ranks.png and
spectra.png.

--between A B evaluates the straight line between two models of one architecture instead, at eleven
points, on --text or on the validation set of the run A: dense weights are interpolated, after
products are merged.

--over FIELD reads the table of a directory of python -m loro_jax compare instead: the perplexity of
each arm's best learning rate over a field of the config.

Example:
  python -m loro_jax inspect runs/default --out=inspected
  python -m loro_jax inspect --between runs/lowrank runs/full --out=line
  python -m loro_jax inspect runs/comparison --over=exact_every --out=over_k
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable, Sequence

import jax
from flax import nnx

from loro_jax.command_line import Parser, failing_in_one_line
from loro_jax.commands.inspect_texts import on_text, on_validation
from loro_jax.commands.source_options import naming_options
from loro_jax.errors import TrainingError
from loro_jax.inspection import history, matrices_of
from loro_jax.inspection.line import along_line
from loro_jax.study.over import over_field
from loro_jax.tables import environment, print_table
from loro_jax.training.metrics import read_rows
from loro_jax.training.step import joined
from loro_jax.training.trained import (
    checkpoint_steps,
    load_config,
    load_model,
    load_state,
    run_config,
)
from models.huggingface import read_model
from models.huggingface.files import new_directory


def main(arguments: Sequence[str]) -> int:
    """Runs ``python -m loro_jax inspect``; returns the exit status."""
    options = _parser().parse_args(arguments)
    options.command = " ".join(["python -m loro_jax inspect", *arguments])
    return failing_in_one_line(lambda: _inspect(options), naming_options)


def _inspect(options: argparse.Namespace) -> None:
    _check(options)
    if options.between:
        _between(options)
    elif options.over:
        _over(options)
    else:
        _spectra(options)


def _check(options: argparse.Namespace) -> None:
    """Raises TrainingError for what can be known before anything is computed."""
    out = pathlib.Path(options.out) if options.out else None
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TrainingError(f"--out={out} exists already; expected a path that does not exist.")
    if options.between and (options.over or options.directories):
        raise TrainingError("--between A B takes no other DIR, and no --over.")
    if options.over and len(options.directories) != 1:
        raise TrainingError("--over reads one DIR, of python -m loro_jax compare.")
    if not (options.directories or options.between):
        raise TrainingError("expected at least one DIR, or --between A B.")
    if options.text and not options.between:
        raise TrainingError("--text is for --between.")
    for name, least in (("window", 2), ("max_tokens", 0)):
        if getattr(options, name) < least:
            raise TrainingError(f"--{name}={getattr(options, name)}: expected at least {least}.")


def _spectra(options: argparse.Namespace) -> None:
    from loro_jax.inspection.plots import plot_histories

    # All are looked at before the first long computation.
    readers = [_reader(directory) for directory in options.directories]
    found = [read() for read in readers]
    for one in found:
        print(f"{one.name}, step {max(one.checkpoints)}")
        print_table(history.last_table(one))
        steps = history.steps_table(one)
        if len(steps) > 1:
            print("over training: medians over projections and layers")
            print_table(steps)
    if options.out:
        with new_directory(options.out) as directory:
            _write_json(directory, options, [history.as_json(one) for one in found])
            plot_histories(found, directory)
        print(f"tables and figures in {options.out}")


def _between(options: argparse.Namespace) -> None:
    ends = [pathlib.Path(one) for one in options.between]
    is_run = run_config(ends[0]) is not None
    if not is_run and not options.text:
        raise TrainingError(f"{ends[0]} is no run, so that there is no validation set; say --text.")
    models, tokenizers = zip(*map(load_model, ends), strict=True)
    if options.text:
        perplexity = on_text(options.text, ends[0], tokenizers[0], options)
    else:
        perplexity = on_validation(ends[0])
    rows = along_line(models[0], models[1], perplexity)
    print(f"dense weights between {ends[0]} (t = 0) and {ends[1]} (t = 1)")
    print_table([{"t": row["t"], "perplexity": _shown(row["perplexity"])} for row in rows])
    _write(options, rows, "line.png", "t", f"from {ends[0]} to {ends[1]}")


def _over(options: argparse.Namespace) -> None:
    (directory,) = map(pathlib.Path, options.directories)
    rows = over_field(directory, options.over)
    print_table([{**row, "perplexity": _shown(row["perplexity"])} for row in rows])
    _write(options, rows, "over.png", options.over, str(directory))


def _shown(perplexity: float | None) -> str:
    return "diverged" if perplexity is None else f"{perplexity:.2f}"


def _write(options: argparse.Namespace, rows: list, name: str, x: str, title: str) -> None:
    from loro_jax.inspection.plots import plot_line

    if options.out:
        with new_directory(options.out) as directory:
            _write_json(directory, options, rows)
            plot_line(rows, x, "perplexity", title, directory / name)
        print(f"table and figure in {options.out}")


def _write_json(directory: pathlib.Path, options: argparse.Namespace, content: list) -> None:
    whole = {"command": options.command, "environment": environment(), "found": content}
    text = json.dumps(whole, allow_nan=False) + "\n"
    (directory / "inspect.json").write_text(text, encoding="utf-8")


def _reader(directory: str) -> Callable[[], history.History]:
    """Returns a function that reads a directory; raises TrainingError if it is of no such kind."""
    path = pathlib.Path(directory)
    if not (path / "checkpoints").is_dir() and run_config(path) is None:
        return lambda: _of_hugging_face(path)
    load_config(path / "config.json")
    steps = checkpoint_steps(path)
    return lambda: _of_run(path, steps)


def _of_run(path: pathlib.Path, steps: Sequence[int]) -> history.History:
    rows = read_rows(path / "inspect.jsonl")
    found = {}
    for step in steps:
        state = load_state(path, step)[2]
        found[step] = matrices_of(jax.device_get(joined(state.params, state.fixed)))
        if not found[step]:
            raise TrainingError(f"{path}: its blocks have no matrices.")
    return history.History(str(path), found, rows)


def _of_hugging_face(path: pathlib.Path) -> history.History:
    model, _ = read_model(path)
    return history.History(str(path), {0: matrices_of(nnx.to_pure_dict(nnx.state(model)))}, [])


def _parser() -> Parser:
    parser = Parser("python -m loro_jax inspect", __doc__)
    parser.add_argument("directories", metavar="DIR", nargs="*")
    parser.add_argument("--between", nargs=2, metavar=("A", "B"), help="two directories as DIR")
    parser.add_argument(
        "--text", metavar="SOURCE", help="text for --between: any source that a run can read"
    )
    parser.add_argument("--window", type=int, default=256, help="tokens of a window of the text")
    parser.add_argument("--max_tokens", type=int, default=0, metavar="N", help="0: all")
    parser.add_argument("--over", metavar="FIELD", help="such as exact_every or model.rank")
    parser.add_argument("--out", metavar="OUT", help="directory to write: JSON and figures")
    return parser
