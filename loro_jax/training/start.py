"""Starts runs from the weights of another run, or of a model in Hugging Face's format."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from loro_jax.errors import TrainingError
from loro_jax.layers import merge
from loro_jax.layers.adapters import absorb
from loro_jax.layers.projections import IN_PARTS, arrays_of_weight, holds_a_weight
from loro_jax.text.tokenizers.tokenizer import Tokenizer, vocabulary_size
from loro_jax.training.config import AdapterConfig, Config
from loro_jax.training.growth import grown
from loro_jax.training.methods import METHODS, next_task
from loro_jax.training.network import (
    adapter_spec,
    base_of,
    with_base,
    without_adapters,
)
from loro_jax.training.step import TrainState, joined, merge_model
from loro_jax.training.tasks import task_of
from loro_jax.training.trained import load_state, run_config
from models.huggingface import CheckpointError, check_parameters, read_config, read_parameters
from models.llama import Llama

# The tokenizer of init_from, as the name of one.
_SAME = "init_from"

# Fields of the architecture, independent of the projections' kind and of precision.
_ARCHITECTURE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_sequence_length",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "tie_embeddings",
)


def with_architecture(config: Config) -> Config:
    """Replaces the architecture of a config with that of the model in ``init_from``.

    Rank, kind of projections and precision are kept, unless the directory has ranks that differ by
    projection (``model.ranks``), which are then used. The number of layers is kept if ``init_from``
    is a run directory, whose stack of layers is then repeated. A tokenizer called "init_from"
    becomes the one there.

    Args:
        config: config of a run.

    Returns:
        The new config; the same one if ``init_from`` is None.

    Raises:
        TrainingError: if the directory can't be read, or the number of layers is no multiple of
            that of the run.
    """
    if config.init_from is None:
        _check_optimizer_is_fresh(config)
        if config.data.tokenizer == _SAME:
            raise TrainingError(
                f"config.data.tokenizer = {_SAME!r} needs a directory in config.init_from, which "
                "is None."
            )
        return config
    source = config.init_from
    run = _run_there(source)
    config = _with_tokenizer(config, run)
    if run is not None:
        there, layers = run.model, config.model.num_layers
        if layers == 0:
            model = dataclasses.replace(config.model, num_layers=there.num_layers)
            config = dataclasses.replace(config, model=model)
        elif layers % there.num_layers:
            raise TrainingError(
                f"config.model.num_layers = {layers} is no multiple of the {there.num_layers} "
                f"layers of config.init_from = {config.init_from!r}; expected {there.num_layers} "
                "or 0 (that number), "
                f"or {2 * there.num_layers}, {3 * there.num_layers}, ... to repeat its stack."
            )
        names = [name for name in _ARCHITECTURE if name != "num_layers"]
    else:
        _check_optimizer_is_fresh(config)
        try:
            there = read_config(source)
        except CheckpointError as error:
            raise TrainingError(f"config.init_from: {error}") from None
        names = list(_ARCHITECTURE)
    # Ranks that differ by projection are what the directory consists of.
    names += ["ranks"] if there.ranks and not config.model.ranks else []
    fields = {name: getattr(there, name) for name in names}
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))


def _with_tokenizer(config: Config, run: Config | None) -> Config:
    """Replaces a tokenizer of "init_from" with the one of that run or directory."""
    if config.data.tokenizer != _SAME:
        return config
    data = dataclasses.replace(config.data, tokenizer=str(config.init_from))
    if run is not None:
        names = ("tokenizer", "eos_id", "pad_id")
        data = dataclasses.replace(data, **{name: getattr(run.data, name) for name in names})
    return dataclasses.replace(config, data=data)


def sources_of_ids(given: Config, config: Config) -> dict[int, str]:
    """Names the file that an end-of-text id comes from, if :func:`with_architecture` found it.

    Args:
        given: the config as it was given.
        config: the config that :func:`with_architecture` made of it.

    Returns:
        A name by the id; empty if the id was given, or there is none.
    """
    eos_id = config.data.eos_id
    if eos_id is None or eos_id == given.data.eos_id:
        return {}
    return {eos_id: f"data.eos_id of {pathlib.Path(str(given.init_from)) / 'config.json'}"}


def _run_there(directory: str) -> Config | None:
    """Returns the config of the run in a directory; None if there is none."""
    path = pathlib.Path(directory)
    if not (path / "config.json").is_file() or not (path / "checkpoints").is_dir():
        return None
    return run_config(path)


def _check_optimizer_is_fresh(config: Config) -> None:
    if config.init_optimizer != "fresh":
        raise TrainingError(
            f"config.init_optimizer = {config.init_optimizer!r} needs a run directory in "
            f"config.init_from, which is {config.init_from!r}; expected 'fresh'."
        )


def check_start(config: Config, tokenizer: Tokenizer) -> None:
    """Raises TrainingError if a run can't start from ``init_from``, without reading tensors.

    The stored projections must be convertible to the run's, and the tokenizers must have the same
    number of ids.
    """
    if config.init_from is None:
        return
    run = _run_there(config.init_from)
    if run is not None:
        _check_tokenizers(config, tokenizer, run.data.tokenizer)
        return
    model = nnx.eval_shape(lambda: Llama(config.model_config, nnx.Rngs(0)))
    try:
        check_parameters(config.init_from, nnx.to_pure_dict(nnx.state(model)))
    except CheckpointError as error:
        raise TrainingError(f"config.init_from: {error}") from None
    directory = pathlib.Path(config.init_from)
    files = [directory / name for name in ("tokenizer.json", "tokenizer.model")]
    path = next((path for path in files if path.is_file()), None)
    if path is not None:
        _check_tokenizers(config, tokenizer, str(path))


def _check_tokenizers(config: Config, tokenizer: Tokenizer, name: str) -> None:
    # Only the number of ids is compared.
    theirs = vocabulary_size(name)
    if theirs != tokenizer.vocab_size:
        raise TrainingError(
            f"config.data.tokenizer = {config.data.tokenizer!r} has {tokenizer.vocab_size} ids, "
            f"but {name} has {theirs}; expected the tokenizer of config.init_from."
        )


def start_from(config: Config, state: TrainState) -> tuple[TrainState, str]:
    """Loads the weights of another model into a new state.

    Args:
        config: from :func:`with_architecture`, with an ``init_from``.
        state: a new state.

    Returns:
        (the state, a line that names the source and the truncation errors).

    Raises:
        TrainingError: if the directory can't be read, or does not fit the run's projections.
    """
    assert config.init_from is not None  # checked by the caller
    if _run_there(config.init_from) is not None:
        return _start_from_run(config, state)
    # Both parts are read as one model, and then taken apart again by their paths.
    whole = joined(state.params, state.fixed)
    try:
        found, errors = read_parameters(config.init_from, base_of(whole))
    except CheckpointError as error:
        raise TrainingError(f"config.init_from: {error}") from None
    state = with_arrays(state, absorbed(config, with_base(whole, found)))
    line = f"starting from {config.init_from}"
    if errors:
        worst = max(error.error for error in errors)
        least = min(error.error for error in errors)
        line += (
            f", {len(errors)} projections as truncated SVDs "
            f"(relative errors {least:.3f} to {worst:.3f})"
        )
    # Of two zero factors each one's gradient is a product with the other: they would stay zero.
    zero = [error.name for error in errors if error.zero]
    if zero:
        line += f"; {', '.join(zero)} all zeros, so their factors can't be trained"
    return state, line


def with_arrays(state: TrainState, arrays: Any) -> TrainState:
    """Returns a state with the arrays of a whole network, each in its place on the devices."""

    def pick(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        value: Any = arrays
        for entry in path[1:]:
            value = value[entry.key]
        # Placed leaf by leaf, so that no device holds the whole model if it is sharded.
        return jax.device_put(value, leaf.sharding)

    parts = {"params": state.params, "fixed": state.fixed}
    picked = jax.tree_util.tree_map_with_path(pick, parts)
    return state._replace(params=picked["params"], fixed=picked["fixed"])


def _start_from_run(config: Config, state: TrainState) -> tuple[TrainState, str]:
    """Loads the weights of a run, its stack of layers repeated as often as the config asks for."""
    assert config.init_from is not None  # checked by the caller
    run, step, there = load_state(config.init_from)
    times = config.model.num_layers // run.model.num_layers
    line = f"starting from step {step} of {config.init_from}"
    if times > 1:
        line += f", its {run.model.num_layers} layers {times} times"
    if _merges(config, run) or _is_converted(config, run):
        return with_arrays(state, _merged_run(config, run, state, there)), line
    copied = config.init_optimizer == "copied"
    if copied and step >= config.steps:
        raise TrainingError(
            f"config.steps = {config.steps} is not above step {step} of config.init_from = "
            f"{config.init_from!r}, where the run would continue with config.init_optimizer = "
            "'copied'."
        )
    # A fresh optimizer and the same method: the run that was is the task before this one.
    knows_tasks = METHODS[config.method].next_task is not None
    begins_task = knows_tasks and run.method == config.method and not copied
    if copied:
        line += ", with its optimizer's state"
    if copied or begins_task:
        old, fresh = there, state
    else:
        # One structure for both, without the parts that stay as they are.
        old = there._replace(step=state.step, opt_state=())
        fresh = state._replace(opt_state=())
    try:
        new = grown(old, fresh, times)
    except ValueError as error:
        raise TrainingError(
            f"config.init_from = {config.init_from!r}, a run of method {run.method!r}, does not "
            f"fit this run, of method {config.method!r}: {error}"
        ) from None
    if begins_task:
        line += ", as the next task"
        new, note = next_task(config, new, state)
        line += f"\n{note}" if note else ""
    placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), new, fresh)
    return (placed if fresh is state else placed._replace(opt_state=state.opt_state)), line


def _is_converted(config: Config, run: Config) -> bool:
    """Returns whether projections of a run become others that can hold any weight."""
    kind = config.model_config.projection
    return kind != run.model_config.projection and kind in IN_PARTS


def _in_parts(arrays: Any, wanted: Any) -> Any:
    """Returns a dense network's arrays in the parts of projections that hold a weight in parts."""
    if not isinstance(arrays, dict):
        return arrays
    if arrays.keys() == {"W"} and holds_a_weight(wanted):
        return arrays_of_weight(wanted, arrays["W"], wanted["B"].shape[-1])
    return {name: _in_parts(value, wanted[name]) for name, value in arrays.items()}


