"""Check that a converted SentencePiece model gives the same ids, on texts made of its pieces."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import sentencepiece
import tokenizers

from loro_jax.errors import TrainingError

_SPACE = "\u2581"
# Largest difference of two segmentations' scores that is attributed to rounding.
_TIE = 1e-3


def check_conversion(
    model: bytes, proto: Any, tokenizer: tokenizers.Tokenizer, scores: Sequence[float] | None
) -> None:
    """Raises if a converted tokenizer gives other ids than the model.

    Args:
        model: contents of the ``.model`` file.
        proto: the same, parsed.
        tokenizer: the converted tokenizer.
        scores: scores of the pieces, for a model that maximises their sum (ties are accepted).

    Raises:
        TrainingError: if ids differ; it names the options that are not default.
    """
    texts = list(_probes(proto))
    own = sentencepiece.SentencePieceProcessor(model_proto=model).encode(texts, num_threads=1)
    # SentencePiece takes the names of control pieces in a text for text.
    before, tokenizer.encode_special_tokens = tokenizer.encode_special_tokens, True
    made = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    tokenizer.encode_special_tokens = before
    pairs = zip(texts, own, [one.ids for one in made], strict=True)
    wrong = [text for text, a, b in pairs if a != b and not _tied(a, b, scores)]
    if wrong:
        raise TrainingError(
            "tokenizer.json: a SentencePiece model with these options can't be expressed there "
            f"({', '.join(_options(proto))}): its ids for {min(wrong, key=len)[:40]!r} would "
            "differ. Use its .model file."
        )


def _tied(one: list[int], other: list[int], scores: Sequence[float] | None) -> bool:
    if scores is None:
        return False
    return abs(sum(scores[i] for i in one) - sum(scores[i] for i in other)) < _TIE


def _options(proto: Any) -> list[str]:
    kind, rules = proto.trainer_spec, proto.normalizer_spec
    found = [
        f"model_type={kind.ModelType.Name(kind.model_type)}",
        f"normalization_rule_name={rules.name or 'identity'}",
    ]
    known = (kind.unk_piece, kind.bos_piece, kind.eos_piece, kind.pad_piece)
    for name, sort in (("user_defined_symbols", "USER_DEFINED"), ("control_symbols", "CONTROL")):
        pieces = [one.piece for one in proto.pieces if one.type == getattr(one, sort)]
        symbols = ",".join(piece for piece in pieces if piece not in known)
        found += [f"{name}={symbols[:60]!r}"] if symbols else []
    for name, value, usual in (
        ("byte_fallback", kind.byte_fallback, None),
        ("split_by_whitespace", kind.split_by_whitespace, True),
        ("treat_whitespace_as_suffix", kind.treat_whitespace_as_suffix, False),
        ("add_dummy_prefix", rules.add_dummy_prefix, True),
        ("remove_extra_whitespaces", rules.remove_extra_whitespaces, True),
        ("escape_whitespaces", rules.escape_whitespaces, True),
    ):
        found += [f"{name}={value}"] if value != usual else []
    return found


def _probes(proto: Any) -> Iterator[str]:
    """Yields texts made of a model's pieces, a few at a time, and around its special ones."""
    # A fixed seed: the same model is always accepted or always refused.
    draw = random.Random(0)
    normal = [one.piece.replace(_SPACE, " ") for one in proto.pieces if one.type == one.NORMAL]
    # Limited, because each of them makes several texts.
    odd = [one.piece for one in proto.pieces if one.type not in (one.NORMAL, one.BYTE)][:400]
    odd += [one.piece for one in proto.pieces if one.type == one.BYTE][:12]
    order = draw.sample(normal, len(normal))
    # Each piece once, among others at random.
    for start in range(0, len(order), 6):
        yield "".join(order[start : start + 6])
    some = [
        *draw.sample(normal, min(len(normal), 40)),
        " ",
        "  ",
        "\n",
        "",
        "a",
        ".",
        "\u00e9",
        "#",
    ]
    for symbol in odd:
        for text in (symbol, symbol.replace(_SPACE, " ")):
            left, right = draw.choice(some), draw.choice(some)
            yield from (text, left + text, text + right, f"{left}{text}{right}", f"{text} {text}")
            yield f"a{text}{text}"
            yield f"{left}{text}{draw.choice(odd)}{right}"
    for text in (
        "",
        " ",
        "   ",
        "\n",
        " \n ",
        "\t",
        "\r\n",
        " a",
        "a ",
        " a  b\u3000c ",
        "\u2581",
        "a\u2581",
    ):
        yield text
        yield f"{text}a"
        yield f"a{text}"
