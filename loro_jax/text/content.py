"""Detection of a file's format by its name and first bytes, and of bytes that are not text."""

from __future__ import annotations

import itertools
import json
import pathlib
import re

from loro_jax.text.archives import SUFFIXES, UTF8_MARK

# Bytes at the beginning of a file, decompressed, that are inspected.
HEAD = 1 << 16

_JSON_NAMES = {".jsonl", ".json", ".ndjson", ".jsonlines", ".ldjson"}

_READABLE = "expected text, JSON lines or Parquet, the first two also as .gz, .xz, .zst or .bz2"

# Refused by name, whatever the content. (Not .br or .sz, which are also used as language codes at
# the end of text files' names.)
_REFUSED_NAMES = {
    **dict.fromkeys((".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst"), "a tar archive"),
    **dict.fromkeys((".zip", ".7z", ".rar"), "an archive of several files"),
    **dict.fromkeys((".lz4", ".lzo", ".z"), "an archive of another format"),
    **dict.fromkeys(
        (".csv", ".tsv", ".arrow", ".feather", ".orc", ".avro"), "a table of another format"
    ),
}

_REFUSED_BEGINNINGS = [
    (re.compile(rb"\xff\xfe\0\0|\0\0\xfe\xff"), "UTF-32, by its byte order mark; expected UTF-8"),
    (re.compile(rb"\xff\xfe|\xfe\xff"), "UTF-16, by its byte order mark; expected UTF-8"),
    *(
        (re.compile(pattern, re.DOTALL), f"{what}; {_READABLE}")
        for pattern, what in (
            (rb"PK\x03\x04|7z\xbc\xaf\x27\x1c|Rar!\x1a\x07", "an archive of several files"),
            (rb".{257}ustar", "a tar archive"),
            (rb"\x04\x22\x4d\x18|LZIP\x01|\x1f\x9d", "an archive of another format"),
            (rb"%PDF-|\{\\rtf", "a document with markup of its own (PDF or RTF)"),
            (rb"\x1f\x8b\x08|\xfd7zXZ\0|\x28\xb5\x2f\xfd|BZh[1-9]1AY&SY", "packed twice"),
            (rb"PAR1.*\0", "a packed Parquet table"),
        )
    ),
]

# A byte order mark in a string. Texts in JSON and tables may begin with one, left over from a file.
TEXT_MARK = "\ufeff"

# Control characters are rare in text; UTF-16 read as bytes is full of them.
_CONTROLS = bytes({*range(1, 9), *range(14, 27), *range(28, 32)})

# The beginning of a JSON object, possibly in an array.
_OBJECT = re.compile(rb'\s*(?:\[\s*)?\{\s*"(?:[^"\\\n]|\\.)*"\s*:')

# First lines of JSON that is not one object per line.
_NOT_A_LINE = re.compile(rb"\[\s*\{|\[\Z|\{\Z")


class NotTextError(Exception):
    """Bytes that are not UTF-8 text."""


def decoded(content: bytes) -> str:
    """Decodes a document.

    Raises:
        NotTextError: if it is not UTF-8, or looks like text of another encoding.

    Example:
        >>> decoded("café".encode("utf-8"))
        'café'
    """
    if b"\0" in content:
        raise NotTextError("not UTF-8 (holds NUL bytes, as UTF-16 and UTF-32 do)")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise NotTextError("not UTF-8") from None
    if 4 * (len(content) - len(content.translate(None, _CONTROLS))) > len(content):
        raise NotTextError("not UTF-8 (a quarter are control characters, as in UTF-16)")
    return text


def named_packing(path: str) -> str | None:
    """Returns the compression format of a file by its name, or None."""
    return SUFFIXES.get(pathlib.Path(path).suffix.lower())


def is_table(path: str) -> bool:
    """Returns whether a file is a Parquet table, by its name or its magic bytes at both ends.

    Raises:
        OSError: if it can't be read.
    """
    if _suffix(path) == ".parquet":
        return True
    with open(path, "rb") as file:
        # At both ends, because a text may begin with these four letters.
        if file.read(4) != b"PAR1":
            return False
        file.seek(-4, 2)
        return file.read(4) == b"PAR1"


def refused_name(path: str) -> str | None:
    """Returns why a file of this name is refused, or None."""
    found = _REFUSED_NAMES.get(_suffix(path))
    if _suffix(path) == ".parquet" and named_packing(path):
        found = "a packed Parquet table"
    return None if found is None else f"{found}; {_READABLE}"


def refused_content(head: bytes) -> str | None:
    """Returns why content with these first bytes is refused, or None.

    Args:
        head: its first bytes, decompressed, at least 262 unless it is shorter.

    Example:
        >>> refused_content("text".encode("utf-16"))
        'UTF-16, by its byte order mark; expected UTF-8'
    """
    # UTF-32's byte order mark begins with that of UTF-16, so it is tested first.
    for pattern, reason in _REFUSED_BEGINNINGS:
        if pattern.match(head):
            return reason
    if 4 * head.count(b"\0") > len(head):
        return "full of NUL bytes (UTF-16 without a byte order mark, or no text); expected UTF-8"
    return None


def is_json(path: str, head: bytes, whole_files: bool) -> bool:
    """Returns whether a file is read as JSON lines.

    Args:
        path: name of the file.
        head: its first bytes, decompressed.
        whole_files: whether a text file is one document, whatever it begins with.

    Returns:
        True if its name says so, or if it begins with an object and most of its first lines look
        like JSON.

    Example:
        >>> is_json("a.txt", b'{"text": "one"}', False), is_json("a.txt", b"{one}", False)
        (True, False)
    """
    if _suffix(path) in _JSON_NAMES:
        return True
    if whole_files or not _OBJECT.match(head.replace(UTF8_MARK, b"", 1)):
        return False
    # Most, not all, so that a single bad line does not turn JSON into prose.
    lines = _first_lines(head)
    return 2 * sum(line.startswith((b"{", b"[", b'"', b"}", b"]")) for line in lines) > len(lines)


def refused_json(head: bytes) -> str | None:
    """Returns why JSON with these first bytes can't be read as one object per line, or None."""
    first, *others = _first_lines(head) or [b""]
    if not _NOT_A_LINE.match(first) or (others and (_is_value(first) or _is_value(others[0]))):
        return None  # bad lines among others are bad documents
    kind = "a JSON array" if first.startswith(b"[") else "JSON objects over several lines"
    return f"{kind}; expected one JSON object per line (as `jq -c` writes them)"


def _suffix(path: str) -> str:
    """Returns a name's suffix in lower case, without that of a compression format."""
    name = pathlib.Path(path)
    return (name.with_suffix("") if named_packing(path) else name).suffix.lower()


def _first_lines(head: bytes) -> list[bytes]:
    """Returns up to eight non-blank lines."""
    lines = (line.strip() for line in head.replace(UTF8_MARK, b"").split(b"\n"))
    return list(itertools.islice(filter(None, lines), 8))


def _is_value(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
