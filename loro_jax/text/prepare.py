"""Tokenisation of a source, once, into a prepared directory.

Documents are read in order by one thread, encoded by several, and written in order: the shards
depend neither on the number of threads nor on interruptions. After each shard the position in the
source is recorded, from which the same command resumes after a kill.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from loro_jax.errors import TrainingError
from loro_jax.text.config import DataConfig
from loro_jax.text.documents import Part, PartReader, Position
from loro_jax.text.encoding import encode_chunks, token_dtype
from loro_jax.text.prepared import (
    FORMAT,
    MANIFEST,
    PROGRESS,
    SPLITS,
    file_sha256,
    is_prepared,
)
from loro_jax.text.shards import make_shard
from loro_jax.text.sources import no_document, source_parts
from loro_jax.text.tokenizers.tokenizer import Tokenizer

# Tokens per shard, over both splits: 256 MB at two bytes each.
SHARD_TOKENS = 1 << 27

# Incremented when reading changes, because recorded positions then mean other documents.
READER = 2

_LOCK = "prepare.lock"


@dataclasses.dataclass
class Progress:
    """Progress of a preparation.

    Attributes:
        part: index of the part being read.
        parts: number of parts.
        documents: documents written so far.
        tokens: tokens of these documents.
        seconds: time since this process started.
        new_tokens: tokens encoded by this process.
    """

    part: int
    parts: int
    documents: int
    tokens: int
    seconds: float
    new_tokens: int


def prepare(
    config: DataConfig,
    tokenizer: Tokenizer,
    out: str,
    *,
    shard_tokens: int = SHARD_TOKENS,
    threads: int = 0,
    report: Callable[[Progress], None] = lambda _: None,
) -> dict[str, Any]:
    """Writes the shards of a source, or those still missing.

    Args:
        config: uses ``source``, ``validation``, ``bad_documents``, ``data_dir`` and the fields on
            the format of records; ``tokenizer`` is recorded as a name.
        tokenizer: the tokenizer.
        out: the directory to write; created if missing.
        shard_tokens: number of tokens at which a shard is closed.
        threads: encoding threads; 0: one per core.
        report: called with the progress after each chunk.

    Returns:
        The manifest.

    Raises:
        TrainingError: if the source can't be read, has no training or no validation document, or
            the directory holds something else.
    """
    if ";" in config.source or is_prepared(config.source):
        raise TrainingError(
            f"config.data.source = {config.source!r}: expected one source of text (prepare "
            "several one by one, and mix the prepared directories)."
        )
    parts, held_out = source_parts(config.source, config)
    request = _request(config, tokenizer, parts, shard_tokens)
    directory = pathlib.Path(out).expanduser()
    with _claimed(directory, request) as record:
        if record.get("complete"):
            return record
        writer = _Writer(directory, record, tokenizer)
        position = Position(**record["position"]) if record["position"] else None
        reader = PartReader(parts, config.bad_documents == "skip", held_out)
        # Documents of shards that an interrupted preparation has written count as done.
        progress = Progress(0, len(parts), *writer.totals(), 0.0, 0)
        started = time.monotonic()
        for chunk, documents in encode_chunks(reader.chunks(position), tokenizer, threads):
            writer.add(chunk.splits, documents)
            progress.part = chunk.end.part
            progress.documents += len(documents)
            new = sum(map(len, documents))
            progress.tokens += new
            progress.new_tokens += new
            progress.seconds = time.monotonic() - started
            report(progress)
            if writer.waiting >= shard_tokens:
                # Between two chunks, where the position is known; a shard may exceed the limit by
                # one chunk.
                writer.flush(chunk.end)
        return writer.finish(config, reader)


def _request(
    config: DataConfig, tokenizer: Tokenizer, parts: list[Part], shard_tokens: int
) -> dict[str, Any]:
    """Returns everything the shards depend on; a preparation resumes only if it is unchanged."""
    # Names and sizes: a hash of the contents would take as long as reading them.
    inputs = json.dumps([[part.name, part.size, part.split] for part in parts])
    fields = ("source", "validation", "text_field", "text_files", "bad_documents")
    return {
        **{name: getattr(config, name) for name in fields},
        **_format(config, tokenizer),
        "inputs": len(parts),
        "inputs_sha256": hashlib.sha256(inputs.encode()).hexdigest(),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "eos_id": tokenizer.eos_id,
        "shard_tokens": shard_tokens,
        "reader": READER,
    }


def _format(config: DataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns what the documents of records depend on; nothing for texts."""
    used = {
        "text": (),
        "prompt_answer": ("prompt_field", "answer_field", "separator"),
        "chat": ("messages_field",),
    }[config.format]
    found = {name: getattr(config, name) for name in ("format", *used) if used}
    if config.format == "prompt_answer":
        found["bos"] = tokenizer.adds_bos
    if config.format == "chat":
        from loro_jax.text.chat import load_template  # needs jinja2, which only chats use

        found["chat_template"] = load_template(config).fingerprint
    return found


