"""Files of a directory: tensors, several where one file would be too large, and JSON.

Nothing is ever seen half-written: a directory is filled under another name and takes its own when
it is complete.
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

import ml_dtypes  # comes with JAX; teaches NumPy bfloat16
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from models.huggingface.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@contextlib.contextmanager
def new_directory(out: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A directory to fill, which becomes ``out`` if nothing fails and vanishes if something does.

    Args:
        out: must not exist, or be an empty directory.

    Raises:
        CheckpointError: if it does, or its parent can't be written to.
    """
    target = pathlib.Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists already; expected a name that is free.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise CheckpointError(f"{target} can't be written ({error.strerror}).") from None
    try:
        yield partial
        partial.chmod(0o755)
        partial.replace(target)
    except (OSError, SafetensorError) as error:  # a full disk is either, as the file may be
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{target} can't be written ({reason}).") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_tensors(
    directory: pathlib.Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int
) -> int:
    """Writes tensors as they come, holding one file's worth of them.

    Args:
        directory: where.
        tensors: names and values.
        shard_bytes: size that a file does not exceed, unless a single tensor does.

    Returns:
        Bytes of all tensors.
    """
    parts: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    size = total = 0

    def flush() -> None:
        part = directory / f"part-{len(parts)}"
        save_file(held, part, metadata={"format": "pt"})
        part.chmod(0o644)  # safetensors makes it the owner's alone
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
    """A JSON object from a file.

    Raises:
        CheckpointError: if there is none.
    """
    try:
        # With or without a mark of the byte order, as editors leave it.
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read as JSON ({error}).") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return content
