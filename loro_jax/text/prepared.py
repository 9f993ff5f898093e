"""Prepared directories: shards on disk, described by a manifest.

``manifest.json`` is written last, so a directory that has one is complete. During preparation,
``progress.json`` lists the finished shards.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
import resource
from typing import Any, NamedTuple

from loro_jax.errors import TrainingError
from loro_jax.text.shards import Shard, TokenShards, map_shard
from loro_jax.text.tokenizers.tokenizer import Tokenizer

FORMAT = 1
MANIFEST = "manifest.json"
PROGRESS = "progress.json"
SPLITS = ("train", "validation")


class Prepared(NamedTuple):
    """An opened prepared directory.

    Attributes:
        train: its training documents.
        validation: its validation documents.
        fingerprint: identifies the tokens of both splits.
        notes: messages on skipped shards.
    """

    train: TokenShards
    validation: TokenShards
    fingerprint: str
    notes: list[str]


def is_prepared(source: str) -> bool:
    """Returns whether ``config.data.source`` names a directory."""
    return pathlib.Path(source).expanduser().is_dir()


def read_manifest(directory: pathlib.Path) -> dict[str, Any]:
    """Reads the manifest of a complete directory.

    Raises:
        TrainingError: if there is none, or it can't be read.
    """
    path = directory / MANIFEST
    if not path.exists():
        raise TrainingError(
            f"config.data.source = {str(directory)!r} holds an unfinished preparation; run the "
            "same `python -m loro_jax prepare` again to finish it."
            if (directory / PROGRESS).exists()
            else f"config.data.source = {str(directory)!r} is a directory without {MANIFEST}; "
            "expected one that `python -m loro_jax prepare` has written."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError):
        raise TrainingError(f"{path} can't be read as the manifest of prepared shards.") from None
    if version != FORMAT:
        raise TrainingError(
            f"{path} has format {version!r}, but this version reads format {FORMAT}; "
            "prepare the source again."
        )
    return manifest


def open_prepared(
    source: str, tokenizer: Tokenizer, skip: bool, expected_format: str = "text"
) -> Prepared:
    """Opens the shards of a prepared directory.

    Args:
        source: path of the directory.
        tokenizer: the run's tokenizer.
        skip: whether to skip missing or damaged shards.
        expected_format: the run's ``config.data.format``. Texts may be mixed with records of any
            format.

    Returns:
        Both splits.

    Raises:
        TrainingError: if the directory is incomplete, was written with another tokenizer, or a
            shard does not match the manifest and ``skip`` is False.
    """
    directory = pathlib.Path(source).expanduser()
    manifest = read_manifest(directory)
    made_by = manifest["tokenizer"]
    if (made_by["fingerprint"], made_by["eos_id"]) != (tokenizer.fingerprint, tokenizer.eos_id):
        raise TrainingError(
            f"config.data.source = {source!r} was prepared with the tokenizer "
            f"{made_by['name']!r} (fingerprint {made_by['fingerprint']}, end of text "
            f"{made_by['eos_id']}), but config.data.tokenizer has fingerprint "
            f"{tokenizer.fingerprint} and end of text {tokenizer.eos_id}."
        )
    stored_format = manifest["request"].get("format", "text")
    if stored_format not in ("text", expected_format):
        raise TrainingError(
            f"config.data.source = {source!r} holds records of format {stored_format!r}, but "
            f"config.data.format = {expected_format!r}."
        )
    # Two mapped files for each shard, and some for everything else.
    _allow_open_files(2 * len(manifest["shards"]) + 256)
    splits: dict[str, list[Shard]] = {name: [] for name in SPLITS}
    notes = []
    for entry in manifest["shards"]:
        try:
            splits[entry["split"]].append(_open_shard(directory, entry))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
            problem = f"{source}: shard {entry['name']} can't be used ({reason})"
            if not skip:
                raise TrainingError(
                    f"{problem}; restore it, prepare the source again, or skip it with "
                    'config.data.bad_documents = "skip".'
                ) from None
            notes.append(f"{problem}; its {entry['documents']:,} documents are skipped")
    used = {shard.name for shards in splits.values() for shard in shards}
    # The fingerprint covers the shards in use: a run that skips one is not resumed with it.
    content = [
        [entry["sha256"], entry["split"]]
        for entry in manifest["shards"]
        if str(directory / entry["name"]) in used
    ]
    return Prepared(
        TokenShards(splits["train"]),
        TokenShards(splits["validation"]),
        hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16],
        notes,
    )


def _open_shard(directory: pathlib.Path, entry: dict[str, Any]) -> Shard:
    """Memory-maps a shard; compares its lengths, not its bytes, with the manifest."""
    shard = map_shard(directory / entry["name"])
    # Comparing bytes would read the whole shard at every start; `verify` does that.
    found = (len(shard.tokens), len(shard.ends), int(shard.ends[-1]) if len(shard.ends) else 0)
    expected = (entry["tokens"], entry["documents"], entry["tokens"])
    if found != expected:
        raise ValueError(
            f"it holds {found[0]:,} tokens in {found[1]:,} documents, but {MANIFEST} says "
            f"{expected[0]:,} in {expected[1]:,}"
        )
    return shard


def verify(directory: pathlib.Path) -> list[str]:
    """Compares every byte of a prepared directory with its manifest.

    Args:
        directory: the directory.

    Returns:
        One line for each file that is missing or differs.

    Raises:
        TrainingError: if there is no manifest.
    """
    problems = []
    for entry in read_manifest(directory)["shards"]:
        for name, expected in entry["sha256"].items():
            path = directory / name
            try:
                found = file_sha256(path)
            except OSError as error:
                problems.append(f"{path}: {error.strerror}")
                continue
            if found != expected:
                problems.append(f"{path}: its bytes have changed since it was written")
    return problems


def file_sha256(path: pathlib.Path) -> str:
    """Returns the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _allow_open_files(count: int) -> None:
    """Increases the soft limit of open files, because every mapping holds one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        with contextlib.suppress(ValueError, OSError):
            limit = count if hard == resource.RLIM_INFINITY else min(count, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
