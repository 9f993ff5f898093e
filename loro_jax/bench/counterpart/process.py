"""The process that PyTorch runs in, and turns between it and a function of ours."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from loro_jax.errors import TrainingError

# Longer than idle threads of OpenMP and of XLA spin before they sleep.
_PAUSE = 0.3

_PROGRAM = pathlib.Path(__file__).with_name("torch_side.py")


class Call(NamedTuple):
    """One timed call.

    Attributes:
        seconds: by the clock.
        processor: seconds of all threads, including those that spin.
        result: what the call returned.
    """

    seconds: float
    processor: float
    result: Any


class Turns(NamedTuple):
    """Calls of both sides in turns, without their warm-up.

    Attributes:
        ours: our calls.
        theirs: the counterpart's.
        first: results of the two warm-up calls, ours and theirs.
    """

    ours: list[Call]
    theirs: list[Call]
    first: tuple[Any, Any]

    def ratios(self) -> list[float]:
        """Returns our speed over theirs, by rounds."""
        return [b.seconds / a.seconds for a, b in zip(self.ours, self.theirs, strict=True)]


def missing() -> list[str]:
    """Returns the packages that the counterparts need and that are not installed."""
    needed = ("torch", "transformers", "safetensors")
    return [name for name in needed if importlib.util.find_spec(name) is None]


def skipped(option: str) -> bool:
    """Returns whether a counterpart can't run here; if so, prints why in one line.

    Args:
        option: the option that asks for it, as the user types it.
    """
    absent = missing()
    if absent:
        print(f"skipped: {option} needs {' and '.join(absent)}, not installed here (pip install)")
    return bool(absent)


def threads() -> int:
    """Returns the number of cores that this process may use: XLA's number of threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def torch_process(settings: Mapping[str, Any]) -> Iterator[Callable[[], Call]]:
    """Starts PyTorch in a process of its own, and ends it with the context.

    Args:
        settings: the work, as :mod:`loro_jax.bench.counterpart.torch_side` reads it.

    Yields:
        A function that makes one call there.
    """
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "settings.json"
        path.write_text(json.dumps({"threads": threads(), **settings}), "utf-8")
        with (pathlib.Path(folder) / "messages").open("w+", encoding="utf-8") as messages:
            # -P: the folder's own modules must not hide those of the standard library.
            process = subprocess.Popen(
                [sys.executable, "-P", str(_PROGRAM), str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                env=os.environ | quiet,
                text=True,
            )
            try:
                yield lambda: _ask(process, messages)
            finally:
                process.kill()
                process.communicate()


def _ask(process: subprocess.Popen[str], messages: Any) -> Call:
    assert process.stdin is not None  # both are pipes
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended: the next lines say why
        process.stdin.write("\n")
        process.stdin.flush()
    answer = process.stdout.readline()
    if answer:
        return Call(**json.loads(answer))
    status = process.wait()
    messages.seek(0)
    last = [line.strip() for line in messages if line.strip()] or ["no message"]
    raise TrainingError(f"PyTorch's process ended with exit status {status}: {last[-1]}")


def in_turns(ours: Callable[[], Any], theirs: Callable[[], Call], rounds: int) -> Turns:
    """Calls both in turns, after a warm-up call of each.

    Args:
        ours: our function; the timing includes the computation of returned JAX arrays.
        theirs: from :func:`torch_process`.
        rounds: number of timed calls of each.

    Returns:
        The calls.
    """
    turns = Turns([], [], (ours(), theirs().result))
    for _ in range(rounds):
        time.sleep(_PAUSE)
        turns.ours.append(_timed(ours))
        time.sleep(_PAUSE)
        turns.theirs.append(theirs())
    return turns


def _timed(function: Callable[[], Any]) -> Call:
    started, processor = time.perf_counter(), time.process_time()
    result = jax.block_until_ready(function())
    return Call(time.perf_counter() - started, time.process_time() - processor, result)


def summary(turns: Turns, tokens: int, theirs: str) -> dict[str, float]:
    """Returns tokens per second of both, their ratio, and the processor time per token.

    Args:
        turns: the calls.
        tokens: tokens per call.
        theirs: the counterpart's name, for the keys.

    Returns:
        Medians; ``ratio`` is the median of the rounds' ratios of our speed to theirs, next to the
        least and the most.
    """
    ratios = turns.ratios()

    def median(calls: list[Call], attribute: str) -> float:
        return statistics.median(getattr(call, attribute) for call in calls)

    return {
        "tokens/s": tokens / median(turns.ours, "seconds"),
        f"tokens/s {theirs}": tokens / median(turns.theirs, "seconds"),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "processor ms/token": 1e3 * median(turns.ours, "processor") / tokens,
        f"processor ms/token {theirs}": 1e3 * median(turns.theirs, "processor") / tokens,
    }
