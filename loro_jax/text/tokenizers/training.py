"""Byte-pair encodings trained on your own text.

The suffix of the output file decides: ``.json`` is a byte-level BPE of Hugging Face's tokenizers
library, ``.model`` a SentencePiece BPE with byte fallback, like LLaMA's. Neither normalises text;
both split numbers into digits, and have padding id 0 and end-of-text id 1.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import sentencepiece
import tokenizers

from loro_jax.errors import TrainingError

PAD, EOS = "<pad>", "</s>"


def train_byte_level(texts: Iterator[str], vocab_size: int) -> str:
    """Trains a byte-level BPE.

    Args:
        texts: documents.
        vocab_size: number of ids, at least 258: the bytes and two special tokens.

    Returns:
        Content of its ``tokenizer.json``, with fewer ids if the texts have too few pairs.
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
        # All bytes, also those that the text lacks: no later text has unknown tokens.
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str(pretty=True)


def train_sentencepiece(texts: Iterator[str], vocab_size: int) -> bytes:
    """Trains a SentencePiece BPE with byte fallback.

    Args:
        texts: documents, all held in memory.
        vocab_size: number of ids, at least 260 plus the characters of the texts.

    Returns:
        Content of its ``.model`` file.

    Raises:
        TrainingError: if the vocabulary size is too large or too small for the texts.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            # SentencePiece reads line by line; line feeds are encoded as bytes.
            sentence_iterator=(line for text in texts for line in text.split("\n") if line),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            # The rarest characters get no piece: they are encoded as bytes.
            character_coverage=0.9999,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            # SentencePiece skips longer lines; its default is a few thousand bytes.
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
