"""``python -m models.evaluate DIR SOURCE``: perplexity of a model on a text.

DIR is a run directory, or one of Hugging Face's format; SOURCE is what a run may read. All of its
documents are taken, joined by end-of-text tokens; only those that validate of the run's own source,
of one with a validation split, and with ``--split=validation``.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from loro_jax.training.data.command import add_source_options, failing_in_one_line, source_config
from loro_jax.training.data.documents import shares_text, source_parts
from loro_jax.training.data.encoding import encode_chunks
from loro_jax.training.data.parts import PartReader
from loro_jax.training.errors import TrainingError
from loro_jax.training.tokenizer import Tokenizer
from loro_jax.training.trained import load_config, load_model
from models.huggingface import CheckpointError
from models.windows import score


def read_stream(options: argparse.Namespace, tokenizer: Tokenizer) -> np.ndarray:
    """The source's documents as one stream of ids, each closed by the end-of-text id.

    Args:
        options: of the command.
        tokenizer: encodes them.

    Returns:
        Ids, (n,).

    Raises:
        TrainingError: if the source can't be read, or holds fewer than two tokens.
    """
    config = source_config(options)
    parts, held_out = source_parts(config.source, config)
    has_split = any(part.split == "validation" for part in parts)
    wanted = options.split or _default_split(options.directory, config.source, has_split)
    if has_split and wanted == "validation":
        parts = [part for part in parts if part.split == "validation"]
    reader = PartReader(parts, config.bad_documents == "skip", held_out)
    found: list[np.ndarray] = []
    total = 0
    for chunk, documents in encode_chunks(reader.chunks(), tokenizer):
        for split, ids in zip(chunk.splits, documents, strict=True):
            if wanted in ("all", split):
                found.append(ids)
                total += len(ids)
        if options.max_tokens and total >= options.max_tokens:
            break
    if total < 2:
        raise TrainingError(
            f"config.data.source = {config.source!r} has {total} tokens of --split={wanted}; "
            "expected at least two" + ("." if wanted == "all" else " (--split=all takes all).")
        )
    stream = np.concatenate(found).astype(np.int32)
    return stream[: options.max_tokens or len(stream)]


def _default_split(directory: str, source: str, has_split: bool) -> str:
    """All of files, but not what the model was trained on, where that is known."""
    if has_split or source.startswith("tfds:"):
        return "validation"
    try:
        trained_on = load_config(pathlib.Path(directory) / "config.json").data.source
    except TrainingError:  # not a run's directory
        return "all"
    return "validation" if shares_text(source, trained_on) else "all"


def main(arguments: Sequence[str]) -> int:
    """Runs the command; the exit status."""
    options = _parser().parse_args(arguments)
    return failing_in_one_line(lambda: _evaluate(options))


def _evaluate(options: argparse.Namespace) -> int:
    try:
        model, tokenizer = load_model(options.directory)
    except CheckpointError as error:
        raise TrainingError(str(error)) from None
    longest = model.config.max_sequence_length
    length = options.window or longest
    stride = options.stride or length
    if not (1 <= stride <= length <= longest):
        raise TrainingError(
            f"--window={length}, --stride={stride}: expected 1 <= stride <= window <= {longest}, "
            "the model's max_sequence_length."
        )
    for option, value, least in (
        ("--batch-size", options.batch_size, 1),
        ("--max-tokens", options.max_tokens, 0),
    ):
        if value < least:
            raise TrainingError(f"{option}={value}: expected at least {least}.")
    found = score(model, read_stream(options, tokenizer), length, stride, options.batch_size)
    row = {
        "directory": str(options.directory),
        "source": options.source,
        "tokens": found.tokens,
        "window": length,
        "stride": stride,
        "loss": found.nats / found.tokens,
        "perplexity": found.perplexity,
    }
    if options.json:
        print(json.dumps(row))
    else:
        print(
            f"perplexity {found.perplexity:.4f} (loss {row['loss']:.6f}) of {found.tokens:,} "
            f"tokens, windows of {length} every {stride}"
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="DIR")
    add_source_options(parser)
    parser.add_argument(
        "--split",
        choices=["validation", "all"],
        help="default: all of files; of the run's own source, and of official splits, validation",
    )
    parser.add_argument("--window", type=int, help="tokens; default: what the model takes")
    parser.add_argument("--stride", type=int, help="tokens; default: the window, blocks")
    parser.add_argument("--max-tokens", type=int, default=0, metavar="N", help="0: all")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N")
    parser.add_argument("--json", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
