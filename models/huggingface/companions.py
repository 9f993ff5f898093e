"""Companion files of a model: its tokenizer, and the ids of special tokens."""

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
    """Reads the files that are copied along with a model.

    Args:
        directory: directory in Hugging Face's format.

    Returns:
        Contents by file name, unchanged: the tokenizer's files, chat templates and
        ``generation_config.json``. Folders with such a name are skipped.

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
            read_json(path)  # raises if damaged: it may hold ids that end a text
        try:
            found[path.relative_to(directory).as_posix()] = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path} can't be read ({error.strerror}).") from None
    return found


def read_token_ids(content: Mapping[str, Any], where: str) -> dict[str, int | list[int] | None]:
    """Reads the ids of special tokens from a ``config.json``.

    Args:
        content: content of the file.
        where: name of the file, for messages.

    Returns:
        Those of ``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` that are present. An id of
        -1 becomes None: the first LLaMA checkpoints use it for "no padding". A missing
        ``bos_token_id`` becomes 1 if there is an ``eos_token_id``, as in transformers.

    Raises:
        CheckpointError: for anything but an integer, a list of integers, or null.

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
    """Completes ids of special tokens for ``config.json`` with the one that begins a text.

    Args:
        token_ids: ``eos_token_id`` and others; None: unknown.

    Returns:
        The ids. A missing ``bos_token_id`` becomes the first ``eos_token_id``, because in training
        a document follows the end of the previous one. (Other programs would assume LLaMA's 1.)

    Example:
        >>> complete_ids({"eos_token_id": [7, 9]})
        {'bos_token_id': 7, 'eos_token_id': [7, 9]}
    """
    # An explicit None stays: it says that there is no such token.
    ids = dict(token_ids or {})
    eos = ids.get("eos_token_id")
    first = eos[0] if isinstance(eos, list) and eos else eos
    if "bos_token_id" in ids or not isinstance(first, int):
        return ids
    return {"bos_token_id": first, **ids}


def generation_config(ids: TokenIds) -> bytes:
    """Returns a ``generation_config.json`` that holds the ids of special tokens alone.

    Example:
        >>> json.loads(generation_config({"eos_token_id": 2, "pad_token_id": None}))
        {'eos_token_id': 2}
    """
    content = {name: value for name, value in ids.items() if value is not None}
    return (json.dumps(content, indent=2) + "\n").encode()
