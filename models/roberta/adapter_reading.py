"""Reading LoRA of a classifier, with its head, from PEFT's format."""

from __future__ import annotations

import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from models.huggingface.adapter_configs import LORA, PeftConfig, read_adapter_config
from models.huggingface.adapter_reading import PREFIX, TENSORS, AdapterTensors, lora_fields
from models.huggingface.casts import cast
from models.huggingface.errors import CheckpointError
from models.roberta.config import RobertaConfig
from models.roberta.names import PROJECTIONS, layer_prefix

# PEFT's names of the heads of classifiers; RoBERTa has the first.
_HEADS = ("classifier", "score")


class ClassifierAdapter(NamedTuple):
    """LoRA of a classifier in PEFT's format, checked against its base.

    Attributes:
        config: its config.
        fields: ``rank``, ``alpha`` and ``rank_stabilised`` of our adapters.
        factors: A and B of each projection, by our path in a block, stacked over the layers.
        head: arrays of the head, by layer and variable; empty if the file has none.
    """

    config: PeftConfig
    fields: dict[str, Any]
    factors: dict[tuple[str, ...], dict[str, np.ndarray]]
    head: dict[tuple[str, str], np.ndarray]


def read_classifier_adapter(
    directory: str | os.PathLike[str], config: RobertaConfig
) -> ClassifierAdapter:
    """Reads LoRA of a classifier in PEFT's format.

    Args:
        directory: directory with ``adapter_config.json`` and ``adapter_model.safetensors``.
        config: config of the base, with the number of labels.

    Returns:
        The adapter.

    Raises:
        CheckpointError: if it is missing, damaged, of a form that can't be trained, or of another
            base.
    """
    path = pathlib.Path(directory)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory.")
    peft = read_adapter_config(path, saved=_HEADS)
    if peft.form != LORA:
        raise CheckpointError(f"{peft.path}: peft_type = {peft.form!r}; expected {LORA}.")
    if not (path / TENSORS).is_file():
        raise CheckpointError(f"{path} holds no adapter: expected {TENSORS}.")
    paths = _adapted(peft, config)
    fields = lora_fields(peft, [_module(i, at) for at in paths for i in range(config.num_layers)])
    tensors = AdapterTensors(path)
    shapes = dict(_shapes_of_factors(config, paths, fields["rank"]))
    head = _shapes_of_head(config) if peft.content.get("modules_to_save") else {}
    shapes |= dict(head.values())
    _check(path, tensors, shapes)

    def read(name: str) -> np.ndarray:
        return cast(tensors.read(name), np.float32, f"{path / TENSORS}: {name}")

    def stacked(at: tuple[str, ...], name: str) -> np.ndarray:
        return np.stack([read(_factor(i, at, name)) for i in range(config.num_layers)])

    return ClassifierAdapter(
        peft,
        fields,
        {at: {name: stacked(at, name) for name in "AB"} for at in paths},
        {place: read(name) for place, (name, _) in head.items()},
    )


def _module(layer: int, path: tuple[str, ...]) -> str:
    return f"{layer_prefix(layer)}{PROJECTIONS[path]}"


def _factor(layer: int, path: tuple[str, ...], name: str) -> str:
    return f"{PREFIX}{_module(layer, path)}.lora_{name}.weight"


def _adapted(peft: PeftConfig, config: RobertaConfig) -> list[tuple[str, ...]]:
    """Returns our paths of the projections that are adapted in all layers."""
    found = []
    for path, theirs in PROJECTIONS.items():
        modules = [_module(layer, path) for layer in range(config.num_layers)]
        count = len(peft.adapted(modules))
        if count not in (0, config.num_layers):
            raise CheckpointError(
                f"{peft.path}: {theirs} is adapted in {count} of {config.num_layers} layers; "
                "expected all of them."
            )
        found += [path] if count else []
    if not found:
        raise CheckpointError(
            f"{peft.path}: target_modules = {peft.content.get('target_modules')!r} matches no "
            f"projection of the base; expected names among {', '.join(PROJECTIONS.values())}."
        )
    return found


def _shapes_of_factors(
    config: RobertaConfig, paths: list[tuple[str, ...]], rank: int
) -> list[tuple[str, tuple[int, ...]]]:
    D, F = config.hidden_size, config.intermediate_size
    sizes = {("mlp", "intermediate"): (F, D), ("mlp", "output"): (D, F)}
    shapes: list[tuple[str, tuple[int, ...]]] = []
    for path in paths:
        m, n = sizes.get((path[0], path[1]), (D, D))
        for layer in range(config.num_layers):
            shapes.append((_factor(layer, path, "A"), (rank, n)))
            shapes.append((_factor(layer, path, "B"), (m, rank)))
    return shapes


def _shapes_of_head(
    config: RobertaConfig,
) -> dict[tuple[str, str], tuple[str, tuple[int, ...]]]:
    """Returns names and shapes of the head's tensors, by our layer and variable."""
    D, prefix = config.hidden_size, f"{PREFIX}classifier."
    return {
        ("dense", "W"): (f"{prefix}dense.weight", (D, D)),
        ("dense", "bias"): (f"{prefix}dense.bias", (D,)),
        ("out_proj", "W"): (f"{prefix}out_proj.weight", (config.num_labels, D)),
        ("out_proj", "bias"): (f"{prefix}out_proj.bias", (config.num_labels,)),
    }


def _check(path: pathlib.Path, tensors: AdapterTensors, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError for tensors that are missing, not expected, or of a wrong shape."""
    for what, names in (
        ("missing", shapes.keys() - tensors.names),
        ("not expected", tensors.names - shapes.keys()),
    ):
        if names:
            raise CheckpointError(f"{path / TENSORS}: {min(names)} is {what}.")
    for name, shape in shapes.items():
        if tensors.shape(name) != shape:
            raise CheckpointError(
                f"{path / TENSORS}: {name} has shape {tensors.shape(name)}; expected {shape} for "
                "this base."
            )
    tensors.check_floating(set(shapes))
