"""Loading of trained models from run directories, for inference."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import typing
from typing import Any, NamedTuple

from loro_jax.errors import TrainingError
from loro_jax.text.tokenizers.tokenizer import Tokenizer, load_tokenizer
from loro_jax.training.checkpoint import read_checkpoint
from loro_jax.training.config import Config
from loro_jax.training.glue_config import GlueRun
from loro_jax.training.mesh import make_mesh
from loro_jax.training.network import without_adapters
from loro_jax.training.renamed import upgraded
from loro_jax.training.step import TrainState, abstract_state, make_program, merge_model
from loro_jax.training.tasks import check_language
from models.huggingface import read_model
from models.llama import Llama


class Trained(NamedTuple):
    """A trained model.

    Attributes:
        config: config of the run.
        step: step of the checkpoint.
        model: the model.
        tokenizer: its tokenizer.
    """

    config: Config
    step: int
    model: Llama
    tokenizer: Tokenizer


def load_run(path: str | pathlib.Path, step: int | None = None) -> Trained:
    """Loads a run's model, without disturbing a run in progress.

    Args:
        path: the run directory.
        step: step of the checkpoint; None: the last complete one.

    Returns:
        The model, on the devices of the default mesh.

    Raises:
        TrainingError: if there is no such run or checkpoint, or it is damaged.
    """
    config, chosen, state = load_state(path, step)
    check_language(config, str(path))
    # Adapters become part of the weights: what reads a model need not know of them.
    model = without_adapters(merge_model(config, state.params, state.fixed))
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.eos_id, config.data.pad_id)
    # Texts do not begin with it in training; prompts with answers do, if the tokenizer adds it.
    tokenizer.adds_bos = tokenizer.adds_bos and config.data.format == "prompt_answer"
    return Trained(config, chosen, model, tokenizer)


def load_state(path: str | pathlib.Path, step: int | None = None) -> tuple[Config, int, TrainState]:
    """Loads all of a run's training state, as :func:`load_run` does.

    Returns:
        (config of the run, step of the checkpoint, the state).
    """
    directory = pathlib.Path(path)
    config = load_config(directory / "config.json")
    checkpoints = directory / "checkpoints"
    found = checkpoint_steps(directory)
    if step is not None and step not in found:
        raise TrainingError(
            f"{checkpoints} holds no checkpoint of step {step}; expected one of "
            f"{', '.join(map(str, found))}."
        )
    chosen = found[-1] if step is None else step
    # Replicated on all current devices, whatever the run's mesh was.
    devices = make_mesh(dataclasses.replace(config.mesh, data=-1, fsdp=1, tensor=1))
    # The optimizer's state is read along: a checkpoint's checksum is over all of it.
    program = make_program(config, devices)
    try:
        state = read_checkpoint(checkpoints / str(chosen), abstract_state(program, devices))
    except Exception as error:  # damaged files raise various errors
        reason = str(error).strip().split("\n")[0][:120]
        raise TrainingError(f"{checkpoints / str(chosen)} can't be read ({reason}).") from None
    return config, chosen, state


def checkpoint_steps(path: str | pathlib.Path) -> list[int]:
    """Returns the steps of a run's complete checkpoints, in ascending order.

    Raises:
        TrainingError: if there are none.
    """
    checkpoints = pathlib.Path(path) / "checkpoints"
    # A checkpoint that is still being written has another name.
    found = sorted(int(p.name) for p in checkpoints.glob("*") if p.name.isdigit())
    if not found:
        raise TrainingError(f"{checkpoints} holds no checkpoint.")
    return found


def load_model(path: str | pathlib.Path) -> tuple[Llama, Tokenizer]:
    """Loads the model in a run directory or a directory in Hugging Face's format.

    Args:
        path: the directory.

    Returns:
        (the model, its tokenizer).

    Raises:
        TrainingError: if it is neither, can't be read, or has no tokenizer.
        CheckpointError: if it is in Hugging Face's format and damaged.
    """
    directory = pathlib.Path(path)
    content = _config_of_hugging_face(directory)
    if content is None:
        run = load_run(directory)
        return run.model, run.tokenizer
    generation = _content(directory / "generation_config.json", strict=True)
    # The first id ends documents; a chat model's further ones are often in the second file only.
    files = {"config.json": content, "generation_config.json": generation or {}}
    sources: dict[int, str] = {}
    for name, fields in files.items():
        for one in _ids(directory / name, fields):
            sources.setdefault(one, f"eos_token_id of {directory / name}")
    model, _ = read_model(directory)
    pad = content.get("pad_token_id")
    tokenizer = load_tokenizer(str(directory), eos_id=list(sources) or None, sources=sources)
    # Padding is masked, so an id that the tokenizer does not have may be ignored.
    if isinstance(pad, int) and 0 <= pad < tokenizer.vocab_size:
        tokenizer.pad_id = pad
    return model, tokenizer


def run_config(path: str | pathlib.Path) -> Config | None:
    """Loads the config of a run directory; None for a directory in Hugging Face's format.

    Args:
        path: the directory.

    Raises:
        TrainingError: if it is neither, can't be read, or is a run on GLUE.
    """
    directory = pathlib.Path(path)
    if _config_of_hugging_face(directory) is not None:
        return None
    config = load_config(directory / "config.json")
    check_language(config, str(directory))
    return config


def is_hugging_face(path: str | pathlib.Path) -> bool:
    """Returns whether a directory holds a model in Hugging Face's format, by its config."""
    return _config_of_hugging_face(pathlib.Path(path)) is not None


# Either key identifies a config.json of Hugging Face's format; a run's has neither.
_OF_HUGGING_FACE = {"model_type", "architectures"}


def _config_of_hugging_face(directory: pathlib.Path) -> dict[str, Any] | None:
    content = _content(directory / "config.json")
    return content if content is not None and _OF_HUGGING_FACE & content.keys() else None


def _content(path: pathlib.Path, strict: bool = False) -> dict[str, Any] | None:
    """Reads a JSON object; None if missing or invalid. ``strict``: raises if invalid."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        if not strict:
            return None
        raise TrainingError(f"{path} can't be read ({error}).") from None
    if isinstance(content, dict):
        return content
    if not strict:
        return None
    raise TrainingError(f"{path} can't be read (it holds no JSON object).")


def _ids(path: pathlib.Path, content: dict[str, Any]) -> list[int]:
    """Returns the end-of-text ids, possibly several; -1 and null mean none."""
    value = content.get("eos_token_id")
    found = value if isinstance(value, list) else [value]
    for one in found:
        if one is not None and type(one) is not int:
            raise TrainingError(
                f"{path}: eos_token_id = {value!r}; expected an id or a list of ids."
            )
    return [one for one in found if one is not None and one != -1]


def load_config(path: pathlib.Path) -> Config:
    """Loads the config stored in a run directory.

    Args:
        path: path of ``config.json``.

    Returns:
        The config; fields missing in files of earlier versions have their defaults.

    Raises:
        TrainingError: if the file is missing or not a run's config.
    """
    try:
        content = upgraded(json.loads(path.read_text(encoding="utf-8")))
        config: Config = _build(GlueRun if "task" in content else Config, content)
        config.validate()
    except FileNotFoundError:
        raise TrainingError(
            f"{path.parent} is not a run directory: it holds no config.json."
        ) from None
    except (OSError, ValueError, TypeError, AttributeError, TrainingError) as error:
        raise TrainingError(f"{path} can't be read as a run's config ({error}).") from None
    return config


def _build(kind: Any, content: dict[str, Any]) -> Any:
    """Builds a dataclass, and dataclasses within it, from nested dicts."""
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
