"""Perplexity of a model on a text.

DIR is a run directory, or a directory in Hugging Face's format; SOURCE is any source that a run can
read. All its documents are used, joined by end-of-text tokens; but only the validation documents of
the run's own source, of a source with a validation split, and with --split=validation. If the
tokenizer of a directory in Hugging Face's format adds a beginning-of-text token, each document
starts with it; it is not scored. Of prompts with answers and of chats (--format), the answers alone
are.

By default windows have the sequence length of the run's training, or 2,048 tokens for a model in
Hugging Face's format (or its maximum if that is less), and a batch has at most the tokens of a
training batch. Use longer windows only for models that were trained on longer sequences.

Example:
  python -m loro_jax evaluate runs/default embedded --window=256 --stride=128
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from loro_jax.command_line import Parser, Switch, failing_in_one_line
from loro_jax.commands.adapter_option import add_adapter, add_adapter_option
from loro_jax.commands.source_options import add_source_options, naming_options, source_config
from loro_jax.errors import TrainingError
from loro_jax.text.documents import PartReader
from loro_jax.text.encoding import encode_chunks
from loro_jax.text.marked import is_counted, plain_ids
from loro_jax.text.sources import shares_text, source_parts
from loro_jax.text.tokenizers.tokenizer import Tokenizer
from loro_jax.training.trained import load_config, load_model, run_config
from models.windows import Score, score

# Tokens of a window and of a batch of windows, for models without a run's config.
_USUAL_WINDOW = 2048
_USUAL_BATCH = 8192
_MOST_WINDOWS = 8


class Stream(NamedTuple):
    """Documents as one sequence of tokens.

    Attributes:
        ids: int32 (n,).
        counted: whether each is scored: tokens of the text or its end, bool (n,).
    """

    ids: np.ndarray
    counted: np.ndarray


def read_stream(options: argparse.Namespace, tokenizer: Tokenizer) -> Stream:
    """Reads the source's documents as one stream of ids, each ending with the end-of-text id.

    Args:
        options: the command's options.
        tokenizer: encodes them; ``adds_bos``: whether each starts with the beginning-of-text ids.

    Returns:
        The stream.

    Raises:
        TrainingError: if the source can't be read, or has fewer than two tokens.
    """
    config = source_config(options)
    # A chat's template is the tokenizer's.
    run = run_config(options.directory) if config.format == "chat" else None
    config.tokenizer = options.directory if run is None else run.data.tokenizer
    parts, held_out = source_parts(config.source, config)
    has_split = any(part.split == "validation" for part in parts)
    wanted = options.split or _default_split(options.directory, config.source, has_split)
    if has_split and wanted == "validation":
        parts = [part for part in parts if part.split == "validation"]
    reader = PartReader(parts, config.bad_documents == "skip", held_out)
    # Of records, only answers are scored, and no beginning of a text.
    begin = len(tokenizer.bos_ids) if tokenizer.adds_bos and config.format == "text" else 0
    found: list[np.ndarray] = []
    counted: list[np.ndarray] = []
    total = 0
    for chunk, documents in encode_chunks(reader.chunks(), tokenizer, bos=begin > 0):
        for split, ids in zip(chunk.splits, documents, strict=True):
            if wanted in ("all", split):
                found.append(plain_ids(ids))
                counted.append(is_counted(ids) & (np.arange(len(ids)) >= begin))
                total += len(ids)
        # A large source is read only as far as it is scored.
        if options.max_tokens and total >= options.max_tokens:
            break
    if total < 2:
        raise TrainingError(
            f"config.data.source = {config.source!r} has {total} tokens of --split={wanted}; "
            "expected at least two" + ("." if wanted == "all" else " (--split=all takes all).")
        )
    most = options.max_tokens or total
    return Stream(np.concatenate(found).astype(np.int32)[:most], np.concatenate(counted)[:most])


def _default_split(directory: str, source: str, has_split: bool) -> str:
    """Returns "all" for files, but "validation" if the model was trained on them."""
    if has_split or source.startswith("tfds:"):
        return "validation"
    try:
        trained_on = load_config(pathlib.Path(directory) / "config.json").data.source
    except TrainingError:  # not a run's directory
        return "all"
    return "validation" if shares_text(source, trained_on) else "all"


def main(arguments: Sequence[str]) -> int:
    """Runs ``python -m loro_jax evaluate``; returns the exit status."""
    options = _parser().parse_args(arguments)
    return failing_in_one_line(lambda: _evaluate(options), naming_options)


def _evaluate(options: argparse.Namespace) -> None:
    _check(options)
    model, tokenizer = load_model(options.directory)
    add_adapter(model, options.adapter, options.directory)
    if options.bos and not tokenizer.bos_ids:
        raise TrainingError("--bos: the tokenizer has no beginning-of-text token.")
    tokenizer.adds_bos = tokenizer.adds_bos if options.bos is None else options.bos
    longest = model.config.max_sequence_length
    length, stride, batch_size = _sizes(options, longest)
    if not stride <= length <= longest:
        raise TrainingError(
            f"--window={length}, --stride={stride}: expected 1 <= stride <= window <= {longest}, "
            "the model's max_sequence_length."
        )
    stream = read_stream(options, tokenizer)
    if stream.ids.max() >= model.config.vocab_size:
        raise TrainingError(
            f"{options.directory}: its tokenizer gives id {stream.ids.max()}, its model has "
            f"{model.config.vocab_size} ids."
        )
    try:
        found = score(model, stream.ids, length, stride, batch_size, stream.counted)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        # JAX has one class for all errors at run time; only the message says which one it is.
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TrainingError(
            f"--window={length}, --batch_size={batch_size}: there is not enough memory; try less."
        ) from None
    if math.isnan(found.nats):
        raise TrainingError(f"{options.directory}: the model's loss on the text is not a number.")
    _print(options, found, length, stride)


def _check(options: argparse.Namespace) -> None:
    """Raises TrainingError for numbers that are invalid for any model."""
    for option, value, least in (
        ("--window", options.window, 1),
        ("--stride", options.stride, 1),
        ("--batch_size", options.batch_size, 1),
        ("--max_tokens", options.max_tokens, 0),
    ):
        if value is not None and value < least:
            raise TrainingError(f"{option}={value}: expected at least {least}.")
    if options.max_tokens == 1:
        raise TrainingError(
            "--max_tokens=1: expected 0 (all) or at least 2, the first of which is not scored."
        )


def _print(options: argparse.Namespace, found: Score, length: int, stride: int) -> None:
    loss = found.nats / found.tokens
    if not options.json:
        print(
            f"perplexity {found.perplexity:.4f} (loss {loss:.6f}) of {found.tokens:,} tokens, "
            f"windows of {length} every {stride}"
        )
        return
    row = {
        "directory": str(options.directory),
        "source": options.source,
        "tokens": found.tokens,
        "window": length,
        "stride": stride,
        "loss": loss,
        # JSON has no infinity.
        "perplexity": found.perplexity if math.isfinite(found.perplexity) else None,
    }
    print(json.dumps(row))


def _sizes(options: argparse.Namespace, longest: int) -> tuple[int, int, int]:
    """Returns (tokens per window, stride, windows per batch), as given or by default."""
    run = run_config(options.directory)
    if run is None:
        usual, batch = min(_USUAL_WINDOW, longest), _USUAL_BATCH
    else:
        usual = run.sequence_length
        batch = usual * min(_MOST_WINDOWS, run.batch_size // run.gradient_accumulation)
    length = usual if options.window is None else options.window
    stride = length if options.stride is None else options.stride
    # Not more tokens than a training batch had, which is known to fit.
    windows = max(1, min(_MOST_WINDOWS, batch // length))
    return length, stride, windows if options.batch_size is None else options.batch_size


def _parser() -> Parser:
    parser = Parser("python -m loro_jax evaluate", __doc__)
    parser.add_argument("directory", metavar="DIR")
    add_adapter_option(parser)
    add_source_options(parser)
    parser.add_argument(
        "--split",
        choices=["validation", "all"],
        help="default: all for files; validation for the run's own source and official splits",
    )
    parser.add_argument("--window", type=int, help="tokens; default: see above")
    parser.add_argument("--stride", type=int, help="tokens; default: the window (no overlap)")
    parser.add_argument("--max_tokens", type=int, default=0, metavar="N", help="0: all")
    parser.add_argument("--batch_size", type=int, metavar="N", help="windows; default: see above")
    parser.add_argument(
        "--bos",
        action=Switch,
        help="whether documents start with the beginning-of-text token; default: as configured in "
        "the tokenizer",
    )
    parser.add_argument("--json", action="store_true")
    return parser
