"""What a run directory holds, for those who use the model and do not train it."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import typing
from typing import Any, NamedTuple

from loro_jax.training.checkpoint import read_checkpoint
from loro_jax.training.config import Config
from loro_jax.training.errors import TrainingError
from loro_jax.training.mesh import make_mesh
from loro_jax.training.step import abstract_state, make_program, merge_model
from loro_jax.training.tokenizer import Tokenizer, load_tokenizer
from models.huggingface import read_model
from models.llama import Llama


class Trained(NamedTuple):
    """A model that a run has made.

    Attributes:
        config: of the run.
        step: of the checkpoint.
        model: the model.
        tokenizer: its tokenizer.
    """

    config: Config
    step: int
    model: Llama
    tokenizer: Tokenizer


def load_run(path: str | pathlib.Path, step: int | None = None) -> Trained:
    """Reads a run's model; a run that is under way is not disturbed.

    Args:
        path: the run directory.
        step: of the checkpoint; None: the last one that is complete.

    Returns:
        The model, on the devices of the default mesh.

    Raises:
        TrainingError: if there is no such run or checkpoint, or it is damaged.
    """
    directory = pathlib.Path(path)
    config = load_config(directory / "config.json")
    checkpoints = directory / "checkpoints"
    found = sorted(int(p.name) for p in checkpoints.glob("*") if p.name.isdigit())
    if not found:
        raise TrainingError(f"{checkpoints} holds no checkpoint.")
    if step is not None and step not in found:
        raise TrainingError(
            f"{checkpoints} holds no checkpoint of step {step}; expected one of "
            f"{', '.join(map(str, found))}."
        )
    chosen = found[-1] if step is None else step
    # All devices of now hold all of it, whatever the run's mesh was.
    devices = make_mesh(dataclasses.replace(config.mesh, data=-1, fsdp=1, tensor=1))
    program = make_program(config, devices)
    try:
        state = read_checkpoint(checkpoints / str(chosen), abstract_state(program, devices))
    except Exception as error:  # what a damaged file raises depends on the file
        reason = str(error).strip().split("\n")[0][:120]
        raise TrainingError(f"{checkpoints / str(chosen)} can't be read ({reason}).") from None
    model = merge_model(config, state.params, state.fixed)
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.eos_id, config.data.pad_id)
    return Trained(config, chosen, model, tokenizer)


def load_model(path: str | pathlib.Path) -> tuple[Llama, Tokenizer]:
    """The model in a run directory, or in one of Hugging Face's format.

    Args:
        path: the directory.

    Returns:
        (the model, its tokenizer).

    Raises:
        TrainingError: if it is neither, or can't be read, or has no tokenizer.
        CheckpointError: if it is of Hugging Face's format and damaged.
    """
    directory = pathlib.Path(path)
    try:
        content = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or "model_type" not in content:
        run = load_run(directory)
        return run.model, run.tokenizer
    eos, pad = (content.get(f"{name}_token_id") for name in ("eos", "pad"))
    if isinstance(eos, list):  # some models have several; the first is the usual one
        eos = eos[0]
    model, _ = read_model(directory)
    pad = None if pad == -1 else pad  # how the first LLaMA checkpoints say that there is none
    tokenizer = load_tokenizer(str(directory), eos_id=eos, pad_id=pad)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise TrainingError(
            f"{directory}: its tokenizer has {tokenizer.vocab_size} ids, its model "
            f"{model.config.vocab_size}."
        )
    return model, tokenizer


def load_config(path: pathlib.Path) -> Config:
    """The config that a run has stored.

    Args:
        path: its ``config.json``.

    Returns:
        The config; fields that an earlier version did not have are at their defaults.

    Raises:
        TrainingError: if the file is missing or no run's config.
    """
    try:
        return _build(Config, json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise TrainingError(
            f"{path.parent} is no run directory: it holds no config.json."
        ) from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise TrainingError(f"{path} can't be read as a run's config ({error}).") from None


def _build(kind: Any, content: dict[str, Any]) -> Any:
    """A dataclass, with those in it, from nested dicts."""
    types = typing.get_type_hints(kind)
    unknown = content.keys() - types.keys()
    if unknown:
        raise ValueError(f"unknown field {min(unknown)}")
    return kind(
        **{
            name: _build(types[name], value) if dataclasses.is_dataclass(types[name]) else value
            for name, value in content.items()
        }
    )