@contextlib.contextmanager
def _claimed(directory: pathlib.Path, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Locks the directory and yields the record of the shards it already holds."""
    try:
        if directory.exists() and not directory.is_dir():
            raise TrainingError(f"--out={directory} is a file; expected a directory.")
        # Each of these alone may be what a kill has left.
        known = {MANIFEST, PROGRESS, PROGRESS + ".tmp", _LOCK}
        present = {entry.name for entry in directory.iterdir()} if directory.exists() else set()
        if present and not present & known:
            raise TrainingError(
                f"--out={directory} is not empty and not a prepared directory (it holds "
                f"{min(present)!r}); choose another."
            )
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / _LOCK).open("w")
    except OSError as error:
        raise TrainingError(f"--out={directory} can't be written ({error.strerror}).") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise TrainingError(f"--out={directory} is being written by another process.") from None
        try:
            record = _record(directory, request)
            if not record.get("complete"):
                # Marks the directory as a prepared one from now on.
                _write_json(directory / PROGRESS, record)
            yield record
        finally:
            # While the lock is still held.
            (directory / _LOCK).unlink(missing_ok=True)


def _record(directory: pathlib.Path, request: dict[str, Any]) -> dict[str, Any]:
    for name, complete in ((MANIFEST, True), (PROGRESS, False)):
        path = directory / name
        if not path.exists():
            continue
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            stored = record["request"]
        except (OSError, ValueError, KeyError, TypeError):
            raise TrainingError(f"{path} can't be read; choose another --out.") from None
        differing = [
            f"{key}: {stored.get(key)!r} there, {value!r} now"
            for key, value in request.items()
            # A complete directory has no position, so the version of the reader does not matter any
            # more.
            if stored.get(key) != value and not (complete and key == "reader")
        ]
        if differing:
            raise TrainingError(
                f"--out={directory} holds another preparation "
                f"({'; '.join(differing)}); choose another directory."
            )
        return record | {"complete": complete} if complete else record
    return {"format": FORMAT, "request": request, "shards": [], "position": None}


class _Writer:
    """Collects documents and writes them as shards."""

    def __init__(self, directory: pathlib.Path, record: dict[str, Any], tokenizer: Tokenizer):
        self._directory = directory
        self._record = record
        self._tokenizer = tokenizer
        self._documents: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        self.waiting = 0

    def totals(self) -> tuple[int, int]:
        """Returns the numbers of documents and tokens on disk."""
        shards = self._record["shards"]
        return sum(s["documents"] for s in shards), sum(s["tokens"] for s in shards)

    def add(self, splits: list[str], documents: list[np.ndarray]) -> None:
        """Holds documents of either split until the next flush."""
        for split, document in zip(splits, documents, strict=True):
            self._documents[split].append(document)
            self.waiting += len(document)

    def flush(self, position: Position | None) -> None:
        """Writes a shard for each split that has documents, then the position."""
        for split, documents in self._documents.items():
            # First the shards, then the position that counts them. After a kill in between, the
            # same documents are written again, to files of the same names.
            if documents:
                self._write_shard(split, documents)
                documents.clear()
        self.waiting = 0
        if position is not None:
            self._record["position"] = position._asdict()
            _write_json(self._directory / PROGRESS, self._record)

    def _write_shard(self, split: str, documents: list[np.ndarray]) -> None:
        # Shards that the record does not list do not count: they are overwritten.
        number = sum(shard["split"] == split for shard in self._record["shards"])
        name = f"{split}-{number:05d}"
        marked = "format" in self._record["request"]
        shard = make_shard(documents, token_dtype(self._tokenizer.vocab_size, marked), name)
        digests = {}
        for kind, array in (("tokens", shard.tokens), ("ends", shard.ends)):
            path = self._directory / f"{name}.{kind}.npy"
            _replace(path, functools.partial(np.save, arr=array, allow_pickle=False))
            digests[path.name] = file_sha256(path)
        self._record["shards"].append(
            {
                "name": name,
                "split": split,
                "documents": len(shard.ends),
                "tokens": len(shard.tokens),
                "sha256": digests,
            }
        )

    def finish(self, config: DataConfig, reader: PartReader) -> dict[str, Any]:
        """Writes the remaining documents and the manifest."""
        self.flush(None)
        splits = {}
        for split in SPLITS:
            own = [shard for shard in self._record["shards"] if shard["split"] == split]
            splits[split] = {
                "documents": sum(shard["documents"] for shard in own),
                "tokens": sum(shard["tokens"] for shard in own),
            }
            if not own:
                raise TrainingError(f"config.data.source = {config.source!r} {no_document(split)}")
        manifest = {
            **{key: value for key, value in self._record.items() if key != "position"},
            "tokenizer": {
                "name": config.tokenizer,
                "fingerprint": self._tokenizer.fingerprint,
                "vocab_size": self._tokenizer.vocab_size,
                "eos_id": self._tokenizer.eos_id,
            },
            "splits": splits,
            "bad_documents": reader.bad(),
            "notes": reader.notes(),
        }
        # The manifest marks the directory as complete, so it is the last file to appear; the record
        # of progress is removed only after that.
        _write_json(self._directory / MANIFEST, manifest)
        (self._directory / PROGRESS).unlink(missing_ok=True)
        return manifest


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1) + "\n"
    _replace(path, lambda file: file.write(text.encode()))


def _replace(path: pathlib.Path, write: Callable[[Any], Any]) -> None:
    """Writes a file to a temporary name, syncs it to disk and renames it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            # Before the rename: otherwise a power cut could leave the name with an empty file.
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise TrainingError(
            f"{path} can't be written ({error.strerror}); make room and run the same command again."
        ) from None