def _merges(config: Config, run: Config) -> bool:
    """Returns whether adapters of a run to start from become a part of the base."""
    anew = METHODS[config.method].merges and config.init_optimizer != "copied"
    return _adapters(run) != _adapters(config) or anew


def origin(config: Config) -> Config:
    """Returns the config of the run in which a run's adapters began: others continue those.

    Args:
        config: config of a run with adapters.
    """
    while config.init_from is not None:
        run = _run_there(config.init_from)
        if run is None or _merges(config, run):
            break
        config = run
    return config


def _adapters(config: Config) -> AdapterConfig | None:
    """Returns the settings of a run's adapters; None if it has none."""
    if not config.has_adapters:
        return None
    # A method may imply the kind.
    return dataclasses.replace(config.adapter, kind=config.adapter_kind)


def _merged_run(config: Config, run: Config, state: TrainState, there: TrainState) -> Any:
    """Returns the arrays of a new state, its base those of a run with everything merged."""
    where = f"config.init_from = {config.init_from!r}, a run of method {run.method!r}"
    if config.init_optimizer == "copied":
        raise TrainingError(
            f"{where}, has other adapters or projections than this run: its optimizer's state does "
            "not fit; expected config.init_optimizer = 'fresh'."
        )
    if config.model.num_layers != run.model.num_layers:
        raise TrainingError(
            f"{where}, has {run.model.num_layers} layers; expected as many for other adapters or "
            f"projections, but config.model.num_layers = {config.model.num_layers}."
        )
    try:
        model = merge(without_adapters(merge_model(run, there.params, there.fixed)))
    except ValueError as error:
        raise TrainingError(f"{where}, can't be converted: {error}") from None
    whole = joined(state.params, state.fixed)
    wanted = base_of(whole)
    found = _in_parts(nnx.to_pure_dict(nnx.state(model)), wanted)
    if jax.tree.map(jnp.shape, found) != jax.tree.map(jnp.shape, wanted):
        raise TrainingError(
            f"{where}, has projections that this run, of method {config.method!r}, does not have."
        )
    cast = jax.tree.map(lambda x, like: x.astype(like.dtype), found, wanted)
    return absorbed(config, with_base(whole, cast))


def absorbed(config: Config, arrays: Any) -> Any:
    """Returns a network's arrays, with initial adapters that are not zero subtracted from W."""
    if not config.has_adapters or not adapter_spec(config).absorbs:
        return arrays
    # The model's arrays, in their types: the graph tells which are trained.
    model = nnx.merge(nnx.graphdef(nnx.eval_shape(task_of(config).make)), arrays)
    absorb(model)
    return nnx.to_pure_dict(nnx.state(model))
