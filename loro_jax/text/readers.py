"""Reading of documents from local files, with a tally of those that could not be read.

The format is detected by a file's name and content: JSON lines with one object per line (only line
feeds end lines, because texts may contain U+2028 and similar), Parquet tables, or plain text, whose
documents are separated by blank lines. Compressed files are decompressed on the fly (archives.py).
Files are streamed: memory is bounded by the longest document.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator

from loro_jax.text.archives import UTF8_MARK, ArchiveError, packing_of, unpack
from loro_jax.text.content import (
    HEAD,
    TEXT_MARK,
    NotTextError,
    decoded,
    is_json,
    is_table,
    named_packing,
    refused_content,
    refused_json,
    refused_name,
)
from loro_jax.text.marked import Marked
from loro_jax.text.records import Records, TextField
from loro_jax.text.tables import table_texts
from loro_jax.text.tally import MOST_BAD, Tally

__all__ = ["LONGEST_DOCUMENT", "MOST_BAD", "Tally", "read_documents"]

# A longer text is considered a broken file, not a document.
LONGEST_DOCUMENT = 50_000_000

# A line of Unicode white space only, in UTF-8.
_BLANK = re.compile(
    rb"(?:[\t\x0b-\r\x1c- ]|\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]"
    rb"|\xe2\x81\x9f|\xe3\x80\x80)*\Z"
)
_END_OF_FILE = b"\x1a"  # written by CP/M and DOS
_MARKS_OF_LINES = re.compile(rb"(?:\A|(?<=\n))(?:\xef\xbb\xbf)+")


def read_documents(
    path: str,
    tally: Tally,
    text_field: str,
    whole_files: bool,
    records: Records | None = None,
) -> Iterator[str]:
    """Yields the texts of one file in order, skipping those of white space only.

    Byte order marks at the beginning of a text are removed, wherever it comes from.

    Args:
        path: the file.
        tally: counts good and bad documents.
        text_field: the field of a JSON object, or the column of a table, that holds the text.
        whole_files: whether a plain text file is one document, instead of one per paragraph.
        records: makes documents of JSON objects or rows of a table; None: they hold texts in
            ``text_field``.

    Yields:
        Texts.

    Raises:
        TrainingError: from the tally, or for a table without such a text column.
    """
    fields = TextField(text_field) if records is None else records
    for place, text in _texts(path, tally, fields, whole_files):
        if not isinstance(text, Marked):  # whose spans count characters from its start
            text = text.lstrip(TEXT_MARK)
        if len(text) > LONGEST_DOCUMENT:
            tally.add_bad(path, place, f"text of more than {LONGEST_DOCUMENT:,} characters")
        elif text.strip():
            tally.good += 1
            yield text


def _texts(
    path: str, tally: Tally, fields: Records, whole_files: bool
) -> Iterator[tuple[str, str]]:
    """Yields places and texts of a file of any format."""
    try:
        reason = refused_name(path)
        table = reason is None and is_table(path)
    except OSError as error:
        reason = f"can't be read ({error.strerror or error})"
    if reason is not None:
        tally.add_lost(path, "the file", reason)
    elif table:
        yield from table_texts(path, tally, fields)
    else:
        yield from _streamed(_Content(path, tally), fields, whole_files)


class _Content:
    """The decompressed bytes of a file; an unreadable rest counts as one bad document.

    Attributes:
        path: the file.
        tally: counts bad documents.
        cut: after reading, whether the last document may be truncated.
    """

    def __init__(self, path: str, tally: Tally):
        self.path = path
        self.tally = tally
        self.cut = False
        self._lost: tuple[str, str] | None = None
        self._chunks = self._read()

    def head(self) -> bytes:
        """Returns the first bytes without consuming them."""
        chunks, size = [], 0
        for chunk in self._chunks:
            chunks.append(chunk)
            size += len(chunk)
            if size >= HEAD:
                break
        # Given back, so that reading starts from the beginning.
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
            # Reported by __iter__ after all content before the error has been used.
            self._lost = f"byte {place:,} of the content", f"can't be read ({reason})"


def _streamed(content: _Content, fields: Records, whole_files: bool) -> Iterator[tuple[str, str]]:
    """Yields places and texts of a file that is not a table."""
    head = content.head()
    place, reason = "the file", refused_content(head)
    json_lines = is_json(content.path, head, whole_files)
    if reason is None and json_lines:
        place, reason = "line 1", refused_json(head)
    elif reason is None and not isinstance(fields, TextField):
        reason = f"plain text; expected JSON lines or Parquet, with {' and '.join(fields.columns)}"
    if reason is not None:
        content.tally.add_lost(content.path, place, reason)
    elif json_lines:
        # Old Mac files end lines with a carriage return alone.
        only_cr = b"\r" in head and b"\n" not in head  # valid JSON contains neither inside a string
        lines = _lines(_with_line_feeds(content) if only_cr else content)
        yield from _json_lines(content, lines, fields)
    else:
        yield from _plain(content, whole_files)


def _unpacked(path: str) -> Iterator[bytes]:
    """Yields the decompressed content of a file, without a byte order mark."""
    with open(path, "rb") as file:
        # The content decides: a file may be compressed although its name says otherwise.
        packing = packing_of(file.peek(16)) or named_packing(path)
        if packing is not None:
            yield from unpack(file, packing)
            return
        chunk = file.read(1 << 20).removeprefix(UTF8_MARK)
        while chunk:
            yield chunk
            chunk = file.read(1 << 20)


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Splits chunks into lines, without line feeds and leading byte order marks.

    The last line, possibly empty, is everything after the last line feed.
    """
    rest: list[bytes] = []
    for chunk in chunks:
        *whole, last = chunk.split(b"\n")
        if whole:
            # Pieces of a long line are joined once; adding them one by one would take quadratic
            # time.
            whole[0] = b"".join([*rest, whole[0]])
            rest.clear()
        for line in whole:
            yield _unmarked(line)
        rest.append(last)
    yield _unmarked(b"".join(rest))


