"""Options shared by the commands that read a source."""

from __future__ import annotations

import argparse

from loro_jax.text.config import DataConfig

# Options by the names of the config's fields.
_FIELDS = (
    *("validation", "text_field", "text_files", "bad_documents", "data_dir"),
    *("format", "prompt_field", "answer_field", "separator", "messages_field", "chat_template"),
)


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Adds SOURCE and the options for reading it."""
    default = DataConfig()
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help='"embedded", tfds:NAME, or a glob of .txt, .jsonl or .parquet files (quoted)',
    )
    parser.add_argument("--validation", help="a glob of files for validation instead")
    parser.add_argument("--text_field", default=default.text_field)
    parser.add_argument(
        "--format",
        default=default.format,
        choices=["text", "prompt_answer", "chat"],
        help="content of a record; of the last two, answers alone are scored",
    )
    for name in ("prompt_field", "answer_field", "separator", "messages_field", "chat_template"):
        parser.add_argument(
            f"--{name}", default=getattr(default, name), help=f"as config.data.{name}"
        )
    parser.add_argument(
        "--text_files", default=default.text_files, choices=["paragraphs", "documents"]
    )
    parser.add_argument("--bad_documents", default=default.bad_documents, choices=["stop", "skip"])
    parser.add_argument("--data_dir", help="directory of tensorflow-datasets")


def source_config(options: argparse.Namespace) -> DataConfig:
    """Returns the options as the data group of a run's config."""
    return DataConfig(
        source=options.source, **{field: getattr(options, field) for field in _FIELDS}
    )


def naming_options(message: str) -> str:
    """Rewrites a message to name options instead of the config's fields.

    Example:
        >>> naming_options("config.data.source = 'a' and config.data.tokenizer = 'b'")
        "SOURCE = 'a' and --tokenizer = 'b'"
    """
    return message.replace("config.data.source", "SOURCE").replace("config.data.", "--")
