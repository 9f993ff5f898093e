"""Display of a run's progress: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


class ProgressDisplay:
    """Shows a run's progress.

    Args:
        total_steps: length of the run.
        start_step: steps already taken when it was resumed.
        file: file to write to; None: standard output.
        quiet: whether to show nothing.
        perplexity: whether losses are shown as perplexities, too.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        file: TextIO | None = None,
        quiet: bool = False,
        perplexity: bool = True,
    ):
        self._console = Console(
            file=file or sys.stdout, highlight=False, soft_wrap=True, quiet=quiet
        )
        self._total = total_steps
        self._perplexity = perplexity
        self._started = time.monotonic()
        self._start_step = start_step
        self._bar: Progress | None = None
        self._validation = ""
        if self._console.is_terminal and not quiet:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[status]}"),
                console=self._console,
            )
            self._task = self._bar.add_task("train", total=total_steps, status="compiling ...")
            self._bar.update(self._task, completed=start_step)
            self._bar.start()

    def training(self, row: dict[str, Any]) -> None:
        """Shows a training row."""
        perplexity = f"ppl {_perplexity(row['loss']):.1f}  " if self._perplexity else ""
        status = (
            f"loss {row['loss']:.4f}  {perplexity}"
            f"{row['tokens_per_second']:,.0f} tokens/s  {self._time_left(row['step'])} left"
        )
        if self._bar is not None:
            status += self._validation
            self._bar.update(self._task, completed=row["step"], status=status)
        else:
            self._console.print(f"step {row['step']}/{self._total}  {status}")

    def evaluation(self, row: dict[str, Any]) -> None:
        """Shows an evaluation row."""
        if not self._perplexity:
            measures = _measures(row)
            self._validation = f"  val {measures}"
            if self._bar is None:
                self._console.print(f"step {row['step']}/{self._total}  validation {measures}")
            return
        self._validation = f"  val ppl {row['val_ppl']:.2f}"
        published = ""
        if "published_ppl" in row:
            published = f" (published {row['published_ppl']:.2f}, n = {row['val_batches']})"
            self._validation += published
        if self._bar is None:
            self._console.print(
                f"step {row['step']}/{self._total}  validation loss {row['val_loss']:.4f}  "
                f"ppl {row['val_ppl']:.2f}{published}"
            )

    def say(self, line: str) -> None:
        """Prints a separate line, above the bar if there is one."""
        self._console.print(line, markup=False)

    def close(self) -> None:
        """Stops the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _time_left(self, step: int) -> str:
        # Steps of before an interruption took none of this process's time.
        done = step - self._start_step
        if done <= 0:
            return "--:--"
        seconds = (time.monotonic() - self._started) / done * (self._total - step)
        hours, rest = divmod(int(seconds), 3600)
        return (
            f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
            if hours
            else f"{rest // 60}:{rest % 60:02d}"
        )


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _measures(row: dict[str, Any]) -> str:
    """Returns the fields of an evaluation that is not of a language model."""
    found = {name: value for name, value in row.items() if name.startswith("val_")}
    return "  ".join(f"{name.removeprefix('val_')} {x:.4f}" for name, x in found.items())
