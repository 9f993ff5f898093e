"""The inputs of a run on GLUE: tables, a pretrained RoBERTa, and the metrics of a task."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from loro_jax.errors import TrainingError
from loro_jax.glue import TASKS, PairTokenizer, TrainBatches, evaluate, load_data
from loro_jax.glue.batches import Rows, batches_per_epoch, validation_batches
from loro_jax.memory import count_bytes, count_parameters
from loro_jax.training import mesh as meshes
from loro_jax.training.config import Config
from loro_jax.training.glue_config import TARGETS, GlueRun
from loro_jax.training.inputs import Row
from loro_jax.training.network import with_base
from loro_jax.training.plots import plot_measures
from loro_jax.training.start import absorbed, with_arrays
from loro_jax.training.step import TrainState, joined
from models.huggingface import CheckpointError
from models.huggingface.adapter_configs import note_of_base
from models.roberta import read_classifier
from models.roberta.adapter_reading import ClassifierAdapter, read_classifier_adapter
from models.roberta.checkpoints import check_classifier, read_config

# Fields of the architecture; precision, dropout and rank are the run's.
_ARCHITECTURE = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "intermediate_size",
    "hidden_act",
    "max_position_embeddings",
    "type_vocab_size",
    "pad_id",
    "layer_norm_eps",
    "initializer_range",
)


class GlueInputs:
    """The inputs of a run on GLUE; see :class:`loro_jax.training.inputs.Inputs`.

    Args:
        config: the run's config.

    Raises:
        TrainingError: for a bad config, tokenizer or table, or an ``init_from`` that does not fit.
    """

    perplexity = False

    def __init__(self, config: GlueRun):
        config = _with_stored_adapter(_with_architecture(config))
        config.validate()
        self.devices = meshes.make_mesh(config.mesh)
        meshes.check_batch(config, self.devices)
        tokenizer = PairTokenizer(tokenizer_path(config))
        config = _with_vocabulary(config, tokenizer)
        self._task = TASKS[config.task]
        self._data = load_data(config.data, self._task, tokenizer, config.sequence_length)
        config = _with_steps(config, batches_per_epoch(self._data, config.batch_size))
        config.validate()
        self.config: Config = config
        self._run = config
        self.fingerprint = self._data.fingerprint
        self.notes: Sequence[str] = self._data.notes
        # In micro-batches, so that an evaluation needs no more memory than a step.
        size = config.batch_size // config.gradient_accumulation
        self._parts = [
            list(validation_batches(self._data, split, size)) for split in self._data.validation
        ]
        self.validation: Sequence[Any] = [batch for part in self._parts for batch in part]

    def iterator(self, rows: Sequence[int]) -> TrainBatches:
        """Returns the iterator over training batches."""
        return TrainBatches(self._data, self.config.batch_size, self.config.seed, rows)

    def batch(self, rows: Rows) -> Rows:
        """Returns the rows: they are the batch."""
        return rows

    def start(self, state: TrainState) -> tuple[TrainState, list[str]]:
        """Loads the weights of ``init_from``, and a new head if there is none."""
        config = self._run
        if config.init_from is None:
            return state, []
        try:
            model, notes = read_classifier(
                config.init_from,
                num_labels=self._task.outputs,
                dtype=config.model.param_dtype,
                seed=config.seed,
            )
        except CheckpointError as error:
            raise TrainingError(f"config.init_from: {error}") from None
        whole = joined(state.params, state.fixed)
        found = with_base(whole, nnx.to_pure_dict(nnx.state(model)))
        found = absorbed(config, found)
        lines = [f"starting from {config.init_from}", *notes]
        source = config.adapter.init_from
        if source is not None:
            stored = read_classifier_adapter(source, config.model)
            if stored.head:
                lines = lines[:1]  # the new head is not used
            found = _with_adapter(found, stored)
            note = note_of_base(stored.config, config.init_from)
            lines += [f"with the adapters of {source}", *([note] if note else [])]
        return with_arrays(state, found), lines

    def introduction(self, path: pathlib.Path) -> list[str]:
        """Describes devices, task and tables."""
        config, data = self._run, self._data
        splits = ", ".join(f"{len(one.rows):,} of {one.name}" for one in data.validation)
        lengths = " or ".join(map(str, data.lengths))
        return [
            f"{config.method} on {jax.device_count()} {jax.devices()[0].platform} device(s), "
            f"{self._task.title}: {len(data.train.rows):,} training rows, {splits}; batches of "
            f"{config.batch_size} rows of {lengths} tokens, in {path}"
        ]

    def evaluation(self, outputs: list[Any]) -> Row:
        """Returns loss and metrics: of the first validation split, and of others by its name."""
        row: Row = {}
        for split, batches in zip(self._data.validation, self._parts, strict=True):
            own, outputs = outputs[: len(batches)], outputs[len(batches) :]
            counted = np.concatenate([batch.weights for batch in batches]) > 0
            losses, logits = (np.concatenate(part)[counted] for part in zip(*own, strict=True))
            # "validation_mismatched" is a further split of MNLI.
            other = split.name.partition("_")[2] if row else ""
            suffix = f"_{other}" if other else ""
            row[f"val_loss{suffix}"] = float(np.mean(losses, dtype=np.float64))
            for name, value in evaluate(self._task, logits, split.labels).items():
                row[f"val_{name}{suffix}"] = value
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
        """Plots losses and the first metric; reports the last and the best evaluation."""
        config, name = self._run, f"val_{self._task.metrics[0]}"
        evaluations = [row for row in rows if name in row]
        best = max(evaluations, key=lambda row: row[name])
        title = f"{self._task.title}, {config.method}, {pathlib.Path(workdir).name}"
        plot_measures(rows, pathlib.Path(workdir) / "plot.png", name, title)
        trained, fixed = count_parameters(state.params), count_parameters(state.fixed)
        measures = ", ".join(
            f"{key.removeprefix('val_')} {value:.4f}"
            for key, value in last.items()
            if key.startswith("val_") and not key.startswith("val_loss")
        )
        ranks = "" if live_ranks is None else f", {live_ranks} ranks of adapters"
        return [
            "",
            f"{self._task.title}: {measures} (best {name.removeprefix('val_')} {best[name]:.4f}, "
            f"step {best['step']})",
            f"{trained / 1e6:.2f}M trained parameters of {(trained + fixed) / 1e6:.2f}M{ranks}, "
            f"optimizer {count_bytes(state.opt_state) / 1e6:.1f} MB",
            f"run directory {workdir}: metrics.jsonl, config.json, checkpoints/, plot.png",
            "",
            "next:",
            "  # the classifier with merged adapters, for other programs",
            f"  python -m loro_jax export {workdir} {workdir}_merged",
            "  # a table of tasks and methods",
            f"  python -m loro_jax glue {workdir} ...",
        ]


def _with_architecture(config: GlueRun) -> GlueRun:
    """Replaces the architecture of a config with that of the model in ``init_from``."""
    outputs = TASKS[config.task].outputs if config.task in TASKS else 1
    fields: dict[str, Any] = {"num_labels": outputs}
    if config.init_from is not None:
        try:
            there = read_config(config.init_from)
            check_classifier(config.init_from, outputs)
        except CheckpointError as error:
            raise TrainingError(f"config.init_from: {error}") from None
        fields |= {name: getattr(there, name) for name in _ARCHITECTURE}
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))


def _with_stored_adapter(config: GlueRun) -> GlueRun:
    """Replaces rank, scale and targets of a run's adapters by those of ``adapter.init_from``."""
    source = config.adapter.init_from
    if source is None or config.init_from is None:  # validate reports the latter
        return config
    try:
        stored = read_classifier_adapter(source, config.model)
    except CheckpointError as error:
        raise TrainingError(f"config.adapter.init_from: {error}") from None
    ours = {tuple(path.split("/")[1:]): name for name, path in TARGETS.items()}
    adapter = dataclasses.replace(
        config.adapter,
        kind="lora",
        targets=",".join(ours[path] for path in stored.factors),
        initialiser=None,
        **stored.fields,
    )
    return dataclasses.replace(config, adapter=adapter)