def _with_last(pieces: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Yields each piece with whether it is the last."""
    before = None
    for piece in pieces:
        if before is not None:
            yield before, False
        before = piece
    if before is not None:
        yield before, True


def _unmarked(line: bytes) -> bytes:
    """Removes byte order marks from a line: files that begin with one may have been joined."""
    while line.startswith(UTF8_MARK):
        line = line.removeprefix(UTF8_MARK)
    return line


def _json_lines(
    content: _Content, lines: Iterable[bytes], fields: Records
) -> Iterator[tuple[str, str]]:
    for number, (line, last) in enumerate(_with_last(lines), 1):
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            text = _text(decoded(line), fields)
        except NotTextError as error:
            if not (last and content.cut):  # otherwise already counted
                content.tally.add_bad(content.path, place, str(error))
            continue
        yield place, text


def _text(line: str, fields: Records) -> str:
    """Returns the document of a JSON line."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        row = None
    except ValueError:  # Python limits the length of integers, whose parsing takes quadratic time
        raise NotTextError("not readable as JSON (a number of thousands of digits)") from None
    except RecursionError:
        raise NotTextError("not readable as JSON (nested too deeply)") from None
    text = fields.document(row)
    if "\\u" in line and _has_lone_surrogates(text):
        raise NotTextError("not Unicode (half of a surrogate pair)")
    return text


def _has_lone_surrogates(text: str) -> bool:
    """Returns whether a text holds lone surrogates, from JSON escapes."""
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
            return  # a truncated document, already counted
        place = f"document {number}"
        try:
            yield place, decoded(piece)
        except NotTextError as error:
            content.tally.add_bad(content.path, place, str(error))


def _with_line_feeds(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Converts the line ends CR LF, CR CR LF and CR to LF."""
    rest = b""
    for chunk in chunks:
        chunk = rest + chunk
        whole = chunk.rstrip(b"\r")
        rest = chunk[len(whole) :]  # a line feed may follow in the next chunk
        if b"\r" in whole:
            whole = re.sub(rb"\r+\n", b"\n", whole).replace(b"\r", b"\n")
        yield whole
    yield b"\n" * len(rest)


def _paragraphs(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Joins lines between blank ones into paragraphs.

    The last paragraph, possibly empty, is everything after the last complete blank line.
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
