"""Tokenizers as a ``tokenizer.json``, the format that serving programs read."""

from __future__ import annotations

import json
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from loro_jax.training.errors import TrainingError

_SPACE = "\u2581"  # SentencePiece's mark of a space
_SPACES = Regex(" {2,}")
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def from_sentencepiece(model: bytes) -> tokenizers.Tokenizer:
    """A SentencePiece model, BPE or unigram, as a tokenizer of the tokenizers library.

    Args:
        model: contents of the ``.model`` file.

    Returns:
        A tokenizer that gives the same ids and has the control pieces as special tokens.

    Raises:
        TrainingError: for another kind of model (words, characters).

    Example:
        >>> import importlib.resources
        >>> path = importlib.resources.files("loro_jax.training") / "corpus" / "tokenizer.model"
        >>> tokenizer = from_sentencepiece(path.read_bytes())
        >>> tokenizer.encode("Call me Ishmael.").tokens[:2]
        ['▁C', 'all']
    """
    # Here, because only an export needs protobuf's machinery.
    from sentencepiece import sentencepiece_model_pb2

    message: Any = sentencepiece_model_pb2
    proto = message.ModelProto.FromString(model)
    kind, rules, piece = proto.trainer_spec, proto.normalizer_spec, message.ModelProto.SentencePiece
    vocabulary = [(one.piece, one.score) for one in proto.pieces]
    unknown = kind.unk_id
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(_SPACES, " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    if kind.model_type == kind.UNIGRAM:
        core: Any = models.Unigram(vocabulary, unknown, kind.byte_fallback)
    elif kind.model_type == kind.BPE:
        normal = {one.piece for one in proto.pieces if one.type == piece.NORMAL}
        core = models.BPE(
            vocab={name: i for i, (name, _) in enumerate(vocabulary)},
            merges=_merges(vocabulary, normal),
            unk_token=vocabulary[unknown][0],
            fuse_unk=True,
            byte_fallback=kind.byte_fallback,
        )
    else:
        raise TrainingError(
            "tokenizer.json: expected a SentencePiece model of kind BPE or UNIGRAM, but it is "
            f"{kind.ModelType.Name(kind.model_type)}."
        )
    tokenizer = tokenizers.Tokenizer(core)
    tokenizer.normalizer = normalizers.Sequence(steps)
    if kind.model_type == kind.UNIGRAM:
        # Words one by one: no piece of a unigram model reaches over a space, and the search for
        # the best pieces is quadratic in the text otherwise.
        tokenizer.pre_tokenizer = pre_tokenizers.Split(_SPACE, "merged_with_next")
    prefix = [decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *prefix]
    )
    special = [one.piece for one in proto.pieces if one.type in (piece.CONTROL, piece.UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    own = [one.piece for one in proto.pieces if one.type == piece.USER_DEFINED]
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in own])
    return tokenizer


def _merges(vocabulary: list[tuple[str, float]], normal: set[str]) -> list[tuple[str, str]]:
    """Pairs of pieces, in the order in which SentencePiece joins them: by the score of the join."""
    ids = {name: i for i, (name, _) in enumerate(vocabulary)}
    found = []
    for name, score in vocabulary:
        if name not in normal:
            continue
        cuts = ((name[:cut], name[cut:]) for cut in range(1, len(name)))
        pairs = [pair for pair in cuts if pair[0] in normal and pair[1] in normal]
        found += [(-score, ids[left], ids[right], left, right) for left, right in pairs]
    return [(left, right) for *_, left, right in sorted(found)]


def from_bytes() -> tokenizers.Tokenizer:
    """:class:`loro_jax.training.tokenizer.ByteTokenizer` as a tokenizer of the tokenizers library.

    Every character is unknown and falls back to its bytes.

    Example:
        >>> from_bytes().encode("Hi").ids
        [75, 108]
    """
    special = ["<pad>", "</s>", "<unk>"]
    vocabulary = {name: i for i, name in enumerate([*special, *_BYTES])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    return tokenizer


def tokenizer_files(
    tokenizer: tokenizers.Tokenizer,
    eos_id: int,
    pad_id: int,
    bos_id: int | None = None,
    adds_bos: bool = False,
) -> dict[str, bytes]:
    """What a directory needs beside a model so that its text can be encoded.

    Where no token begins a text, the one that ends it is named as such, for programs that ask for
    one: a document begins after the end of the one before. It is not put before texts.

    Args:
        tokenizer: the tokenizer.
        eos_id: the id that ends a text.
        pad_id: the id that fills up a batch.
        bos_id: the id that begins a text; None: none does.
        adds_bos: whether texts are begun with it.

    Returns:
        Contents by file name: ``tokenizer.json`` and ``tokenizer_config.json``.
    """
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.id_to_token(eos_id),
        "pad_token": tokenizer.id_to_token(pad_id),
        "add_bos_token": adds_bos,
        "clean_up_tokenization_spaces": False,
        # Transformers 4 would add token_type_ids, which no LLaMA takes.
        "model_input_names": ["input_ids", "attention_mask"],
        "bos_token": tokenizer.id_to_token(eos_id),
    }
    if bos_id is not None:
        config["bos_token"] = begin = tokenizer.id_to_token(bos_id)
        if adds_bos and tokenizer.post_processor is None:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{begin} $A", special_tokens=[(begin, bos_id)]
            )
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
    }
