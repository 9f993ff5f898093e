"""The training loop: steps, evaluations, checkpoints and early stops."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple

import jax
import numpy as np

from loro_jax.errors import DivergedError, LostProcessError
from loro_jax.training import mesh as meshes
from loro_jax.training.checkpoint import Checkpoints
from loro_jax.training.config import Config
from loro_jax.training.glue_config import GlueRun
from loro_jax.training.glue_inputs import GlueInputs
from loro_jax.training.gradient_start import batches_to_start_from, start_from_text
from loro_jax.training.inputs import Inputs
from loro_jax.training.inspecting import Inspection
from loro_jax.training.language import LanguageInputs
from loro_jax.training.metrics import MetricsWriter, read_rows
from loro_jax.training.processes import is_first, largest, others_alive, together
from loro_jax.training.progress import ProgressDisplay
from loro_jax.training.run_directory import RunDirectory
from loro_jax.training.start import origin
from loro_jax.training.step import Program, TrainState, compile_program, make_program
from loro_jax.training.teacher import load_teacher
from loro_jax.training.threads import lapack_by_one_thread


class Outcome(NamedTuple):
    """Result of a run.

    Attributes:
        exit_status: 0 if all steps are done, 128 + the signal's number if a signal stopped it.
        val_ppl: the last validation perplexity, or None.
    """

    exit_status: int
    val_ppl: float | None


@lapack_by_one_thread()
def train(config: Config, workdir: str, command: str = "python train.py") -> Outcome:
    """Trains a model, or resumes the run in a directory.

    All settings are validated before the directory is changed.

    Args:
        config: the run's config.
        workdir: the run directory.
        command: command line of the program, for the closing lines.

    Returns:
        The result.

    Raises:
        TrainingError: for a bad config or corpus, a directory of another run, a damaged set of
            checkpoints, or a loss that is not finite.
    """
    # Whatever is wrong with config, tokenizer or text is found before the directory is touched.
    inputs = together(lambda: _read_inputs(config))
    config = inputs.config
    with RunDirectory(workdir, config, inputs.fingerprint) as directory, _StopSignals() as signals:
        with others_alive():
            run = _Run(inputs, directory, signals)
        try:
            with others_alive():
                run.loop()
        except LostProcessError:
            raise  # closing would wait for the lost process
        except BaseException:
            with contextlib.suppress(Exception):  # report the first error
                run.close()
            raise
        run.close()
        if signals.received is not None:
            return Outcome(128 + signals.received, None)
        # Only the first process has the metrics.
        if not is_first():
            return Outcome(0, None)
        rows = read_rows(directory.path / "metrics.jsonl")
        last = next(row for row in reversed(rows) if "val_loss" in row)
        lines = inputs.finish(rows, last, workdir, command, run.shapes, run.live_ranks)
    for line in lines:
        print(line, flush=True)
    return Outcome(0, last.get("val_ppl"))


def _read_inputs(config: Config) -> Inputs:
    return GlueInputs(config) if isinstance(config, GlueRun) else LanguageInputs(config)


class _Dispatched(NamedTuple):
    """A step whose metrics are still on the device."""

    step: int
    metrics: dict[str, jax.Array]


class _Run:
    """One process's part of a run: the state shared by the functions of the loop."""

    def __init__(self, inputs: Inputs, directory: RunDirectory, signals: _StopSignals):
        config, devices = inputs.config, inputs.devices
        self._config = config
        self._inputs = inputs
        self._path = directory.path
        self._signals = signals
        self._devices = devices
        self._rows = meshes.rows_here(devices, config.batch_size)
        self._program: Program
        self._state: TrainState
        self._program, self.shapes = compile_program(make_program(config, devices), devices)
        # Arguments of each step beside state and batch, which it neither changes nor donates.
        self._beside, of_teacher = load_teacher(config, devices)
        notes = [*inputs.notes, *of_teacher]
        self._checkpoints = Checkpoints(
            self._path / "checkpoints", config.keep_checkpoints, notes.append
        )
        # State, counters and data position come from one checkpoint: a resumed run repeats the same
        # batches.
        restored = self._checkpoints.restore(self.shapes)
        self._iterator = inputs.iterator(self._rows)
        if restored is None:
            self._begin(inputs, notes.append)
        else:
            self._start, self._tokens = restored.step, int(restored.progress["tokens"])
            self._iterator.seek(restored.progress["data"])
            self._state = restored.state
            notes.append(f"continuing {self._path} from step {self._start}")
        # Opened after the restore, because rows after that checkpoint are dropped.
        self._metrics = (
            MetricsWriter(self._path, self._start, config.tensorboard) if is_first() else None
        )
        self._inspection = Inspection(
            config, self._path, self._start, self._state, self._tokens, is_new=restored is None
        )
        # Notes wait for it, because plain lines would break the bar on a terminal.
        self._display = ProgressDisplay(
            config.steps, self._start, quiet=not is_first(), perplexity=inputs.perplexity
        )
        for note in notes:
            self._display.say(note)
        if restored is None:
            for line in inputs.introduction(self._path):
                self._display.say(line)
        self._clock = _Clock(self._tokens)
        self.live_ranks: int | None = None

    def _begin(self, inputs: Inputs, note: Callable[[str], None]) -> None:
        """Makes the state of a new run, with the weights and adapters that it starts from."""
        config = self._config
        self._tokens = 0
        self._state, lines = inputs.start(self._program.init())
        # Not zero with the optimizer's state of another run.
        self._start = int(self._state.step)
        for line in lines:
            note(line)
        # Adapters of another run, which this one continues, have started.
        count = batches_to_start_from(config) if origin(config) is config else 0
        if count:
            # The run then begins with the same batches.
            position = self._iterator.position()
            batches = [self._put_rows(next(self._iterator)) for _ in range(count)]
            self._iterator.seek(position)
            self._state = start_from_text(config, self._state, batches, self._devices)
            note(
                f"{config.adapter_kind} adapters start from the mean gradient of "
                f"{count * config.batch_size} sequences"
            )

    def loop(self) -> None:
        """Takes all remaining steps, unless a signal or a non-finite loss stops the run."""
        config = self._config
        in_flight: _Dispatched | None = None
        for step in range(self._start + 1, config.steps + 1):
            dispatched = self._dispatch(step)
            # Collect the previous step's metrics while the device works on this step.
            if in_flight is not None:
                self._collect(in_flight)
            in_flight = dispatched
            last = step == config.steps or self._stops(step)
            evaluate = step % config.eval_every == 0 or step == config.steps
            checkpoint = step % config.checkpoint_every == 0 or last
            inspect = self._inspection.is_due(step)
            # Before it is evaluated or saved, a step's metrics must be finite, and written.
            if evaluate or checkpoint or inspect:
                self._collect(in_flight)
                in_flight = None
            if inspect:
                with self._clock.paused():
                    self._inspection.write(step, self._state, self._tokens)
            if evaluate:
                self._evaluate(step)
            if checkpoint:
                self._save(step)
            if last:
                break
        self._checkpoints.wait()
        if self._signals.received is not None:
            name = signal.Signals(self._signals.received).name
            self._display.say(
                f"stopped by {name} after step {step}; checkpoint written, "
                "run the same command to resume"
            )

    def _stops(self, step: int) -> bool:
        """Returns whether a signal stops the run; all processes stop after the same step."""
        if jax.process_count() == 1:
            return self._signals.received is not None
        # Agreeing costs a message to all processes, so they do it only every `log_every` steps.
        if step % self._config.log_every:
            return False
        received = int(largest(np.array(self._signals.received or 0)))
        self._signals.received = received or None
        return received > 0

    def _write(self, row: dict[str, Any]) -> None:
        if self._metrics is not None:
            self._metrics.write(row)

    def _dispatch(self, step: int) -> _Dispatched:
        with self._clock.waiting():
            rows = next(self._iterator)
        batch = self._put_rows(rows)
        self._state, metrics = self._program.train_step(self._state, batch, *self._beside)
        return _Dispatched(step, metrics)

    def _put_rows(self, rows: Any) -> Any:
        """Puts this process's rows of a training batch on the devices."""
        batch = self._inputs.batch(rows)
        return meshes.put_batch(self._devices, batch, self._rows, self._config.batch_size)

    def _collect(self, dispatched: _Dispatched) -> None:
        """Fetches and checks a step's metrics; writes its row every ``log_every`` steps."""
        step = dispatched.step
        # This waits for the step.
        values = {name: float(value) for name, value in dispatched.metrics.items()}
        self._tokens += int(values.pop("tokens"))
        # Of the last step, also if it has no row.
        self.live_ranks = int(values["live_ranks"]) if "live_ranks" in values else None
        if not all(math.isfinite(value) for value in values.values()):
            raise self._not_finite(step, values)
        if step == self._start + 1:
            self._clock.restart(self._tokens)  # the first step is mostly compilation
        if step % self._config.log_every == 0:
            row = {"step": step, **values, "tokens": self._tokens}
            row |= self._clock.rates(self._tokens)
            self._write(row)
            self._display.training(row)

    def _put_whole(self, batch: Any) -> Any:
        """Puts a batch of which every process holds all rows on the devices."""
        size = len(batch[0])
        return meshes.put_batch(self._devices, batch, range(size), size)

    def _not_finite(self, step: int, values: dict[str, float]) -> DivergedError:
        bad = ", ".join(f"{k} = {v}" for k, v in values.items() if not math.isfinite(v))
        self._checkpoints.wait()
        return DivergedError(
            f"step {step}: {bad}; stopped. The checkpoints of earlier steps in "
            f"{self._path / 'checkpoints'} are untouched. Try, with another --workdir, a lower "
            f"--config.learning_rate (now {self._config.learning_rate}), --config.clip_norm=1.0 "
            f"(now {self._config.clip_norm}) or a longer --config.warmup_steps."
        )

    def _evaluate(self, step: int) -> None:
        with self._clock.paused():
            # All batches are dispatched before the first result is fetched.
            parts = [
                self._program.eval_step(self._state.params, self._state.fixed, batch)
                for batch in map(self._put_whole, self._inputs.validation)
            ]
            outputs = jax.device_get(parts)
        found = self._inputs.evaluation(outputs)
        if not math.isfinite(found["val_loss"]):
            raise self._not_finite(step, {"val_loss": found["val_loss"]})
        row = {"step": step, **found, "tokens": self._tokens}
        self._write(row)
        self._display.evaluation(row)

    def _save(self, step: int) -> None:
        with self._clock.paused():
            if self._metrics is not None:
                # Metrics reach the disk before the checkpoint does. After a kill in between, the
                # surplus rows are removed when the run resumes; missing rows could not be restored.
                self._metrics.sync()
                self._inspection.sync()
            progress = {"tokens": self._tokens, "data": self._iterator.position()}
            self._checkpoints.save(step, self._state, progress)

    def close(self) -> None:
        """Closes all files; waits for a checkpoint in progress."""
        with contextlib.ExitStack() as stack:  # closes each, even if another one raises
            stack.callback(self._checkpoints.close)
            if self._metrics is not None:
                stack.callback(self._metrics.close)
            stack.callback(self._inspection.close)
            stack.callback(self._display.close)


class _Clock:
    """Measures tokens per second without evaluations and checkpoints, and time spent on data."""

    def __init__(self, tokens: int) -> None:
        self.restart(tokens)

    def restart(self, tokens: int) -> None:
        self._since, self._tokens, self._waited = time.monotonic(), tokens, 0.0

    def rates(self, tokens: int) -> dict[str, float]:
        """Returns tokens per second since the last call, and the share of time waiting for data."""
        elapsed = max(time.monotonic() - self._since, 1e-9)
        found = {
            "tokens_per_second": round((tokens - self._tokens) / elapsed, 1),
            "data_wait": round(self._waited / elapsed, 5),
        }
        self.restart(tokens)
        return found

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Returns a context whose time does not count."""
        started = time.monotonic()
        yield
        # Moving the beginning of the interval leaves the pause out of it.
        self._since += time.monotonic() - started

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Returns a context whose time counts as waiting for data."""
        started = time.monotonic()
        yield
        self._waited += time.monotonic() - started


class _StopSignals:
    """Records the first SIGTERM or SIGINT, so that the loop stops after the current step.

    A second signal interrupts immediately.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            # The first signal waits for the current step to end; the second one does not.
            raise KeyboardInterrupt
        self.received = number

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