def _with_adapter(arrays: Any, stored: ClassifierAdapter) -> Any:
    """Returns the arrays of a network with those of a stored adapter and head."""
    arrays = jax.tree.map(lambda x: x, arrays)  # new dicts

    def put(own: dict[str, Any], name: str, value: np.ndarray) -> None:
        own[name] = value.astype(own[name].dtype)

    for (part, name), factors in stored.factors.items():
        for variable, value in factors.items():
            put(arrays["blocks"][part][name]["adapter"], variable, value)
    for (layer, variable), value in stored.head.items():
        put(arrays["classifier"][layer], variable, value)
    return arrays


def tokenizer_path(config: GlueRun) -> str:
    """Returns the path of a run's tokenizer.

    Raises:
        TrainingError: if the config has none.
    """
    path = config.data.tokenizer or config.init_from
    if path is None:
        raise TrainingError(
            "config.data.tokenizer is none, and so is config.init_from; expected a directory with "
            "a tokenizer in either."
        )
    return path


def _with_vocabulary(config: GlueRun, tokenizer: PairTokenizer) -> GlueRun:
    """Checks the tokenizer's ids against the model's; a new model takes them over."""
    model = config.model
    if config.init_from is None:
        size = model.vocab_size or tokenizer.vocab_size
        model = dataclasses.replace(model, vocab_size=size, pad_id=tokenizer.pad_id)
    if tokenizer.vocab_size > model.vocab_size or tokenizer.pad_id != model.pad_id:
        raise TrainingError(
            f"config.data.tokenizer: {tokenizer_path(config)} has {tokenizer.vocab_size} ids and "
            f"padding {tokenizer.pad_id}; the model has {model.vocab_size} and {model.pad_id}."
        )
    return dataclasses.replace(config, model=model)


def _with_steps(config: GlueRun, per_epoch: int) -> GlueRun:
    """Turns passes over the rows into steps."""
    if not config.epochs:
        return config
    return dataclasses.replace(
        config,
        steps=config.epochs * per_epoch,
        eval_every=per_epoch,
        checkpoint_every=per_epoch,
    )
