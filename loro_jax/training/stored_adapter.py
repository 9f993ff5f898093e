"""Starts the adapters of a run from an adapter in PEFT's format, and writes them as one."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
from flax import nnx

from loro_jax.errors import TrainingError
from loro_jax.layers.adapters import ADAPTERS
from loro_jax.training.config import Config
from loro_jax.training.glue_config import GlueRun
from loro_jax.training.network import adapter_spec
from loro_jax.training.start import origin
from loro_jax.training.step import TrainState, merge_model
from loro_jax.training.tasks import task_of
from loro_jax.training.trained import load_state
from models.huggingface import CheckpointError
from models.huggingface.adapter_configs import note_of_base, read_adapter_config
from models.huggingface.adapter_reading import adapter_arrays, adapter_fields, read_adapter
from models.huggingface.adapter_writing import write_adapter
from models.roberta.adapters import write_classifier_adapter


def with_stored_adapter(config: Config) -> Config:
    """Replaces kind, rank, scale and targets of a run's adapters by those of ``adapter.init_from``.

    Args:
        config: config of a run, with the architecture of its base.

    Returns:
        The new config; the same one if ``adapter.init_from`` is None.

    Raises:
        TrainingError: if there is no base, the adapter can't be read, or it can't be trained.
    """
    source = config.adapter.init_from
    if source is None:
        return config
    if config.init_from is None or origin(config) is not config:
        has = "None" if config.init_from is None else "a run with the same adapters"
        raise TrainingError(
            f"config.adapter.init_from = {source!r} needs its base in config.init_from, which is "
            f"{has}."
        )
    try:
        stored = read_adapter(source, config.model.dense())
        fields = adapter_fields(stored.config, config.model)
    except CheckpointError as error:
        raise TrainingError(f"config.adapter.init_from: {error}") from None
    targets = ",".join(fields.pop("names"))
    adapter = dataclasses.replace(config.adapter, **fields, targets=targets, initialiser=None)
    return dataclasses.replace(config, adapter=adapter)


def start_from_adapter(config: Config, state: TrainState) -> tuple[TrainState, list[str]]:
    """Loads the adapter in ``adapter.init_from`` into a new state.

    Args:
        config: from :func:`with_stored_adapter`.
        state: a state with the weights of the base.

    Returns:
        (the state, lines that say so).
    """
    source = config.adapter.init_from
    if source is None:
        return state, []
    arrays = adapter_arrays(read_adapter(source, config.model.dense()))
    params = jax.tree.map(lambda x: x, state.params)  # new dicts
    for (part, name), variables in arrays.items():
        own: dict[str, Any] = params["blocks"][part][name]["adapter"]
        for variable, value in variables.items():
            like = own[variable]
            own[variable] = jax.device_put(value.astype(like.dtype), like.sharding)
    lines = [f"with the adapters of {source}"]
    note = note_of_base(read_adapter_config(pathlib.Path(source)), str(config.init_from))
    return state._replace(params=params), [*lines, note] if note else lines


def export_adapter(
    path: str, out: str, *, step: int | None, base: str | None, dtype: str | None
) -> tuple[int, int]:
    """Writes the adapters of a run in PEFT's format.

    Args:
        path: the run directory.
        out: a directory that does not exist yet.
        step: step of the checkpoint; None: the last.
        base: name or path of the base; None: the ``init_from`` of the run.
        dtype: dtype of the tensors; None: float32.

    Returns:
        (step of the checkpoint, total bytes of the tensors).

    Raises:
        TrainingError: if the run can't be read, or the start of its adapters is not known.
        CheckpointError: as :func:`models.huggingface.adapter_writing.write_adapter`, and as
            :func:`models.roberta.adapters.write_classifier_adapter`.
    """
    config, step, state = load_state(path, step)
    if not config.has_adapters:
        raise TrainingError(
            f"{path}, a run of method {config.method!r}, has no adapters; expected a run with "
            "config.adapter.kind."
        )
    began = origin(config)
    model = merge_model(config, state.params, state.fixed)
    start = None
    if adapter_spec(config).absorbs and "initialiser" in ADAPTERS[config.adapter_kind].uses:
        if began.init_from is not None and not pathlib.Path(began.init_from).exists():
            raise TrainingError(
                f"{began.init_from}, from which {path} has started, is gone, and with it how its "
                "adapters began; expected the whole model to be exported."
            )
        start = _at_start(began, model)
    base = began.init_from if base is None else base
    # The head of a classifier is not in its base: it is written with the adapters.
    write: Any = write_classifier_adapter if isinstance(config, GlueRun) else write_adapter
    return step, write(model, out, base=base, dtype=dtype or "float32", start=start)


def _at_start(config: Config, model: Any) -> Any:
    """Returns a model with its adapters as they were before training."""

    def arrays() -> Any:
        return _adapters(nnx.to_pure_dict(nnx.state(task_of(config).make(), nnx.Param)))

    # Compiled, so that only what is returned is computed.
    first = jax.jit(arrays)()
    fresh = nnx.clone(model)
    state = nnx.state(fresh, nnx.Param)
    state.replace_by_pure_dict(first)
    nnx.update(fresh, state)
    return fresh


def _adapters(tree: Any) -> Any:
    """Returns the arrays of adapters in a nested dict, without other entries."""
    if not isinstance(tree, dict):
        return {}
    found = {name: value if name == "adapter" else _adapters(value) for name, value in tree.items()}
    return {name: value for name, value in found.items() if value}
