"""Language models: a corpus, its batches, and perplexity."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from loro_jax.text import describe, load_corpus, train_iterator
from loro_jax.text.tokenizers.tokenizer import load_tokenizer
from loro_jax.training import mesh as meshes
from loro_jax.training.batch import to_batch, validation_batches
from loro_jax.training.config import Config
from loro_jax.training.inputs import Row, TrainIterator
from loro_jax.training.plots import plot_run
from loro_jax.training.processes import largest
from loro_jax.training.published import published
from loro_jax.training.report import corpus_ngrams, final_report
from loro_jax.training.start import check_start, sources_of_ids, start_from, with_architecture
from loro_jax.training.step import TrainState
from loro_jax.training.stored_adapter import start_from_adapter, with_stored_adapter
from loro_jax.training.teacher import check_teacher
from loro_jax.training.vocabulary import resolve_vocabulary
from models.loss import Batch


class LanguageInputs:
    """The inputs of a language model's run; see :class:`loro_jax.training.inputs.Inputs`.

    Args:
        config: the run's config.

    Raises:
        TrainingError: for a bad config, tokenizer or corpus, or an ``init_from`` that does not fit.
    """

    perplexity = True

    def __init__(self, config: Config):
        # The architecture of init_from first: everything after it depends on it.
        given, config = config, with_stored_adapter(with_architecture(config))
        config.validate()
        self.devices = meshes.make_mesh(config.mesh)
        meshes.check_batch(config, self.devices)
        data, sources = config.data, sources_of_ids(given, config)
        tokenizer = load_tokenizer(data.tokenizer, data.eos_id, data.pad_id, sources)
        check_start(config, tokenizer)
        self.config, self._vocabulary = resolve_vocabulary(config, tokenizer)
        check_teacher(self.config)
        self._vocab_size = tokenizer.vocab_size
        self._corpus = load_corpus(config.data, config.sequence_length, tokenizer)
        self.fingerprint = self._corpus.fingerprint
        self.notes: Sequence[str] = self._corpus.notes
        # In micro-batches, so that an evaluation needs no more memory than a step.
        self.validation: Sequence[Any] = validation_batches(
            self._corpus, config.batch_size // config.gradient_accumulation
        )

    def iterator(self, rows: Sequence[int]) -> TrainIterator:
        """Returns the iterator over training batches."""
        config = self.config
        return train_iterator(
            config.data,
            self._corpus,
            batch_size=config.batch_size,
            sequence_length=config.sequence_length,
            seed=config.seed,
            rows=rows,
            agree=largest,
        )

    def batch(self, rows: dict[str, np.ndarray]) -> Batch:
        """Returns inputs, targets and mask."""
        return to_batch(rows["tokens"], rows["mask"])

    def start(self, state: TrainState) -> tuple[TrainState, list[str]]:
        """Loads the weights of ``init_from``, and the adapters of ``adapter.init_from``."""
        lines: list[str] = []
        if self.config.init_from is not None:
            state, line = start_from(self.config, state)
            lines.append(line)
        state, more = start_from_adapter(self.config, state)
        return state, lines + more

    def introduction(self, path: pathlib.Path) -> list[str]:
        """Describes devices, text and vocabulary."""
        config = self.config
        return [
            f"{config.method} on {jax.device_count()} {jax.devices()[0].platform} device(s), "
            f"{describe(config.data, self._corpus, config.sequence_length)} and "
            f"{len(self._corpus.validation_tokens):,} validation sequences of "
            f"{config.sequence_length} tokens, in {path}",
            self._vocabulary,
        ]

    def evaluation(self, outputs: list[Any]) -> Row:
        """Returns loss and perplexity per token."""
        # In float64, because large sums of float32 would lose the last digits of the loss.
        losses = np.asarray(outputs, np.float64)
        loss_sum, tokens = np.sum(losses, axis=0)
        val_loss = float(loss_sum / tokens)
        # The loop stops a run whose loss is not finite.
        row = {"val_loss": val_loss, "val_ppl": math.exp(val_loss) if val_loss < 700 else math.inf}
        if self.config.published_ppl:
            found = published(*losses.T)
            row |= {"published_ppl": found.perplexity, "val_batches": found.batches}
        return row

    def finish(
        self,
        rows: list[Row],
        last: Row,
        workdir: str,
        command: str,
        state: TrainState,
        live_ranks: int | None,
    ) -> list[str]:
        """Plots losses beside n-gram models; reports perplexity, memory and next commands."""
        config = self.config
        ngrams = corpus_ngrams(self._corpus, self._vocab_size)
        path = pathlib.Path(workdir)
        plot_run(rows, path / "plot.png", ngrams, f"{config.method}, {path.name}")
        return final_report(
            config, last["val_ppl"], ngrams, workdir, command, live_ranks, state=state
        )
