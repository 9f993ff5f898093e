"""Loading of trained classifiers from run directories."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

from loro_jax.layers.adapters import merge_adapters
from loro_jax.training.glue_config import GlueRun
from loro_jax.training.glue_inputs import tokenizer_path
from loro_jax.training.step import merge_model
from loro_jax.training.trained import load_config, load_state
from models.roberta import RobertaClassifier


class TrainedClassifier(NamedTuple):
    """A trained classifier.

    Attributes:
        config: config of the run.
        step: step of the checkpoint.
        model: the model, its adapters merged.
        tokenizer: path of its tokenizer.
    """

    config: GlueRun
    step: int
    model: RobertaClassifier
    tokenizer: str


def is_classifier(path: str | pathlib.Path) -> bool:
    """Returns whether a directory is a run on GLUE.

    Raises:
        TrainingError: if it is no run directory.
    """
    return isinstance(load_config(pathlib.Path(path) / "config.json"), GlueRun)


def load_classifier(path: str | pathlib.Path, step: int | None = None) -> TrainedClassifier:
    """Loads the model of a run on GLUE, without disturbing a run in progress.

    Args:
        path: the run directory.
        step: step of the checkpoint; None: the last complete one.

    Raises:
        TrainingError: if there is no such checkpoint, or it is damaged.
    """
    config, chosen, state = load_state(path, step)
    assert isinstance(config, GlueRun)  # the caller has looked
    model = merge_adapters(merge_model(config, state.params, state.fixed), in_place=True)
    return TrainedClassifier(config, chosen, model, tokenizer_path(config))
