"""Methods side by side: the same text in the same order, a learning-rate grid each, several seeds.

``python -m loro_jax.compare CONFIG --methods=full,lowrank,loro --lrs=0.003,0.01 --seeds=0,1,2``

The grid is run with the first seed; the best learning rate of each method then with all others.
``--arm slow=lowrank,lr_scale=0.25`` adds an arm: a method with fields of the config set its own
way. Every run has a directory of its own and goes on where it was stopped: the same command again
finishes an interrupted comparison; started twice, both share the work. A run whose loss is no
longer finite is a row that says so.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import io
import json
import math
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from loro_jax.errors import DivergedError, InUseError, TrainingError
from loro_jax.study.report import (
    Arm,
    Result,
    Run,
    config_of,
    write_report,
)
from loro_jax.training.config import METHODS, Config, differences
from loro_jax.training.fields import apply_changes, parse_change, set_field
from loro_jax.training.loop import train
from loro_jax.training.metrics import read_rows

_PATIENCE = 10.0  # seconds between two looks at runs that another process has claimed


class _StoppedError(Exception):
    """A signal ended a run; the comparison ends with it."""

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status


def compare(
    base: Config,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    grids: Mapping[str, Sequence[float]],
    out: str,
    command: str = "",
) -> list[Result]:
    """Runs a comparison, or what is missing of one, and writes its table and plots.

    Args:
        base: the config that all runs share.
        arms: what is compared.
        seeds: seeds of initialisation and order; the first one's runs choose the learning rate.
        grids: learning rates by the name of the arm.
        out: the comparison's directory.
        command: what started it, for the report.

    Returns:
        All results, in the order of the runs.

    Raises:
        TrainingError: for a bad config, or directories of other runs.
    """
    directory = pathlib.Path(out)
    while True:
        results: list[Result] = []
        complete = True
        for arm in arms:
            found = [_finish(base, Run(arm, rate, seeds[0]), directory) for rate in grids[arm.name]]
            finished = [result for result in found if result and result.perplexity is not None]
            if finished and None not in found:
                best = min(finished, key=lambda result: result.perplexity or math.inf).run
                found += [_finish(base, best._replace(seed=seed), directory) for seed in seeds[1:]]
            results += [result for result in found if result]
            complete = complete and None not in found
            if results:
                write_report(base, results, directory, command)
        if complete:
            return results
        time.sleep(_PATIENCE)  # another process is at the rest


def _finish(base: Config, run: Run, directory: pathlib.Path) -> Result | None:
    """Trains a run to its end, unless it has ended already; None: another process is at it."""
    config = config_of(base, run)
    workdir = directory / run.name
    note_path = directory / f"{run.name}.diverged.txt"
    if _belongs(config, workdir):
        if note_path.exists():
            return _result(run, workdir, None, note_path.read_text(encoding="utf-8"))
        perplexity = _last_perplexity(config, workdir)
        if perplexity is not None:
            return _result(run, workdir, perplexity, "")
    print(f"{run.name} ...", flush=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            outcome = train(config, str(workdir))
    except InUseError:
        print(f"{run.name}: another process is at it", flush=True)
        return None
    except DivergedError as error:
        note = str(error).split(";")[0]
        note_path.write_text(note, encoding="utf-8")
        print(f"{run.name}: diverged ({note})", flush=True)
        return _result(run, workdir, None, note)
    if outcome.exit_status:
        raise _StoppedError(outcome.exit_status)
    print(f"{run.name}: validation perplexity {outcome.val_ppl:.2f}", flush=True)
    return _result(run, workdir, outcome.val_ppl, "")


def _belongs(config: Config, workdir: pathlib.Path) -> bool:
    """Whether a directory holds a run of this very config."""
    try:
        stored = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return not differences(stored, config)


def _last_perplexity(config: Config, workdir: pathlib.Path) -> float | None:
    rows = read_rows(workdir / "metrics.jsonl")
    last = [row for row in rows if row["step"] == config.steps]
    return next((row["val_ppl"] for row in last if "val_ppl" in row), None)


def _result(run: Run, workdir: pathlib.Path, perplexity: float | None, note: str) -> Result:
    rows = [row for row in read_rows(workdir / "metrics.jsonl") if "loss" in row]
    curve = [(row["tokens"], row["loss"]) for row in rows]
    seconds = 0.0
    for before, row in zip([{"tokens": 0}, *rows], rows, strict=False):
        if row["tokens_per_second"] > 0:  # 0 where the machine slept
            seconds += (row["tokens"] - before["tokens"]) / row["tokens_per_second"]
    return Result(run, perplexity, note, curve, seconds)


def load_config(path: str, changes: Sequence[str]) -> Config:
    """Loads a config file and sets fields of it.

    Args:
        path: a Python file with ``get_config()``; what follows a colon is its argument.
        changes: ``field=value`` each, the field dotted, the value as JSON or a plain string.

    Returns:
        The config.

    Raises:
        TrainingError: if the file has none, or a field does not exist.
    """
    file, *settings = path.split(":", 1)
    spec = importlib.util.spec_from_file_location("comparison_config", file)
    if spec is None or spec.loader is None or not pathlib.Path(file).is_file():
        raise TrainingError(
            f"CONFIG = {path!r}: expected a config file, such as configs/default.py."
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        config = module.get_config(*settings)
    except (TypeError, ValueError) as error:  # an argument that it does not take
        raise TrainingError(f"CONFIG = {path!r}: {error}") from None
    if not isinstance(config, Config):
        raise TrainingError(f"CONFIG = {path!r}: get_config() must return a training Config.")
    apply_changes(config, changes)
    return config


def _arms(methods: str, options: Sequence[str], base: Config) -> list[Arm]:
    """An arm for each method, and ``NAME=METHOD,FIELD=VALUE,...`` for each option."""
    arms = [Arm(method, method) for method in methods.split(",") if method]
    for option in options:
        name, separator, rest = option.partition("=")
        method, *changes = rest.split(",")
        try:
            arm = Arm(name, method, tuple(parse_change(change) for change in changes))
            for field, value in arm.changes:
                set_field(copy.deepcopy(base), field, value)
        except (AttributeError, ValueError):
            separator = ""
        if not separator or not name or "/" in name:
            raise TrainingError(
                f"--arm {option}: expected NAME=METHOD,FIELD=VALUE,... with fields of the config."
            )
        arms.append(arm)
    for arm in arms:
        if arm.method not in METHODS:
            raise TrainingError(f"--methods: {arm.method!r}; expected {', '.join(METHODS)}.")
        if sum(arm.name == other.name for other in arms) > 1:
            raise TrainingError(f"--methods, --arm: {arm.name!r} occurs more than once.")
    return arms


def _grids(options: Sequence[str], names: Sequence[str]) -> dict[str, list[float]]:
    """Learning rates by arm: ``0.003,0.01`` for all, ``loro=0.01,0.02`` for one."""
    grids: dict[str, list[float]] = {}
    for option in options:
        name, separator, text = option.rpartition("=")
        try:
            rates = [float(rate) for rate in text.split(",")]
        except ValueError:
            raise TrainingError(f"--lrs {option}: expected numbers, separated by commas.") from None
        if not all(0 < rate < math.inf for rate in rates):
            raise TrainingError(f"--lrs {option}: learning rates must be above 0.")
        if separator and name not in names:
            raise TrainingError(f"--lrs {option}: {name!r} is not among --methods and --arm.")
        for known in [name] if separator else names:
            grids[known] = rates
    return grids


def _arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loro_jax.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--methods", default="full,lowrank,loro")
    parser.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="NAME=METHOD,FIELD=VALUE,...",
        help="one more arm: a method with fields of its own; may be repeated",
    )
    parser.add_argument("--seeds", default="0")
    parser.add_argument(
        "--lrs", action="append", help="RATES for all or NAME=RATES; may be repeated"
    )
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--out", default="runs/comparison")
    return parser.parse_args(arguments)


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except TrainingError as error:
        sys.exit(f"error: {error}")


def main(arguments: Sequence[str]) -> int:
    """``python -m loro_jax.compare``."""
    options = _arguments(arguments)
    with _one_line_errors():
        try:
            seeds = [int(seed) for seed in options.seeds.split(",")]
        except ValueError:
            raise TrainingError(f"--seeds={options.seeds}: expected whole numbers.") from None
        base = load_config(options.config, options.set)
        arms = _arms(options.methods, options.arm, base)
        names = [arm.name for arm in arms]
        grids = _grids([str(base.learning_rate), *(options.lrs or [])], names)
        for arm in arms:
            config_of(base, Run(arm, grids[arm.name][0], seeds[0])).validate()
        try:
            command = " ".join(["python -m loro_jax.compare", *arguments])
            compare(base, arms, seeds, grids, options.out, command)
        except _StoppedError as stopped:
            print("stopped; the same command goes on", file=sys.stderr)
            return stopped.status
    print((pathlib.Path(options.out) / "table.md").read_text(encoding="utf-8"))
    return 0
