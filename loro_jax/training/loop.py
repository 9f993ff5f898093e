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
from loro_jax.text import Corpus, describe, load_corpus, train_iterator
from loro_jax.text.ngram import NgramPerplexity
from loro_jax.text.tokenizers.tokenizer import load_tokenizer
from loro_jax.training import mesh as meshes
from loro_jax.training.batch import to_batch, validation_batches
from loro_jax.training.checkpoint import Checkpoints
from loro_jax.training.config import Config
from loro_jax.training.gradient_start import batches_to_start_from, start_from_text
from loro_jax.training.metrics import MetricsWriter, read_rows
from loro_jax.training.plots import plot_run
from loro_jax.training.processes import is_first, largest, others_alive, together
from loro_jax.training.progress import ProgressDisplay
from loro_jax.training.published import published
from loro_jax.training.report import corpus_ngrams, final_report
from loro_jax.training.run_directory import RunDirectory
from loro_jax.training.start import check_start, origin, start_from, with_architecture
from loro_jax.training.step import Program, TrainState, compile_program, make_program
from loro_jax.training.stored_adapter import start_from_adapter, with_stored_adapter
from loro_jax.training.threads import lapack_by_one_thread
from loro_jax.training.vocabulary import resolve_vocabulary
from models.loss import Batch


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
    config, corpus = inputs.config, inputs.corpus
    with RunDirectory(workdir, config, corpus.fingerprint) as directory, _StopSignals() as signals:
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
        ngrams = corpus_ngrams(corpus, inputs.vocab_size)
        val_ppl, live_ranks = run.finish(ngrams)
    for line in final_report(config, val_ppl, ngrams, workdir, command, live_ranks):
        print(line, flush=True)
    return Outcome(0, val_ppl)


class _Inputs(NamedTuple):
    """Validated inputs of a run."""

    config: Config
    devices: jax.sharding.Mesh
    corpus: Corpus
    vocab_size: int
    vocabulary: str


def _read_inputs(config: Config) -> _Inputs:
    # The architecture of init_from first: everything after it depends on it.
    config = with_stored_adapter(with_architecture(config))
    config.validate()
    devices = meshes.make_mesh(config.mesh)
    meshes.check_batch(config, devices)
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.eos_id, config.data.pad_id)
    check_start(config, tokenizer)
    config, vocabulary = resolve_vocabulary(config, tokenizer)
    corpus = load_corpus(config.data, config.sequence_length, tokenizer)
    return _Inputs(config, devices, corpus, tokenizer.vocab_size, vocabulary)


class _Dispatched(NamedTuple):
    """A step whose metrics are still on the device."""

    step: int
    metrics: dict[str, jax.Array]


