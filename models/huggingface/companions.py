"""What goes with a model and is neither its network nor its tensors: token ids and a tokenizer."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from models.huggingface.errors import CheckpointError
from models.huggingface.files import read_json

GENERATION = "generation_config.json"
TokenIds = Mapping[str, int | list[int] | None]

_TOKENIZER_FILES = (
    "tokenizer*",
    "*.model",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
)
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_companions(directory: pathlib.Path) -> dict[str, bytes]:
    """The files of a directory that go with its model into another.

    Args:
        directory: of Hugging Face's format.

    Returns:
        Contents by name: a tokenizer's, chat templates and ``generation_config.json``, as they are.
        Folders that are named like such a file are no part of them.

    Raises:
        CheckpointError: if one can't be read, or ``generation_config.json`` holds no JSON object.
    """
    paths = [
        path for pattern in (*_TOKENIZER_FILES, GENERATION) for path in directory.glob(pattern)
    ]
    found: dict[str, bytes] = {}
    for path in sorted(set(paths)):
        if not path.is_file():
            continue
        if path.name == GENERATION:
            read_json(path)  # raises where it is damaged: it may hold ids that end a text
        try:
            found[path.relative_to(directory).as_posix()] = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path} can't be read ({error.strerror}).") from None
    return found


def read_token_ids(content: Mapping[str, Any], where: str) -> dict[str, int | list[int] | None]:
    """The ids of special tokens in a ``config.json``.

    Args:
        content: of the file.
        where: the file, for messages.

    Returns:
        ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``, those that are there, as they are;
        None for a padding id of -1, as the first LLaMA checkpoints say that there is none; 1 as
        the first id where only the last is said, as in transformers.

    Raises:
        CheckpointError: for anything but whole numbers, a list of them, or null.

    Example:
        >>> read_token_ids({"eos_token_id": [2, 3], "pad_token_id": -1}, "config.json")
        {'eos_token_id': [2, 3], 'pad_token_id': None, 'bos_token_id': 1}
    """
    found: dict[str, int | list[int] | None] = {}
    for name in _IDS:
        if name not in content:
            continue
        value = content[name]
        several = name == "eos_token_id" and isinstance(value, list)
        for one in value if several else [value]:
            if one is not None and (not isinstance(one, int) or isinstance(one, bool)):
                raise CheckpointError(f"{where}: {name} = {value!r}; expected a token id.")
        found[name] = None if value == -1 else value
    if "eos_token_id" in found:
        found.setdefault("bos_token_id", 1)
    return found


def complete_ids(token_ids: TokenIds | None) -> dict[str, int | list[int] | None]:
    """Ids of special tokens for ``config.json``, with one that begins a text.

    Args:
        token_ids: ``eos_token_id`` and others; None: nothing is known of them.

    Returns:
        The same; where nothing says what begins a text, the id that ends one does, because a
        document begins after the end of the one before. (Programs would take LLaMA's id 1.)

    Example:
        >>> complete_ids({"eos_token_id": [7, 9]})
        {'bos_token_id': 7, 'eos_token_id': [7, 9]}
    """
    ids = dict(token_ids or {})
    eos = ids.get("eos_token_id")
    first = eos[0] if isinstance(eos, list) and eos else eos
    if "bos_token_id" in ids or not isinstance(first, int):
        return ids
    return {"bos_token_id": first, **ids}


def generation_config(ids: TokenIds) -> bytes:
    """A ``generation_config.json`` that says how a text begins and ends, and no more.

    Example:
        >>> json.loads(generation_config({"eos_token_id": 2, "pad_token_id": None}))
        {'eos_token_id': 2}
    """
    content = {name: value for name, value in ids.items() if value is not None}
    return (json.dumps(content, indent=2) + "\n").encode()
