"""The parts of reading a ``config.json`` that do not depend on the network."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

from models.huggingface.errors import CheckpointError
from models.huggingface.files import check_dtype, read_json


class NetworkConfig(Protocol):
    """The config of a network, a dataclass with fields ``dtype`` and ``param_dtype``."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def validate(self) -> None:
        """Raises ValueError for an invalid field."""


C = TypeVar("C", bound=NetworkConfig)


def read_directory(
    directory: str | os.PathLike[str],
    convert: Callable[[dict[str, Any], str], C],
    stored_dtype: Callable[[pathlib.Path, C], str],
    dtype: str | None,
) -> C:
    """Reads the config of the model in a directory.

    Args:
        directory: directory with ``config.json`` and safetensors.
        convert: (content of the file, its name for messages) -> the config.
        stored_dtype: (directory, config) -> the dtype of the stored tensors.
        dtype: dtype of parameters and products; None: as stored.

    Returns:
        The config.

    Raises:
        CheckpointError: if the file is missing or damaged, or the dtype is unknown; and as
            ``convert``.
    """
    path = pathlib.Path(directory)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory.")
    config = convert(read_json(path / "config.json"), str(path / "config.json"))
    chosen = dtype or stored_dtype(path, config)
    check_dtype(chosen)
    return dataclasses.replace(config, dtype=chosen, param_dtype=chosen)


def known_fields(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that are not null, which means the default, as in transformers.

    Example:
        >>> known_fields({"model_type": "llama", "head_dim": None})
        {'model_type': 'llama'}
    """
    return {name: value for name, value in content.items() if value is not None}


def check_type(kind: Any, expected: Sequence[str], where: str) -> None:
    """Raises unless a model's type is one of those expected.

    Args:
        kind: the type; None: missing.
        expected: names of types.
        where: name of the file, for messages.

    Raises:
        CheckpointError: names the type.

    Example:
        >>> check_type("bert", ["roberta"], "config.json")
        Traceback (most recent call last):
        ...
        models.huggingface.errors.CheckpointError: config.json: model_type = 'bert'; expected \
"roberta".
    """
    if kind not in expected:
        names = " or ".join(f'"{name}"' for name in expected)
        raise CheckpointError(f"{where}: model_type = {kind!r}; expected {names}.")


def validated(config: C, where: str) -> C:
    """Returns a config that is valid.

    Raises:
        CheckpointError: for an invalid field.
    """
    try:
        config.validate()
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{where}: {error}") from None
    return config
