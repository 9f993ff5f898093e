"""Byte-pair encodings trained on one's own text.

By the suffix of the file to write: ``.json`` is a byte-level BPE of Hugging Face's tokenizers
library, ``.model`` a SentencePiece BPE that falls back to bytes, as LLaMA's. Both leave the text as
it is, split numbers into digits, and have padding 0 and end of text 1.
"""

from __future__ import annotations

import argparse
import io
import itertools
import pathlib
import sys
from collections.abc import Iterator

import sentencepiece
import tokenizers

from loro_jax.commands.source_options import add_source_options, failing_in_one_line, source_config
from loro_jax.errors import TrainingError
from loro_jax.text.config import DataConfig
from loro_jax.text.documents import PartReader
from loro_jax.text.sources import source_parts
from loro_jax.text.tokenizers.tokenizer import load_tokenizer

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"


def training_texts(config: DataConfig, limit: int | None = None) -> Iterator[str]:
    """The first documents of a source's training split (all of them by default)."""
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


def train_byte_level(texts: Iterator[str], vocab_size: int) -> str:
    """Trains a byte-level BPE.

    Args:
        texts: documents.
        vocab_size: ids, at least 258: the bytes and two special tokens.

    Returns:
        The content of its ``tokenizer.json``; it has fewer ids where the texts have no more pairs.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str(pretty=True)


def train_sentencepiece(texts: Iterator[str], vocab_size: int) -> bytes:
    """Trains a SentencePiece BPE with fallback to bytes.

    Args:
        texts: documents; the whole of them is held in memory.
        vocab_size: ids, at least 260 and the characters of the texts.

    Returns:
        The content of its ``.model`` file.

    Raises:
        TrainingError: if the texts do not allow for as many ids, or need more.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            # Line feeds become bytes: SentencePiece reads a line at a time.
            sentence_iterator=(line for text in texts for line in text.split("\n") if line),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            character_coverage=0.9999,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            max_sentence_length=1 << 20,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).split("] ")[-1].strip()
        raise TrainingError(f"--vocab_size={vocab_size} does not suit the text: {reason}") from None
    return model.getvalue()


def main(arguments: list[str]) -> int:
    """``python -m loro_jax.training.tokenizer train SOURCE --out=FILE``."""
    parser = argparse.ArgumentParser(prog="python -m loro_jax.training.tokenizer")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a byte-pair encoding on one's own text")
    add_source_options(train)
    train.add_argument("--out", required=True, help="file to write: NAME.json or NAME.model")
    train.add_argument("--vocab_size", type=int, default=32_000, help="ids, default 32000")
    train.add_argument("--documents", type=int, help="use the first so many documents alone")
    options = parser.parse_args(arguments)
    return failing_in_one_line(lambda: _train(options))


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
        # Named as it will be, for the suffix tells the formats apart.
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
