"""Documents of local files, one after the other, with an account of what could not be read.

By a file's name or its content: JSON lines hold a JSON object a line (lines end with a line feed
alone: texts may hold U+2028 and the like), Parquet a table, anything else is plain text, whose
documents are separated by blank lines. Archives (archives.py) are unpacked on the way. Files are
read as streams: an archive needs no more memory than its longest document.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from loro_jax.text.archives import UTF8_MARK, ArchiveError, packing_of, unpack
from loro_jax.text.content import (
    HEAD,
    NotTextError,
    decoded,
    is_json,
    is_table,
    named_packing,
    refused_content,
    refused_json,
    refused_name,
)
from loro_jax.text.tables import table_texts
from loro_jax.text.tally import MOST_BAD, Tally

__all__ = ["LONGEST_DOCUMENT", "MOST_BAD", "Tally", "read_documents"]

# A text longer than this is taken for a broken file rather than a document.
LONGEST_DOCUMENT = 50_000_000

# A line of white space alone, whatever Unicode calls so, in UTF-8.
_BLANK = re.compile(
    rb"(?:[\t\x0b-\r\x1c- ]|\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]"
    rb"|\xe2\x81\x9f|\xe3\x80\x80)*\Z"
)
_END_OF_FILE = b"\x1a"  # in texts of CP/M and DOS
_MARKS_OF_LINES = re.compile(rb"(?:\A|(?<=\n))(?:\xef\xbb\xbf)+")


def read_documents(path: str, tally: Tally, text_field: str, whole_files: bool) -> Iterator[str]:
    """Texts of one file, in order; those without any but white space are left out.

    Args:
        path: the file.
        tally: counts what comes, and what can't be read.
        text_field: the field of a JSON object, or the column of a table, that holds the text.
        whole_files: whether a plain text file is one document, instead of one a paragraph.

    Yields:
        Texts.

    Raises:
        TrainingError: from the tally, or for a table without such a column of texts.
    """
    for place, text in _texts(path, tally, text_field, whole_files):
        if len(text) > LONGEST_DOCUMENT:
            tally.add_bad(path, place, f"text of more than {LONGEST_DOCUMENT:,} characters")
        elif text.strip():
            tally.good += 1
            yield text


def _texts(
    path: str, tally: Tally, text_field: str, whole_files: bool
) -> Iterator[tuple[str, str]]:
    """Places and texts, of a file of any kind."""
    try:
        reason = refused_name(path)
        table = reason is None and is_table(path)
    except OSError as error:
        reason = f"can't be read ({error.strerror or error})"
    if reason is not None:
        tally.add_lost(path, "the file", reason)
    elif table:
        yield from table_texts(path, tally, text_field)
    else:
        yield from _streamed(_Content(path, tally), text_field, whole_files)


class _Content:
    """The unpacked bytes of a file. What can't be read at its end counts as one bad document.

    Attributes:
        path: the file.
        tally: counts what can't be read.
        cut: once it has been read, whether its last document may be cut off.
    """

    def __init__(self, path: str, tally: Tally):
        self.path = path
        self.tally = tally
        self.cut = False
        self._lost: tuple[str, str] | None = None
        self._chunks = self._read()

    def head(self) -> bytes:
        """Its first bytes, which are still to be read."""
        chunks, size = [], 0
        for chunk in self._chunks:
            chunks.append(chunk)
            size += len(chunk)
            if size >= HEAD:
                break
        self._chunks = itertools.chain(chunks, self._chunks)
        return b"".join(chunks)[:HEAD]

    def __iter__(self) -> Iterator[bytes]:
        yield from self._chunks
        if self._lost is not None:
            self.tally.add_lost(self.path, *self._lost)

    def _read(self) -> Iterator[bytes]:
        place = 0
        try:
            for chunk in _unpacked(self.path):
                place += len(chunk)
                yield chunk
        except (OSError, ArchiveError) as error:
            self.cut = error.cut if isinstance(error, ArchiveError) else True
            reason = getattr(error, "strerror", None) or str(error)
            self._lost = f"byte {place:,} of the content", f"can't be read ({reason})"


def _streamed(content: _Content, text_field: str, whole_files: bool) -> Iterator[tuple[str, str]]:
    """Places and texts of what is no table."""
    head = content.head()
    place, reason = "the file", refused_content(head)
    json_lines = is_json(content.path, head, whole_files)
    if reason is None and json_lines:
        place, reason = "line 1", refused_json(head)
    if reason is not None:
        content.tally.add_lost(content.path, place, reason)
    elif json_lines:
        only_cr = b"\r" in head and b"\n" not in head  # neither may be part of a text
        lines = _lines(_with_line_feeds(content) if only_cr else content)
        yield from _json_lines(content, lines, text_field)
    else:
        yield from _plain(content, whole_files)


def _unpacked(path: str) -> Iterator[bytes]:
    """The content of a file, without the byte order mark that it may begin with."""
    with open(path, "rb") as file:
        # A file may be packed though its name does not say so, or in another format.
        packing = packing_of(file.peek(16)) or named_packing(path)
        if packing is not None:
            yield from unpack(file, packing)
            return
        chunk = file.read(1 << 20).removeprefix(UTF8_MARK)
        while chunk:
            yield chunk
            chunk = file.read(1 << 20)


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines without the line feeds that end them, nor marks that they begin with.

    The last one, perhaps empty, is what follows the last line feed.
    """
    rest: list[bytes] = []
    for chunk in chunks:
        *whole, last = chunk.split(b"\n")
        if whole:
            whole[0] = b"".join([*rest, whole[0]])
            rest.clear()
        for line in whole:
            yield _unmarked(line)
        rest.append(last)
    yield _unmarked(b"".join(rest))


