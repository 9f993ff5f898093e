"""What a file holds, by its name and its first bytes, and which bytes are no text."""

from __future__ import annotations

import itertools
import json
import pathlib
import re

from loro_jax.text.archives import SUFFIXES, UTF8_MARK

# First bytes of a file that are looked at, unpacked.
HEAD = 1 << 16

_JSON_NAMES = {".jsonl", ".json", ".ndjson", ".jsonlines", ".ldjson"}

_READABLE = "expected text, JSON lines or Parquet, the first two also as .gz, .xz, .zst or .bz2"

# What is refused by name, whatever it holds. (Not .br, .sz and the like: text files of several
# languages end in the codes of these.)
_REFUSED_NAMES = {
    **dict.fromkeys((".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst"), "a tar archive"),
    **dict.fromkeys((".zip", ".7z", ".rar"), "an archive of several files"),
    **dict.fromkeys((".lz4", ".lzo"), "an archive of another format"),
    **dict.fromkeys((".arrow", ".feather", ".orc", ".avro"), "a table of another format"),
}

_REFUSED_BEGINNINGS = [
    (re.compile(rb"\xff\xfe\0\0|\0\0\xfe\xff"), "UTF-32, by its byte order mark; expected UTF-8"),
    (re.compile(rb"\xff\xfe|\xfe\xff"), "UTF-16, by its byte order mark; expected UTF-8"),
    *(
        (re.compile(pattern, re.DOTALL), f"{what}; {_READABLE}")
        for pattern, what in (
            (rb"PK\x03\x04|7z\xbc\xaf\x27\x1c|Rar!\x1a\x07", "an archive of several files"),
            (rb".{257}ustar", "a tar archive"),
            (rb"\x04\x22\x4d\x18|LZIP\x01", "an archive of another format"),
            (rb"\x1f\x8b\x08|\xfd7zXZ\0|\x28\xb5\x2f\xfd|BZh[1-9]1AY&SY", "packed twice"),
            (rb"PAR1.*\0", "a packed Parquet table"),
        )
    ),
]

# Where texts hold them at all, control characters are rare; UTF-16 is full of them.
_CONTROLS = bytes({*range(1, 9), *range(14, 27), *range(28, 32)})

# The beginning of an object, in an array or not.
_OBJECT = re.compile(rb'\s*(?:\[\s*)?\{\s*"(?:[^"\\\n]|\\.)*"\s*:')

# A first line of JSON that is not one object a line.
_NOT_A_LINE = re.compile(rb"\[\s*\{|\[\Z|\{\Z")


class NotTextError(Exception):
    """Bytes that are no text in UTF-8."""


def decoded(content: bytes) -> str:
    """The text of a document.

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
    """The format of the archive that a file's name says it is."""
    return SUFFIXES.get(pathlib.Path(path).suffix.lower())


def is_table(path: str) -> bool:
    """Whether a file is a Parquet table, by its name or by both its ends.

    Raises:
        OSError: if it can't be read.
    """
    if _suffix(path) == ".parquet":
        return True
    with open(path, "rb") as file:
        if file.read(4) != b"PAR1":
            return False
        file.seek(-4, 2)
        return file.read(4) == b"PAR1"


def refused_name(path: str) -> str | None:
    """Why a file of this name is not read, or None."""
    found = _REFUSED_NAMES.get(_suffix(path))
    if _suffix(path) == ".parquet" and named_packing(path):
        found = "a packed Parquet table"
    return None if found is None else f"{found}; {_READABLE}"


def refused_content(head: bytes) -> str | None:
    """Why content that begins like this is not read, or None.

    Args:
        head: its first bytes, unpacked, at least 262 of them where there are as many.

    Example:
        >>> refused_content("text".encode("utf-16"))
        'UTF-16, by its byte order mark; expected UTF-8'
    """
    for pattern, reason in _REFUSED_BEGINNINGS:
        if pattern.match(head):
            return reason
    if 4 * head.count(b"\0") > len(head):
        return "full of NUL bytes (UTF-16 without a byte order mark, or no text); expected UTF-8"
    return None


def is_json(path: str, head: bytes, whole_files: bool) -> bool:
    """Whether a file is read as JSON lines.

    Args:
        path: its name.
        head: its first bytes, unpacked.
        whole_files: whether a text file is one document, whatever it begins with.

    Returns:
        Whether its name says so, or it begins with an object and most of its first lines fit.

    Example:
        >>> is_json("a.txt", b'{"text": "one"}', False), is_json("a.txt", b"{one}", False)
        (True, False)
    """
    if _suffix(path) in _JSON_NAMES:
        return True
    if whole_files or not _OBJECT.match(head.replace(UTF8_MARK, b"", 1)):
        return False
    # Most of its lines, so that a bad one among them does not make it prose.
    lines = _first_lines(head)
    return 2 * sum(line.startswith((b"{", b"[", b'"', b"}", b"]")) for line in lines) > len(lines)


def refused_json(head: bytes) -> str | None:
    """Why JSON that begins like this is not read as one object a line, or None."""
    first, *others = _first_lines(head) or [b""]
    if not _NOT_A_LINE.match(first) or (others and (_is_value(first) or _is_value(others[0]))):
        return None  # bad lines among others are bad documents
    kind = "a JSON array" if first.startswith(b"[") else "JSON objects over several lines"
    return f"{kind}; expected a JSON object a line (as `jq -c` writes them)"


def _suffix(path: str) -> str:
    """The end of a name, without that of an archive, in lower case."""
    name = pathlib.Path(path)
    return (name.with_suffix("") if named_packing(path) else name).suffix.lower()


def _first_lines(head: bytes) -> list[bytes]:
    """Up to eight lines that are not blank."""
    lines = (line.strip() for line in head.replace(UTF8_MARK, b"").split(b"\n"))
    return list(itertools.islice(filter(None, lines), 8))


def _is_value(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
