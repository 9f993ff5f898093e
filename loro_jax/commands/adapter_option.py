"""The option ``--adapter`` of commands that read a model."""

from __future__ import annotations

import argparse
import os
import sys

from models.huggingface.adapter_configs import note_of_base
from models.huggingface.adapter_reading import merge_stored_adapter
from models.llama import Llama


def add_adapter_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--adapter`` to a parser."""
    parser.add_argument(
        "--adapter",
        metavar="ADAPTER",
        help="an adapter in PEFT's format, which is added to the model in DIR",
    )


def add_adapter(model: Llama, adapter: str | None, directory: str | os.PathLike[str]) -> None:
    """Adds the change of an adapter to a model, in place; nothing without one.

    Prints a note on standard error if the adapter names another base.

    Args:
        model: the model.
        adapter: the adapter's directory.
        directory: the model's.

    Raises:
        CheckpointError: if the adapter can't be read, or does not fit the model.
    """
    if adapter is None:
        return
    note = note_of_base(merge_stored_adapter(model, adapter), str(directory))
    if note is not None:
        print(note, file=sys.stderr)
