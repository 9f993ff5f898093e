"""Conversion of tokenizers to ``tokenizer.json``, the format that serving programs read."""

from __future__ import annotations

import collections
import json
from collections.abc import Container, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from loro_jax.errors import TrainingError
from loro_jax.text.tokenizers.sentencepiece_probes import check_conversion
from loro_jax.text.tokenizers.sentencepiece_rules import (
    SOME_TEXT,
    any_of,
    mark_steps,
    space_steps,
    table_steps,
)

_SPACE = "\u2581"  # SentencePiece's symbol for a space
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def from_sentencepiece(model: bytes) -> tokenizers.Tokenizer:
    """Converts a SentencePiece model, BPE or unigram, to a tokenizer of the tokenizers library.

    Args:
        model: contents of the ``.model`` file.

    Returns:
        A tokenizer with the same ids, and control pieces as special tokens. For a unigram model,
        whose scores SentencePiece adds in single precision over the whole text, the ids of a long
        text may differ where two segmentations are equally good up to rounding.

    Raises:
        TrainingError: for another kind of model (words, characters), or one with options that the
            format can't express.

    Example:
        >>> import importlib.resources
        >>> path = importlib.resources.files("loro_jax.text") / "corpus" / "tokenizer.model"
        >>> tokenizer = from_sentencepiece(path.read_bytes())
        >>> tokenizer.encode("Call me Ishmael.").tokens[:2]
        ['▁C', 'all']
    """
    # Imported here, because only an export needs protobuf.
    from sentencepiece import sentencepiece_model_pb2

    message: Any = sentencepiece_model_pb2
    proto = message.ModelProto.FromString(model)
    kind, piece = proto.trainer_spec, message.ModelProto.SentencePiece
    pieces = {
        name: [one.piece for one in proto.pieces if one.type == getattr(piece, name)]
        for name in ("NORMAL", "CONTROL", "UNKNOWN", "USER_DEFINED", "BYTE", "UNUSED")
    }
    if pieces["UNUSED"]:
        raise TrainingError(
            "tokenizer.json: the SentencePiece model has pieces of type UNUSED, such as "
            f"{pieces['UNUSED'][0]!r}, which the format can't express."
        )
    scored = _scores(proto, piece) if kind.model_type == kind.UNIGRAM else None
    if scored is not None:
        core: Any = models.Unigram(scored, kind.unk_id, kind.byte_fallback)
    elif kind.model_type == kind.BPE:
        vocabulary = [(one.piece, one.score) for one in proto.pieces]
        core = models.BPE(
            vocab={name: i for i, (name, _) in enumerate(vocabulary)},
            merges=_merges(vocabulary, set(pieces["NORMAL"])),
            unk_token=vocabulary[kind.unk_id][0],
            # SentencePiece, too, makes one unknown token of a run of unknown characters.
            fuse_unk=True,
            byte_fallback=kind.byte_fallback,
            # User-defined symbols, which are cut out of the text, can't be built by merges.
            ignore_merges=bool(pieces["USER_DEFINED"]),
        )
    else:
        raise TrainingError(
            "tokenizer.json: expected a SentencePiece model of kind BPE or UNIGRAM, but it is "
            f"{kind.ModelType.Name(kind.model_type)}."
        )
    tokenizer = tokenizers.Tokenizer(core)
    steps = _normalizers(proto, pieces["USER_DEFINED"])
    tokenizer.normalizer = normalizers.Sequence(steps) if steps else None
    splits = _splits(pieces, scored is not None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits) if splits else None
    tokenizer.decoder = _decoder(proto)
    special = [one.piece for one in proto.pieces if one.type in (piece.CONTROL, piece.UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    # Other kinds get distinct scores, so that they never tie with another piece.
    words = (piece.NORMAL, piece.USER_DEFINED)
    scores = (
        None
        if scored is None
        else [
            score if one.type in words else 1e6 + i
            for i, (one, (_, score)) in enumerate(zip(proto.pieces, scored, strict=True))
        ]
    )
    # The two libraries differ in details that no specification lists: an unequal result is refused.
    check_conversion(model, proto, tokenizer, scores)
    return tokenizer


def with_control_pieces(model: bytes, ids: Sequence[int]) -> bytes:
    """Returns a SentencePiece model in which some pieces can't come from a text.

    Args:
        model: contents of the ``.model`` file.
        ids: ids of these pieces; user-defined symbols among them become control pieces.

    Returns:
        The model; unchanged if there are none.
    """
    # Imported here, because few models need protobuf.
    from sentencepiece import sentencepiece_model_pb2

    message: Any = sentencepiece_model_pb2
    proto = message.ModelProto.FromString(model)
    pieces = [proto.pieces[i] for i in ids if 0 <= i < len(proto.pieces)]
    symbols = [one for one in pieces if one.type == one.USER_DEFINED]
    for one in symbols:
        one.type = one.CONTROL
    return proto.SerializeToString() if symbols else model


# Added tokens beyond the vocabulary that are plausible.
_MOST_ADDED = 100_000


def with_added_pieces(model: bytes, added: Mapping[str, int], special: Container[str]) -> bytes:
    """Returns a SentencePiece model with the tokens that were added after its training.

    Args:
        model: contents of the ``.model`` file.
        added: ids of the tokens by their text; those within the vocabulary are part of it already.
        special: which of them can't come from a text (control pieces); others are user-defined
            symbols, which always become one id.

    Returns:
        The model; unchanged if there are none. Ids between are control pieces without a use.

    Raises:
        TrainingError: for an id far beyond the vocabulary.
    """
    # Imported here, because few models need protobuf.
    from sentencepiece import sentencepiece_model_pb2

    message: Any = sentencepiece_model_pb2
    proto = message.ModelProto.FromString(model)
    size, known = len(proto.pieces), {one.piece for one in proto.pieces}
    names = {i: token for token, i in added.items() if i >= size and token not in known}
    if not names:
        return model
    if max(names) >= size + _MOST_ADDED:
        raise TrainingError(
            f"the added token {names[max(names)]!r} has the id {max(names)}, but the vocabulary "
            f"has {size} ids; expected at most {_MOST_ADDED:,} more."
        )
    control, symbol = (
        getattr(message.ModelProto.SentencePiece, kind) for kind in ("CONTROL", "USER_DEFINED")
    )
    for i in range(size, max(names) + 1):
        name = names.get(i, f"<unused {i}>")
        if i not in names or name in special:
            proto.pieces.add(piece=name, score=0.0, type=control)
        else:  # matched in a text whose spaces have been replaced
            proto.pieces.add(piece=name.replace(" ", _SPACE), score=0.0, type=symbol)
    return proto.SerializeToString()


def _scores(proto: Any, piece: Any) -> list[tuple[str, float]]:
    """Returns pieces with their scores; other than normal pieces get a score by their kind."""
    # Other pieces must not be found in a text (see _splits), so any low score will do.
    worst = min((one.score for one in proto.pieces if one.type == piece.NORMAL), default=0.0)
    found = []
    for one in proto.pieces:
        score = one.score if one.type == piece.NORMAL else worst
        if one.type == piece.USER_DEFINED:  # above all log probabilities, by its number of bytes
            score = 0.1 * (len(one.piece.encode()) - 1)
        found.append((one.piece, score))
    return found


def _merges(vocabulary: list[tuple[str, float]], normal: set[str]) -> list[tuple[str, str]]:
    """Returns the merges in SentencePiece's order, by the score of the merged piece."""
    ids = {name: i for i, (name, _) in enumerate(vocabulary)}
    found = []
    for name, score in vocabulary:
        if name not in normal:
            continue
        # SentencePiece joins any two pieces whose joined text is a piece: every cut is a merge.
        cuts = ((name[:cut], name[cut:]) for cut in range(1, len(name)))
        pairs = [pair for pair in cuts if pair[0] in normal and pair[1] in normal]
        found += [(-score, ids[left], ids[right], left, right) for left, right in pairs]
    return [(left, right) for *_, left, right in sorted(found)]


def _normalizers(proto: Any, symbols: list[str]) -> list[Any]:
    """Returns the steps of SentencePiece's normalizer, in its order."""
    rules = proto.normalizer_spec
    table, suffix = rules.precompiled_charsmap, proto.trainer_spec.treat_whitespace_as_suffix
    fewer, added = rules.remove_extra_whitespaces, rules.add_dummy_prefix
    space = _SPACE if rules.escape_whitespaces else " "
    steps: list[Any] = list(table_steps(table, symbols)) if table else []
    if table and added:
        steps = [*mark_steps(table, but_spaces=fewer), *steps]
    if fewer:
        before, after = space_steps(symbols)
        steps = [*before, *steps, *after]
    if added and not suffix:
        steps.append(normalizers.Prepend(space))
    if space != " ":
        steps.append(normalizers.Replace(" ", space))
    if added and suffix:  # but not for an empty text
        steps.append(normalizers.Replace(Regex(r"(?m)(?<=.)\z"), space))
    if table and added:
        steps.append(normalizers.Replace(SOME_TEXT, ""))
    if fewer:
        steps.append(normalizers.Replace(Regex(rf"{space}+\z"), space if added and suffix else ""))
    return steps


def _decoder(proto: Any) -> Any:
    """Returns the decoder from pieces to text, which removes the space added in front."""
    rules = proto.normalizer_spec
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix or rules.remove_extra_whitespaces:
        several = "+" if rules.remove_extra_whitespaces else ""
        steps.append(decoders.Replace(Regex(rf"\A {several}"), ""))
    return decoders.Sequence(steps)


def _splits(pieces: dict[str, list[str]], unigram: bool) -> list[Any]:
    """Returns the pre-tokenizers that split a text before it is segmented into pieces."""
    symbols, splits = pieces["USER_DEFINED"], []
    if symbols and not unigram:  # a unigram model finds them by their scores
        splits.append(pre_tokenizers.Split(Regex(any_of(symbols)), "isolated"))
    if unigram or symbols:
        # The vocabulary contains names of control pieces and bytes, which must not match a text.
        names = [*pieces["CONTROL"], *pieces["UNKNOWN"], *pieces["BYTE"]]
        over = collections.Counter(
            piece[i : i + 2] for piece in pieces["NORMAL"] for i in range(len(piece) - 1)
        )
        known = {piece for piece in [*pieces["NORMAL"], *symbols] if len(piece) == 1}
        known |= set("".join(names)) if pieces["BYTE"] else set()
        cuts = sorted({_cut(name, over, known) for name in names if len(name) > 1})
        if cuts:
            pattern = "|".join(_between(*cut, symbols) for cut in cuts)
            splits.append(pre_tokenizers.Split(Regex(pattern), "merged_with_next"))
    words = [*pieces["NORMAL"], *symbols]
    if unigram and all(_SPACE not in word[1:] for word in words):
        # Split into words, because no piece spans a space: long texts are faster, and rounding
        # matters less.
        splits.append(pre_tokenizers.Split(_SPACE, "merged_with_next"))
    elif unigram and all(_SPACE not in word[:-1] for word in words):
        splits.append(pre_tokenizers.Split(_SPACE, "merged_with_previous"))
    return splits


def _cut(name: str, over: Mapping[str, int], known: set[str]) -> tuple[str, str]:
    """Returns the two parts of a name, cut so that it is not matched as a whole.

    Preferably not within a run of unknown characters, because a run becomes one token, and then
    where the fewest pieces span the cut.
    """

    def cost(at: int) -> tuple[bool, int, int]:
        pair = name[at - 1 : at + 1]
        return known.isdisjoint(pair), over.get(pair, 0), -at

    at = min(range(1, len(name)), key=cost)
    return name[:at], name[at:]


def _between(left: str, right: str, symbols: list[str]) -> str:
    """Returns a pattern for ``right`` after ``left``, but not within a user-defined symbol."""
    found = any_of([right])
    for symbol in symbols:
        start = symbol.find(left + right)
        if start >= 0:
            at = start + len(left)
            found = f"(?!(?<={any_of([symbol[:at]])}){any_of([symbol[at:]])}){found}"
    return f"(?<={any_of([left])}){found}"


def from_bytes() -> tokenizers.Tokenizer:
    """Returns the byte tokenizer as a tokenizer of the tokenizers library.

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
    """Returns the tokenizer files of a checkpoint directory.

    Without a beginning-of-text token, the end-of-text token is named as such, for programs that
    need one: in training a document follows the end of the previous one. It is not added to texts.

    Args:
        tokenizer: the tokenizer.
        eos_id: the end-of-text id.
        pad_id: the padding id.
        bos_id: the beginning-of-text id; None: there is none.
        adds_bos: whether it is added to texts.

    Returns:
        Contents by file name: ``tokenizer.json`` and ``tokenizer_config.json``.
    """
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.id_to_token(eos_id),
        "pad_token": tokenizer.id_to_token(pad_id),
        "add_bos_token": adds_bos,
        "clean_up_tokenization_spaces": False,
        # Transformers 4 would add token_type_ids, which LLaMA does not accept.
        "model_input_names": ["input_ids", "attention_mask"],
        "bos_token": tokenizer.id_to_token(eos_id),
    }
    if bos_id is not None:
        config["bos_token"] = begin = tokenizer.id_to_token(bos_id)
        # A tokenizer that has a template adds the token by it.
        if adds_bos and tokenizer.post_processor is None:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{begin} $A", special_tokens=[(begin, bos_id)]
            )
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
    }
