"""The teacher of a run's distillation: a model in Hugging Face's format, or another run's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from loro_jax.errors import TrainingError
from loro_jax.layers import merge
from loro_jax.memory import count_bytes, count_parameters
from loro_jax.training.config import Config
from loro_jax.training.distillation import abstract_teacher
from loro_jax.training.mesh import tree_shardings
from loro_jax.training.trained import load_run, run_config
from models.huggingface import CheckpointError, check_parameters, read_config, read_parameters

# Fields that the hidden states depend on; the head is not used.
_ARCHITECTURE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "kv_heads",
    "head_size",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
)


def check_teacher(config: Config) -> None:
    """Raises TrainingError unless a run's teacher can be read and has the run's architecture.

    Args:
        config: the run's config, with a vocabulary. Without a teacher nothing is checked.
    """
    source, wanted = config.distillation.teacher, abstract_teacher(config)
    if source is None or wanted is None:
        return
    try:
        run = run_config(source)
        there = read_config(source) if run is None else run.model
    except (CheckpointError, TrainingError) as error:
        raise TrainingError(f"config.distillation.teacher: {error}") from None
    for name in _ARCHITECTURE:
        found, own = getattr(there, name), getattr(config.model, name)
        if found != own:
            raise TrainingError(
                f"config.distillation.teacher = {source!r} has {name} = {found}; expected that of "
                f"this run, {own}."
            )
    if run is not None:
        return
    try:
        check_parameters(source, nnx.to_pure_dict(nnx.state(wanted)))
    except CheckpointError as error:
        raise TrainingError(f"config.distillation.teacher: {error}") from None


def load_teacher(config: Config, mesh: jax.sharding.Mesh) -> tuple[tuple[Any, ...], list[str]]:
    """Loads the parameters of a run's teacher, in the run's dtype, on its devices.

    Args:
        config: the run's config, checked by :func:`check_teacher`.
        mesh: the devices, over which the teacher is sharded as a dense model is.

    Returns:
        (further arguments of a training step: the parameters, or none; lines about them).

    Raises:
        TrainingError: if the teacher can't be read, or is a run that can't be made dense.
    """
    source, abstract = config.distillation.teacher, abstract_teacher(config)
    if source is None or abstract is None:
        return (), []
    wanted = nnx.to_pure_dict(nnx.state(abstract))
    try:
        found = (
            _of_run(source, wanted) if run_config(source) else read_parameters(source, wanted)[0]
        )
    except (CheckpointError, TrainingError) as error:
        raise TrainingError(f"config.distillation.teacher: {error}") from None
    # Placed leaf by leaf, so that no device holds the whole teacher if it is sharded.
    placed = jax.tree.map(
        lambda x, like, sharding: jax.device_put(x.astype(like.dtype), sharding),
        found,
        wanted,
        tree_shardings(mesh, wanted),
    )
    line = (
        f"distilled from {source}: {count_parameters(placed) / 1e6:.2f}M parameters without its "
        f"head, {count_bytes(placed) / 1e6:.1f} MB beside the model"
    )
    return (placed,), [line]


def _of_run(source: str, wanted: dict[str, Any]) -> dict[str, Any]:
    """Returns the parameters of a run's model, with dense projections and without its head."""
    try:
        model = merge(load_run(source).model)
    except ValueError as error:
        raise TrainingError(f"{source} can't be made dense: {error}") from None
    found = nnx.to_pure_dict(nnx.state(model))
    found = {name: value for name, value in found.items() if name in wanted}
    if jax.tree.map(jnp.shape, found) != jax.tree.map(jnp.shape, wanted):
        raise TrainingError(f"{source} is no dense LLaMA, nor can its projections be merged.")
    return found
