"""Documents of local files, one after the other, with an account of what could not be read.

By a file's name: ``.jsonl`` and ``.json`` hold a JSON object a line (lines end with a line feed
alone: texts may hold U+2028 and its kin), ``.parquet`` a table, anything else plain text. ``.gz``,
``.xz`` and ``.zst`` behind that are unpacked on the way. Files are read as streams: an archive
needs no more memory than its longest line.
"""

from __future__ import annotations

import collections
import contextlib
import gzip
import json
import lzma
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

import pyarrow
import pyarrow.parquet
from backports import zstd

from loro_jax.training.errors import TrainingError

# Share of bad documents beyond which reading stops, unless told to go on.
MOST_BAD = 0.001

# A text longer than this is taken for a broken file rather than a document.
LONGEST_DOCUMENT = 50_000_000

_COMPRESSIONS = (".gz", ".xz", ".zst")


class Tally:
    """Counts good and bad documents, and stops the reading when too many are bad.

    Args:
        setting: what errors call the files ("config.data.source").
        skip: whether to go on however many are bad.

    Attributes:
        good: documents read.
        bad: counts of bad ones by reason.
        first: file, place and reason of the first bad one, or None.

    Example:
        >>> tally = Tally("config.data.source", skip=True)
        >>> tally.add_bad("a.jsonl", "line 3", "not a JSON object")
        >>> tally.close()
        >>> tally.report()
        'config.data.source: skipped 1 of 1 documents (1 not a JSON object)'
    """

    def __init__(self, setting: str, skip: bool):
        self._setting = setting
        self._skip = skip
        self.good = 0
        self.bad: collections.Counter[str] = collections.Counter()
        self.first: str | None = None

    def add_bad(self, path: str, place: str, reason: str) -> None:
        """Counts a document that could not be read, and where.

        Raises:
            TrainingError: if this makes too many of the first thousand, or of all since.
        """
        self._count(path, place, reason)
        self._judge(at_least=round(1 / MOST_BAD))

    def add_lost(self, path: str, place: str, reason: str) -> None:
        """Counts, as one, all documents behind a place from where a file can't be read.

        Raises:
            TrainingError: unless all is skipped: nobody knows how many they are.
        """
        self._count(path, place, reason)
        self._stop()

    def close(self) -> None:
        """Judges all that has been read.

        Raises:
            TrainingError: if too much of it was bad.
        """
        self._judge()

    def counts(self) -> dict[str, Any]:
        """All it has counted, as JSON takes it."""
        return {"good": self.good, "bad": dict(self.bad), "first": self.first}

    def restore(self, counts: dict[str, Any]) -> None:
        """Goes back to what :meth:`counts` returned."""
        self.good, self.first = counts["good"], counts["first"]
        self.bad = collections.Counter(counts["bad"])

    def report(self) -> str | None:
        """A line on what was skipped; None if nothing was."""
        if not self.bad:
            return None
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.bad.most_common())
        total = self.good + self.bad.total()
        return f"{self._setting}: skipped {self.bad.total()} of {total} documents ({reasons})"

    def _count(self, path: str, place: str, reason: str) -> None:
        self.bad[reason] += 1
        self.first = self.first or f"{path}, {place}: {reason}"

    def _judge(self, at_least: int = 0) -> None:
        if self.bad.total() > MOST_BAD * max(self.good + self.bad.total(), at_least):
            self._stop()

    def _stop(self) -> None:
        if not self._skip:
            raise TrainingError(
                f"{self._setting}: {self.first} ({self.bad.total()} bad of "
                f"{self.good + self.bad.total()} documents so far; {MOST_BAD:.1%} may be, or any "
                'number with config.data.bad_documents = "skip").'
            )


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
        TrainingError: from the tally, or for a table without such a column.
    """
    name = pathlib.Path(path)
    kind = name.with_suffix("").suffix if name.suffix in _COMPRESSIONS else name.suffix
    if kind == ".parquet":
        texts = _table(path, tally, text_field)
    elif kind in (".jsonl", ".json"):
        texts = _json_lines(path, tally, text_field)
    else:
        texts = _plain(path, tally, whole_files)
    for place, text in texts:
        if len(text) > LONGEST_DOCUMENT:
            tally.add_bad(path, place, f"text of more than {LONGEST_DOCUMENT:,} characters")
        elif text.strip():
            tally.good += 1
            yield text


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    """A binary stream of the unpacked content."""
    with contextlib.ExitStack() as stack:
        file: Any = stack.enter_context(open(path, "rb"))
        suffix = pathlib.Path(path).suffix
        if suffix == ".gz":
            file = stack.enter_context(gzip.open(file))
        elif suffix == ".xz":
            file = stack.enter_context(lzma.open(file))
        elif suffix == ".zst":
            file = stack.enter_context(zstd.open(file))
        yield file


def _chunks(path: str, tally: Tally) -> Iterator[bytes]:
    """The unpacked bytes. All that is behind a broken place counts as one bad document."""
    place = 0
    try:
        with _opened(path) as file:
            while chunk := file.read(1 << 20):
                place += len(chunk)
                yield chunk
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        tally.add_lost(path, f"byte {place:,} of the content", f"can't be read ({reason})")


def _pieces(path: str, tally: Tally, separator: bytes) -> Iterator[bytes]:
    """The file's bytes between separators."""
    rest = b""
    for chunk in _chunks(path, tally):
        *whole, rest = (rest + chunk).split(separator)
        yield from whole
    if rest:
        yield rest


def _json_lines(path: str, tally: Tally, text_field: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_pieces(path, tally, b"\n"), 1):
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            tally.add_bad(path, place, "not UTF-8")
            continue
        except json.JSONDecodeError:
            row = None
        text = row.get(text_field) if isinstance(row, dict) else None
        if isinstance(text, str) and not (b"\\u" in line and _has_lone_surrogates(text)):
            yield place, text
        elif isinstance(text, str):
            tally.add_bad(path, place, "not Unicode (half of a surrogate pair)")
        else:
            tally.add_bad(
                path,
                place,
                f"not a JSON object with a text in the field {text_field!r} "
                "(config.data.text_field)",
            )


def _has_lone_surrogates(text: str) -> bool:
    """Whether a JSON escape has put something into the text that no encoding can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _plain(path: str, tally: Tally, whole_files: bool) -> Iterator[tuple[str, str]]:
    pieces = [b"".join(_chunks(path, tally))] if whole_files else _pieces(path, tally, b"\n\n")
    for number, piece in enumerate(pieces, 1):
        place = f"document {number}"
        try:
            yield place, piece.decode("utf-8")
        except UnicodeDecodeError:
            tally.add_bad(path, place, "not UTF-8")


def _table(path: str, tally: Tally, text_field: str) -> Iterator[tuple[str, str]]:
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        tally.add_lost(path, "the table", f"not readable as Parquet ({error})")
        return
    with table:
        if text_field not in table.schema_arrow.names:
            raise TrainingError(
                f"{path} has no column {text_field!r} (config.data.text_field); it has "
                f"{', '.join(table.schema_arrow.names)}."
            )
        number = 0
        for batch in table.iter_batches(columns=[text_field]):
            for text in batch.column(0).to_pylist():
                number += 1
                if isinstance(text, str):
                    yield f"row {number}", text
                else:
                    tally.add_bad(path, f"row {number}", f"no text in the column {text_field!r}")
