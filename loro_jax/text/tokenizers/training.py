"""Byte-pair encodings trained on your own text.

By the suffix of the file to write: ``.json`` is a byte-level BPE of Hugging Face's tokenizers
library, ``.model`` a SentencePiece BPE that falls back to bytes, as LLaMA's. Both leave the text as
it is, split numbers into digits, and have padding 0 and end of text 1.
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