def _with_last(pieces: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Each piece, and whether it is the last."""
    before = None
    for piece in pieces:
        if before is not None:
            yield before, False
        before = piece
    if before is not None:
        yield before, True


def _unmarked(line: bytes) -> bytes:
    """A line without a byte order mark: files that have one may have been joined."""
    while line.startswith(UTF8_MARK):
        line = line.removeprefix(UTF8_MARK)
    return line


def _json_lines(
    content: _Content, lines: Iterable[bytes], text_field: str
) -> Iterator[tuple[str, str]]:
    for number, (line, last) in enumerate(_with_last(lines), 1):
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            text = _text(decoded(line), text_field)
        except NotTextError as error:
            if not (last and content.cut):  # which is counted already
                content.tally.add_bad(content.path, place, str(error))
            continue
        yield place, text


def _text(line: str, text_field: str) -> str:
    """The text of a JSON line."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        row = None
    except ValueError:  # Python's limit against inputs that take quadratic time
        raise NotTextError("not readable as JSON (a number of thousands of digits)") from None
    except RecursionError:
        raise NotTextError("not readable as JSON (nested too deeply)") from None
    text: Any = row.get(text_field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise NotTextError(
            f"not a JSON object with a text in the field {text_field!r} (config.data.text_field)"
        )
    if "\\u" in line and _has_lone_surrogates(text):
        raise NotTextError("not Unicode (half of a surrogate pair)")
    return text


def _has_lone_surrogates(text: str) -> bool:
    """Whether a JSON escape has put something into the text that no encoding can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _plain(content: _Content, whole_files: bool) -> Iterator[tuple[str, str]]:
    chunks = _with_line_feeds(content)
    if whole_files:
        pieces = iter([_MARKS_OF_LINES.sub(b"", b"".join(chunks)).rstrip(_END_OF_FILE)])
    else:
        pieces = _paragraphs(_lines(chunks))
    for number, (piece, last) in enumerate(_with_last(pieces), 1):
        if last and content.cut:
            return  # half a document, which is counted already
        place = f"document {number}"
        try:
            yield place, decoded(piece)
        except NotTextError as error:
            content.tally.add_bad(content.path, place, str(error))


def _with_line_feeds(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The same text, whose lines end with line feeds alone, instead of CR LF, CR CR LF or CR."""
    rest = b""
    for chunk in chunks:
        chunk = rest + chunk
        whole = chunk.rstrip(b"\r")
        rest = chunk[len(whole) :]  # a line feed may follow
        if b"\r" in whole:
            whole = re.sub(rb"\r+\n", b"\n", whole).replace(b"\r", b"\n")
        yield whole
    yield b"\n" * len(rest)


def _paragraphs(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Lines between blank ones, together.

    The last paragraph, perhaps empty, is what follows the last blank line that is whole.
    """
    paragraph: list[bytes] = []
    for line, last in _with_last(lines):
        line = line.rstrip(_END_OF_FILE) if last else line
        blank = _BLANK.match(line)
        if not blank:
            paragraph.append(line)
        if last or (blank and paragraph):
            yield b"\n".join(paragraph)
            paragraph.clear()
