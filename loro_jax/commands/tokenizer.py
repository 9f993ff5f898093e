"""Trains a byte-pair encoding on your own text.

The suffix of --out decides: .json is a byte-level BPE of Hugging Face's tokenizers library, .model
a SentencePiece BPE with byte fallback, like LLaMA's. Use the file as config.data.tokenizer of a
run, or in python -m loro_jax prepare.

Example:
  python -m loro_jax tokenizer embedded --vocab_size=4096 --out=novels.json
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import sys
from collections.abc import Iterator, Sequence

from loro_jax.command_line import Parser, failing_in_one_line
from loro_jax.commands.source_options import add_source_options, naming_options, source_config
from loro_jax.errors import TrainingError
from loro_jax.text.config import DataConfig
from loro_jax.text.documents import PartReader
from loro_jax.text.sources import source_parts
from loro_jax.text.tokenizers.tokenizer import load_tokenizer
from loro_jax.text.tokenizers.training import train_byte_level, train_sentencepiece


def main(arguments: Sequence[str]) -> int:
    """Runs ``python -m loro_jax tokenizer``; returns the exit status."""
    parser = Parser("python -m loro_jax tokenizer", __doc__)
    add_source_options(parser)
    parser.add_argument("--out", required=True, help="file to write: NAME.json or NAME.model")
    parser.add_argument("--vocab_size", type=int, default=32_000, help="ids, default 32000")
    parser.add_argument("--documents", type=int, help="use only the first N documents")
    # The command used to start with "train", which is not the name of any source.
    options = parser.parse_args(arguments[1:] if arguments[:1] == ["train"] else arguments)
    return failing_in_one_line(lambda: _train(options), naming_options)


def _train(options: argparse.Namespace) -> int:
    out = pathlib.Path(options.out).expanduser()
    if out.suffix not in (".json", ".model"):
        raise TrainingError(f"--out={out}: expected a name that ends in .json or .model.")
    if not out.parent.is_dir():
        raise TrainingError(f"--out={out}: there is no directory {out.parent}.")
    if options.vocab_size < 260:
        raise TrainingError(
            f"--vocab_size={options.vocab_size}: expected at least 260, for all bytes and the "
            "special tokens."
        )
    texts = training_texts(source_config(options), options.documents)
    first = next(texts, None)
    if first is None:
        raise TrainingError(f"SOURCE = {options.source!r} leaves no training document.")
    texts = itertools.chain([first], texts)
    if out.suffix == ".json":
        content = train_byte_level(texts, options.vocab_size).encode()
    else:
        content = train_sentencepiece(texts, options.vocab_size)
    temporary = out.with_name(out.name + ".tmp")
    try:
        temporary.write_bytes(content)
        # Renamed before it is loaded, because the suffix decides the format.
        temporary.replace(out)
    except OSError as error:
        raise TrainingError(f"--out={out} can't be written ({error.strerror}).") from None
    tokenizer = load_tokenizer(str(out))
    print(
        f"{out}: {tokenizer.vocab_size:,} ids, end of text {tokenizer.eos_id}, padding "
        f"{tokenizer.pad_id}"
    )
    if tokenizer.vocab_size < options.vocab_size:
        print(
            f"fewer than --vocab_size={options.vocab_size}: the text has no more pairs that occur "
            "twice",
            file=sys.stderr,
        )
    return 0


def training_texts(config: DataConfig, limit: int | None = None) -> Iterator[str]:
    """Returns the first documents of a source's training split, all of them by default."""
    parts, held_out = source_parts(config.source, config)
    training = [part for part in parts if part.split != "validation"]
    chunks = PartReader(training, config.bad_documents == "skip", held_out).chunks()
    texts = (
        text
        for chunk in chunks
        for split, text in zip(chunk.splits, chunk.texts, strict=True)
        if split == "train"
    )
    return itertools.islice(texts, limit)