class _Run:
    """One process's part of a run: the state shared by the functions of the loop."""

    def __init__(self, inputs: _Inputs, directory: RunDirectory, signals: _StopSignals):
        config, devices, corpus = inputs.config, inputs.devices, inputs.corpus
        self._config = config
        self._path = directory.path
        self._signals = signals
        self._devices = devices
        self._rows = meshes.rows_here(devices, config.batch_size)
        # In micro-batches, so that an evaluation needs no more memory than a step.
        self._validation = validation_batches(
            corpus, config.batch_size // config.gradient_accumulation
        )
        self._program: Program
        self._state: TrainState
        self._program, abstract_state = compile_program(make_program(config, devices), devices)
        notes = [*corpus.notes]
        self._checkpoints = Checkpoints(
            self._path / "checkpoints", config.keep_checkpoints, notes.append
        )
        # State, counters and data position come from one checkpoint: a resumed run repeats the same
        # batches.
        restored = self._checkpoints.restore(abstract_state)
        self._iterator = train_iterator(
            config.data,
            corpus,
            batch_size=config.batch_size,
            sequence_length=config.sequence_length,
            seed=config.seed,
            rows=self._rows,
            agree=largest,
        )
        if restored is None:
            self._begin(notes.append)
        else:
            self._start, self._tokens = restored.step, int(restored.progress["tokens"])
            self._iterator.seek(restored.progress["data"])
            self._state = restored.state
            notes.append(f"continuing {self._path} from step {self._start}")
        # Opened after the restore, because rows after that checkpoint are dropped.
        self._metrics = (
            MetricsWriter(self._path, self._start, config.tensorboard) if is_first() else None
        )
        # Notes wait for it, because plain lines would break the bar on a terminal.
        self._display = ProgressDisplay(config.steps, self._start, quiet=not is_first())
        for note in notes:
            self._display.say(note)
        if restored is None:
            self._display.say(
                f"{config.method} on {jax.device_count()} {jax.devices()[0].platform} device(s), "
                f"{describe(config.data, corpus, config.sequence_length)} and "
                f"{len(corpus.validation_tokens):,} validation sequences of "
                f"{config.sequence_length} tokens, in {self._path}"
            )
            self._display.say(inputs.vocabulary)
        self._clock = _Clock(self._tokens)
        self._live_ranks: int | None = None

    def _begin(self, note: Callable[[str], None]) -> None:
        """Makes the state of a new run, with the weights and adapters that it starts from."""
        config = self._config
        self._start, self._tokens = 0, 0
        self._state = self._program.init()
        if config.init_from is not None:
            self._state, line = start_from(config, self._state)
            # Not zero with the optimizer's state of another run.
            self._start = int(self._state.step)
            note(line)
        self._state, lines = start_from_adapter(config, self._state)
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
            # Before it is evaluated or saved, a step's metrics must be finite, and written.
            if evaluate or checkpoint:
                self._collect(in_flight)
                in_flight = None
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
        self._state, metrics = self._program.train_step(self._state, batch)
        return _Dispatched(step, metrics)

    def _put_rows(self, rows: dict[str, np.ndarray]) -> Batch:
        """Puts this process's rows of a training batch on the devices."""
        batch = to_batch(rows["tokens"], rows["mask"])
        return meshes.put_batch(self._devices, batch, self._rows, self._config.batch_size)

    def _collect(self, dispatched: _Dispatched) -> None:
        """Fetches and checks a step's metrics; writes its row every ``log_every`` steps."""
        step = dispatched.step
        # This waits for the step.
        values = {name: float(value) for name, value in dispatched.metrics.items()}
        self._tokens += int(values.pop("tokens"))
        # Of the last step, also if it has no row.
        self._live_ranks = int(values["live_ranks"]) if "live_ranks" in values else None
        if not all(math.isfinite(value) for value in values.values()):
            raise self._not_finite(step, values)
        if step == self._start + 1:
            self._clock.restart(self._tokens)  # the first step is mostly compilation
        if step % self._config.log_every == 0:
            row = {"step": step, **values, "tokens": self._tokens}
            row |= self._clock.rates(self._tokens)
            self._write(row)
            self._display.training(row)

    def _put_whole(self, batch: Batch) -> Batch:
        """Puts a batch of which every process holds all rows on the devices."""
        size = len(batch.inputs)
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
                for batch in map(self._put_whole, self._validation)
            ]
            # In float64, because large sums of float32 would lose the last digits of the loss.
            losses = np.asarray(jax.device_get(parts), np.float64)
        loss_sum, tokens = np.sum(losses, axis=0)
        val_loss = float(loss_sum / tokens)
        if not math.isfinite(val_loss):
            raise self._not_finite(step, {"val_loss": val_loss})
        row = {
            "step": step,
            "val_loss": val_loss,
            "val_ppl": math.exp(val_loss),
            "tokens": self._tokens,
        }
        if self._config.published_ppl:
            found = published(*losses.T)
            row |= {"published_ppl": found.perplexity, "val_batches": found.batches}
        self._write(row)
        self._display.evaluation(row)

    def _save(self, step: int) -> None:
        with self._clock.paused():
            if self._metrics is not None:
                # Metrics reach the disk before the checkpoint does. After a kill in between, the
                # surplus rows are removed when the run resumes; missing rows could not be restored.
                self._metrics.sync()
            progress = {"tokens": self._tokens, "data": self._iterator.position()}
            self._checkpoints.save(step, self._state, progress)

    def finish(self, ngrams: NgramPerplexity | None) -> tuple[float, int | None]:
        """Plots a complete run.

        Returns:
            (its last validation perplexity, the last number of live ranks if its method has one).
        """
        rows = read_rows(self._path / "metrics.jsonl")
        plot_run(rows, self._path / "plot.png", ngrams, f"{self._config.method}, {self._path.name}")
        val_ppl = next(row["val_ppl"] for row in reversed(rows) if "val_ppl" in row)
        return val_ppl, self._live_ranks

    def close(self) -> None:
        """Closes all files; waits for a checkpoint in progress."""
        with contextlib.ExitStack() as stack:  # closes each, even if another one raises
            stack.callback(self._checkpoints.close)
            if self._metrics is not None:
                stack.callback(self._metrics.close)
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
