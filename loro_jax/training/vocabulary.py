"""Vocabulary size of the model, from the tokenizer's."""

from __future__ import annotations

import dataclasses
import functools

from loro_jax.errors import TrainingError
from loro_jax.text.tokenizers.tokenizer import Tokenizer, load_tokenizer
from loro_jax.training.config import Config


def resolve_vocabulary(config: Config, tokenizer: Tokenizer) -> tuple[Config, str]:
    """Sets a ``model.vocab_size`` of 0 to the tokenizer's number of ids, rounded up.

    It becomes a multiple of ``data.vocab_multiple``. The additional ids are never targets.

    Args:
        config: the run's config.
        tokenizer: the run's tokenizer.

    Returns:
        (the resolved config, a line that describes both vocabularies).

    Raises:
        TrainingError: if the tokenizer has more ids than the model.

    Example:
        >>> from loro_jax.text.tokenizers.tokenizer import ByteTokenizer
        >>> config = Config()
        >>> config.model.vocab_size = 0
        >>> resolve_vocabulary(config, ByteTokenizer())[1]
        'tokenizer: 259 ids, end of text 1, padding 0; model: 384 ids (a multiple of 128)'
    """
    wanted, own = config.model.vocab_size, tokenizer.vocab_size
    multiple = config.data.vocab_multiple
    # Matrix units work on tiles: a round number of rows fills them, and can be sharded.
    size = wanted or -(-own // multiple) * multiple
    if own > size:
        raise TrainingError(
            f"config.model.vocab_size = {size} is smaller than the vocabulary of "
            f"config.data.tokenizer = {config.data.tokenizer!r}, which has {own} ids "
            "(0: that number, rounded up)."
        )
    line = (
        f"tokenizer: {own:,} ids, end of text {tokenizer.eos_id}, padding {tokenizer.pad_id}; "
        f"model: {size:,} ids" + ("" if wanted else f" (a multiple of {multiple})")
    )
    model = dataclasses.replace(config.model, vocab_size=size)
    return dataclasses.replace(config, model=model), line


def with_vocabulary(config: Config) -> Config:
    """Returns a config with a ``model.vocab_size`` of 0 set from the tokenizer that it names.

    Raises:
        TrainingError: for a tokenizer that can't be read.
    """
    if config.model.vocab_size:
        return config  # the tokenizer need not be read
    data = config.data
    return resolve_vocabulary(config, _tokenizer(data.tokenizer, data.eos_id, data.pad_id))[0]


# The arms of a comparison mostly share one.
_tokenizer = functools.lru_cache(maxsize=4)(load_tokenizer)
