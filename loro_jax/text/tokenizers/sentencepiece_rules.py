"""SentencePiece's normalisation as steps of the tokenizers library, character for character.

SentencePiece rewrites a text by a table: at each place the longest entry that matches there is
replaced. The tokenizers library has the table too, but looks entries up by the first that matches,
and for whole clusters of a letter and its marks if they are short, so marks of decomposed text get
lost. Here clusters are taken apart first, so that the table sees one character at a time; what it
says of several is what Unicode's composition makes of them (checked for each entry, with the few
exceptions replaced one by one), and marks that no entry joins are kept apart while it works.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Regex, normalizers

from loro_jax.errors import TrainingError

# Noncharacters, which no text may hold: between characters that stay apart, between those that may
# be joined, and before the number of a string to put in at the end.
_APART, _JOINED, _LATER = "\ufdd0", "\ufdd1", "\ufdd2"
_NUMBERS = 0xF0000  # of private use
# Says that there is a text even if nothing is left of it.
SOME_TEXT = f"{_LATER}{chr(_NUMBERS + 0xEFFF)}"
# Entries of several characters that are replaced one result at a time; more would be slow.
_EXCEPTIONS = 256


def read_rules(table: bytes) -> dict[str, str]:
    """Returns the entries of a ``precompiled_charsmap``: a double-array trie, then strings.

    Args:
        table: its bytes; the trie's size comes first.

    Raises:
        TrainingError: if the bytes are no such table.
    """
    size = int.from_bytes(table[:4], "little")
    if size + 4 > len(table) or size % 4:
        raise TrainingError(
            "tokenizer.json: the SentencePiece model's precompiled_charsmap is cut."
        )
    units = np.frombuffer(table[4 : 4 + size], "<u4").astype(np.int64)
    strings = table[4 + size :]
    # A node's child by a byte is at (the node's base) xor (the byte), and holds that byte: so the
    # base that a unit would be a child of is known from the unit alone.
    label = units & (1 << 31 | 0xFF)
    real = np.nonzero((label > 0) & (label < 256))[0]
    order = np.argsort(real ^ label[real], kind="stable")
    children, parents = real[order], (real ^ label[real])[order]
    prefixes, bases = [b""], _offset(units[:1])
    rules: dict[str, str] = {}
    while prefixes:
        # All children of all nodes of one depth.
        first, last = np.searchsorted(parents, bases), np.searchsorted(parents, bases, "right")
        rows = np.repeat(np.arange(len(bases)), last - first)
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
        leaves = np.nonzero(unit >> 8 & 1)[0].tolist()
        values = (units[bases[leaves]] & 0x7FFFFFFF).tolist()
        for leaf, value in zip(leaves, values, strict=True):
            rules[prefixes[leaf].decode()] = strings[value : strings.index(b"\0", value)].decode()
    return rules


def _offset(unit: np.ndarray) -> np.ndarray:
    return (unit >> 10) << ((unit & 512) >> 6)


def table_steps(table: bytes, symbols: Sequence[str]) -> list[Any]:
    """Returns the normalizers that do what a ``precompiled_charsmap`` does.

    Args:
        table: its bytes.
        symbols: user-defined symbols, which are left as they are.

    Raises:
        TrainingError: if the table has entries that can't be expressed.
    """
    rules, tails, several, later, composes = _analysed(table)
    changed = [symbol for symbol in symbols if _one_by_one(rules, symbol) != symbol]
    changed.sort(key=len, reverse=True)
    # A text that holds our own marks gets them back at the end, too.
    results = [*later, _APART, _JOINED, *changed]
    places = {result: f"{_LATER}{chr(_NUMBERS + i)}" for i, result in enumerate(results)}
    steps: list[Any] = [
        normalizers.Replace(literal, places[literal]) for literal in (_APART, _JOINED, *changed)
    ]
    if symbols:
        ends = any_of(symbols)
        steps.append(normalizers.Replace(Regex(rf"(?m)(?:{ends})\K(?={tails})"), _APART))
    if several:
        # At a boundary between two matches of the table, from where the last one ended.
        boundary = rf"(?m)(?=.{tails})(?:\G|(?!{tails}))(?>{several}|.)\K(?={tails})"
        steps.append(normalizers.Replace(Regex(boundary), _APART))
    for result, keys in later.items():
        pattern = rf"(?:(?<={_APART})|\A|(?!{tails}))(?:{any_of(keys)})(?!{tails})"
        steps.append(normalizers.Replace(Regex(pattern), places[result]))
    steps += [
        normalizers.Replace(Regex(rf"(?m)(?<=[^{_APART}])(?={tails}|(?<=\r)\n)"), _JOINED),
        normalizers.Precompiled(table),
        normalizers.Replace(_JOINED, ""),
        *([normalizers.NFC()] if composes else []),
        normalizers.Replace(_APART, ""),
    ]
    return steps + [normalizers.Replace(mark, result) for result, mark in places.items()]


def mark_steps(table: bytes, but_spaces: bool) -> list[Any]:
    """Returns the normalizers that put :data:`SOME_TEXT` before a text.

    A text of characters that the table deletes is not empty, and gets the space that is put before
    or after every text.

    Args:
        table: bytes of the ``precompiled_charsmap``.
        but_spaces: put it only before texts of which the table deletes something; what else there
            is shows afterwards, unless it is spaces that count for nothing.
    """
    deleted = [key for key, result in _analysed(table).rules.items() if not result]
    if but_spaces and not deleted:
        return []
    mark = normalizers.Prepend(SOME_TEXT)
    others = _class(deleted).replace("[", "[^", 1) if deleted else "."
    # Taken away again, for the library miscounts after a match of nothing at the very start.
    unless = normalizers.Replace(Regex(rf"(?m)\A{SOME_TEXT}(?={others}*\z)"), "")
    return [mark, unless] if but_spaces else [mark]


def space_steps(symbols: Sequence[str]) -> tuple[list[Any], list[Any]]:
    """Returns the normalizers that take away extra spaces: spaces alone, line feeds etc. stay.

    Args:
        symbols: user-defined symbols. One of spaces alone keeps as many of a run of spaces.

    Returns:
        (those before the table's steps, those after them).
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
    """What :func:`table_steps` needs to know of a table.

    Attributes:
        rules: its entries of one character.
        tails: the class of characters that may belong to the one before them.
        several: a pattern of all entries of several characters, or "".
        later: those of them that composition does not explain, by result.
        composes: whether composition explains the others.
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
            f"there, for what it says of {key!r}; programs need its .model file."
        )
    tails = set(_continuing()).union(*(key[1:] for key in several))
    tails |= {key for key, result in single.items() if result[:1] in tails and result}
    return _Analysed(single, _class(tails), _pattern(several), later, composes)


def _one_by_one(single: dict[str, str], text: str) -> str:
    return "".join(single.get(letter, letter) for letter in text)


def _composed(texts: list[str]) -> list[str]:
    """Texts, composed by the library that will do it later."""
    if not texts:
        return []
    return normalizers.NFC().normalize_str(_APART.join(texts)).split(_APART)


def _class(letters: Iterable[str]) -> str:
    """A character class of a regular expression."""
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
    """Returns a pattern of texts, the longest first."""
    ordered = sorted(texts, key=lambda text: (-len(text), text))
    return "|".join("".join(_escape(ord(letter)) for letter in text) for text in ordered)


def _pattern(texts: list[str]) -> str:
    """A pattern that finds the longest of many texts: their prefix tree, equal branches as one."""
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
    """Characters that join the one before them in a cluster, or may compose with it."""
    # Joiners, vowels and finals of Hangul, sound marks, skin tones, tags.
    spans = ((0x200C, 0x200D), (0x1160, 0x11FF), (0xD7B0, 0xD7FB), (0xFF9E, 0xFF9F))
    more = ((0x1F3FB, 0x1F3FF), (0xE0020, 0xE007F))
    points = [point for first, last in spans + more for point in range(first, last + 1)]
    marks = (c for c in map(chr, range(0x300, 0xE01F0)) if unicodedata.category(c)[0] == "M")
    return [*map(chr, points), *marks]


def _singletons() -> list[str]:
    """Characters that composition replaces when they are alone."""
    points = (*range(0xA0, 0xD800), *range(0xE000, 0x2FA20))
    return [c for c in map(chr, points) if not unicodedata.is_normalized("NFC", c)]
