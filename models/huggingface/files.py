"""Files of a checkpoint directory: tensors, sharded if large, and JSON.

A directory is written under a temporary name and renamed when it is complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import ml_dtypes  # a dependency of JAX; registers bfloat16 with NumPy
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from models.huggingface.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def check_dtype(name: str) -> None:
    """Raises CheckpointError unless tensors can be stored in a dtype of this name."""
    if name not in DTYPES:
        raise CheckpointError(f"dtype must be one of {', '.join(DTYPES)}, but is {name!r}.")


@contextlib.contextmanager
def new_directory(out: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields a temporary directory, renamed to ``out`` on success and removed on failure.

    Args:
        out: the final path; must not exist, or must be an empty directory.

    Raises:
        CheckpointError: if ``out`` exists or can't be written.
    """
    target = pathlib.Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists already; expected a path that does not exist.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # On the same file system as the target, so that the final rename is atomic.
        partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise CheckpointError(f"{target} can't be written ({error.strerror}).") from None
    try:
        yield partial
        partial.chmod(0o755)
        partial.replace(target)
    except (OSError, SafetensorError) as error:  # a full disk raises either
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{target} can't be written ({reason}).") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_tensors(
    directory: pathlib.Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int
) -> int:
    """Writes tensors as they arrive, holding at most one shard in memory.

    Args:
        directory: directory to write to.
        tensors: names and values.
        shard_bytes: upper bound on a shard's size, unless a single tensor is larger.

    Returns:
        Total bytes of the tensors.
    """
    parts: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    size = total = 0

    # The number of files is part of their names, and not known until the last one is written.
    def flush() -> None:
        part = directory / f"part-{len(parts)}"
        save_file(held, part, metadata={"format": "pt"})
        part.chmod(0o644)  # safetensors makes it readable by the owner only
        parts.append(list(held))
        held.clear()

    for name, value in tensors:
        if held and size + value.nbytes > shard_bytes:
            flush()
            size = 0
        held[name] = np.asarray(value, order="C")  # ascontiguousarray would make scalars vectors
        size += value.nbytes
        total += value.nbytes
    flush()
    if len(parts) == 1:
        (directory / "part-0").rename(directory / SINGLE)
        return total
    weight_map: dict[str, str] = {}
    for i, names in enumerate(parts):
        name = f"model-{i + 1:05}-of-{len(parts):05}.safetensors"
        (directory / f"part-{i}").rename(directory / name)
        weight_map |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        CheckpointError: if the file is missing, can't be read or holds no JSON object.
    """
    try:
        # Some editors write a byte order mark.
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read as JSON ({error}).") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return content
