"""SentencePiece's normalisation in steps of the tokenizers library, character for character.

SentencePiece rewrites a text by a table: at each position the longest matching entry is replaced.
The tokenizers library supports the table, but takes the first matching entry, and looks up short
grapheme clusters (a letter with its marks) as a whole, so that marks of decomposed text get lost.
Here clusters are split first, so that the table is applied to single characters. Entries of several
characters are covered by Unicode composition (checked for each entry; the few exceptions are
replaced one by one), and marks that no entry joins are kept apart meanwhile.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Regex, normalizers

from loro_jax.errors import TrainingError

# Noncharacters, which valid text does not contain: a separator of characters that stay apart, one
# of characters that may be joined, and a prefix of the number of a string inserted at the end.
_APART, _JOINED, _LATER = "\ufdd0", "\ufdd1", "\ufdd2"
_NUMBERS = 0xF0000  # private use area
# Marks a text as not empty even if the table deletes all of it.
SOME_TEXT = f"{_LATER}{chr(_NUMBERS + 0xEFFF)}"
# Entries of several characters that are replaced one result at a time; more would be slow.
_EXCEPTIONS = 256


def read_rules(table: bytes) -> dict[str, str]:
    """Returns the entries of a ``precompiled_charsmap``: a double-array trie, then strings.

    Args:
        table: bytes of the table; the trie's size comes first.

    Raises:
        TrainingError: if the table is truncated.
    """
    size = int.from_bytes(table[:4], "little")
    if size + 4 > len(table) or size % 4:
        raise TrainingError(
            "tokenizer.json: the SentencePiece model's precompiled_charsmap is truncated."
        )
    units = np.frombuffer(table[4 : 4 + size], "<u4").astype(np.int64)
    strings = table[4 + size :]
    # The child of a node by a byte is at index base ^ byte and stores the byte as its label, so the
    # base of its parent follows from the child alone.
    label = units & (1 << 31 | 0xFF)
    real = np.nonzero((label > 0) & (label < 256))[0]
    order = np.argsort(real ^ label[real], kind="stable")
    children, parents = real[order], (real ^ label[real])[order]
    prefixes, bases = [b""], _offset(units[:1])
    rules: dict[str, str] = {}
    while prefixes:
        # All children of all nodes of one depth at once.
        first, last = np.searchsorted(parents, bases), np.searchsorted(parents, bases, "right")
        rows = np.repeat(np.arange(len(bases)), last - first)
        # The number of each child within its own parent, without a loop over the parents.
        within = np.arange(len(rows)) - np.repeat(
            np.cumsum(last - first) - (last - first), last - first
        )
        place = children[first[rows] + within]
        unit = units[place]
        bases = place ^ _offset(unit)
        prefixes = [
            prefixes[row] + bytes([byte])
            for row, byte in zip(rows.tolist(), label[place].tolist(), strict=True)
        ]
        # Bit 8 says that a key ends at the node; its value is then in the child by the byte zero.
        leaves = np.nonzero(unit >> 8 & 1)[0].tolist()
        values = (units[bases[leaves]] & 0x7FFFFFFF).tolist()
        for leaf, value in zip(leaves, values, strict=True):
            rules[prefixes[leaf].decode()] = strings[value : strings.index(b"\0", value)].decode()
    return rules


def _offset(unit: np.ndarray) -> np.ndarray:
    return (unit >> 10) << ((unit & 512) >> 6)


def table_steps(table: bytes, symbols: Sequence[str]) -> list[Any]:
    """Returns normalizers equivalent to a ``precompiled_charsmap``.

    Args:
        table: bytes of the ``precompiled_charsmap``.
        symbols: user-defined symbols, which are left unchanged.

    Raises:
        TrainingError: if the table has entries that can't be expressed.
    """
    rules, tails, several, later, composes = _analysed(table)
    changed = [symbol for symbol in symbols if _one_by_one(rules, symbol) != symbol]
    changed.sort(key=len, reverse=True)
    # Our own markers, if a text contains them, are restored at the end, too.
    results = [*later, _APART, _JOINED, *changed]
    places = {result: f"{_LATER}{chr(_NUMBERS + i)}" for i, result in enumerate(results)}
    steps: list[Any] = [
        normalizers.Replace(literal, places[literal]) for literal in (_APART, _JOINED, *changed)
    ]
    if symbols:
        ends = any_of(symbols)
        steps.append(normalizers.Replace(Regex(rf"(?m)(?:{ends})\K(?={tails})"), _APART))
    if several:
        # At the boundary between two matches of the table.
        boundary = rf"(?m)(?=.{tails})(?:\G|(?!{tails}))(?>{several}|.)\K(?={tails})"
        steps.append(normalizers.Replace(Regex(boundary), _APART))
    for result, keys in later.items():
        pattern = rf"(?:(?<={_APART})|\A|(?!{tails}))(?:{any_of(keys)})(?!{tails})"
        steps.append(normalizers.Replace(Regex(pattern), places[result]))
    # Clusters are split, the table is applied to single characters, and its results are joined and
    # composed.
    steps += [
        normalizers.Replace(Regex(rf"(?m)(?<=[^{_APART}])(?={tails}|(?<=\r)\n)"), _JOINED),
        normalizers.Precompiled(table),
        normalizers.Replace(_JOINED, ""),
        *([normalizers.NFC()] if composes else []),
        normalizers.Replace(_APART, ""),
    ]
    return steps + [normalizers.Replace(mark, result) for result, mark in places.items()]


def mark_steps(table: bytes, but_spaces: bool) -> list[Any]:
    """Returns the normalizers that prepend :data:`SOME_TEXT` to a text.

    A text of which the table deletes all characters does not count as empty: it gets the space that
    is added before or after every text.

    Args:
        table: bytes of the ``precompiled_charsmap``.
        but_spaces: prepend it only to texts of which the table deletes everything except spaces;
            other texts are still recognised as not empty afterwards.
    """
    deleted = [key for key, result in _analysed(table).rules.items() if not result]
    if but_spaces and not deleted:
        return []
    mark = normalizers.Prepend(SOME_TEXT)
    others = _class(deleted).replace("[", "[^", 1) if deleted else "."
    # Removed again, because the library miscounts after an empty match at the very start.
    unless = normalizers.Replace(Regex(rf"(?m)\A{SOME_TEXT}(?={others}*\z)"), "")
    return [mark, unless] if but_spaces else [mark]


def space_steps(symbols: Sequence[str]) -> tuple[list[Any], list[Any]]:
    """Returns the normalizers that remove extra spaces, but no other white space.

    Args:
        symbols: user-defined symbols. One that consists of n spaces keeps n spaces of a run.

    Returns:
        (normalizers before the table's steps, normalizers after them).
    """
    lengths = sorted({len(one) for one in symbols if len(one) > 1 and not one.strip(" ")})[::-1]
    kept = {n: f"{_LATER}{chr(_NUMBERS + 0xF000 + n)}" for n in lengths}
    before = [normalizers.Replace(Regex(f"(?<! ) {{{n},}}"), mark) for n, mark in kept.items()]
    after: list[Any] = []
    for mark in kept.values():
        after.append(normalizers.Replace(Regex(rf"(?:(?<= )|\A|(?<=\A{SOME_TEXT})){mark} *"), " "))
        after.append(normalizers.Replace(Regex(f"{mark} +"), mark))
    after.append(normalizers.Replace(Regex(rf"(?:\A|(?<=\A{SOME_TEXT})) +"), ""))
    after.append(normalizers.Replace(Regex(" {2,}"), " "))
    return before, after + [normalizers.Replace(mark, " " * n) for n, mark in kept.items()]


class _Analysed(NamedTuple):
    """A table as :func:`table_steps` needs it.

    Attributes:
        rules: entries of one character.
        tails: class of the characters that may belong to the previous one.
        several: pattern of all entries of several characters, or "".
        later: entries of several characters not covered by composition, by result.
        composes: whether composition covers the others.
    """

    rules: dict[str, str]
    tails: str
    several: str
    later: dict[str, list[str]]
    composes: bool


@functools.lru_cache(maxsize=4)
def _analysed(table: bytes) -> _Analysed:
    rules = read_rules(table)
    single = {key: result for key, result in rules.items() if len(key) == 1}
    several = [key for key in rules if len(key) > 1]
    # This many different results only if the table contains Unicode's compositions.
    composes = len({rules[key] for key in several}) > _EXCEPTIONS
    later: dict[str, list[str]] = {}
    composed = _composed([_one_by_one(single, key) for key in several]) if composes else several
    for key, found in zip(several, composed, strict=True):
        if not composes or found != rules[key]:
            later.setdefault(rules[key], []).append(key)
    alone = [c for c in _singletons() if c not in single] if composes else []
    if len(later) > _EXCEPTIONS or alone:
        key = next(iter(later.values()))[0] if later else alone[0]
        raise TrainingError(
            "tokenizer.json: the SentencePiece model's normalization_rule_tsv can't be expressed "
            f"there, because of its entry for {key!r}; use its .model file."
        )
    # What may belong to the character before it, by Unicode or by an entry of the table.
    tails = set(_continuing()).union(*(key[1:] for key in several))
    tails |= {key for key, result in single.items() if result[:1] in tails and result}
    return _Analysed(single, _class(tails), _pattern(several), later, composes)


def _one_by_one(single: dict[str, str], text: str) -> str:
    return "".join(single.get(letter, letter) for letter in text)


def _composed(texts: list[str]) -> list[str]:
    """Composes texts by the library that will do it at run time."""
    if not texts:
        return []
    return normalizers.NFC().normalize_str(_APART.join(texts)).split(_APART)


def _class(letters: Iterable[str]) -> str:
    """Returns a character class of a regular expression."""
    points = sorted(map(ord, letters))
    ranges: list[list[int]] = []
    for point in points:
        if ranges and point == ranges[-1][1] + 1:
            ranges[-1][1] = point
        else:
            ranges.append([point, point])
    return "[" + "".join(f"{_escape(a)}-{_escape(b)}" for a, b in ranges) + "]"


def _escape(point: int) -> str:
    return rf"\x{{{point:X}}}"


def any_of(texts: Iterable[str]) -> str:
    """Returns a pattern that matches any of the texts, the longest first."""
    ordered = sorted(texts, key=lambda text: (-len(text), text))
    return "|".join("".join(_escape(ord(letter)) for letter in text) for text in ordered)


def _pattern(texts: list[str]) -> str:
    """Returns a pattern for the longest of many texts: their prefix tree with shared branches."""
    tree: dict[str, Any] = {}
    for text in texts:
        node = tree
        for letter in text:
            node = node.setdefault(letter, {})
        node[""] = {}
    return _branches(tree)


def _branches(node: dict[str, Any]) -> str:
    after: dict[str, list[str]] = {}
    for letter, child in node.items():
        if letter:
            after.setdefault(_branches(child), []).append(letter)
    found = "|".join(f"{_class(letters)}{rest}" for rest, letters in after.items())
    if not found:
        return ""
    return f"(?:{found})" + ("?" if "" in node else "")


def _continuing() -> list[str]:
    """Returns characters that extend the previous one's cluster, or may compose with it."""
    # Joiners, Hangul vowels and finals, halfwidth voiced sound marks, skin tones, tags.
    spans = ((0x200C, 0x200D), (0x1160, 0x11FF), (0xD7B0, 0xD7FB), (0xFF9E, 0xFF9F))
    more = ((0x1F3FB, 0x1F3FF), (0xE0020, 0xE007F))
    points = [point for first, last in spans + more for point in range(first, last + 1)]
    marks = (c for c in map(chr, range(0x300, 0xE01F0)) if unicodedata.category(c)[0] == "M")
    return [*map(chr, points), *marks]


def _singletons() -> list[str]:
    """Returns characters that composition replaces even when they are alone."""
    points = (*range(0xA0, 0xD800), *range(0xE000, 0x2FA20))
    return [c for c in map(chr, points) if not unicodedata.is_normalized("NFC", c)]
