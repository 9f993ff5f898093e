"""Tables of results: printed as Markdown, and written to JSON with their environment."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import pathlib
import platform
import time
from collections.abc import Iterator
from typing import Any

import jax

# Environment variables that affect speed.
_VARIABLES = ("XLA_FLAGS", "GLIBC_TUNABLES", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")


def environment() -> dict[str, Any]:
    """Returns the device, versions, and environment variables that results depend on."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        **{name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """Prints dicts with the same keys as a Markdown table."""
    names = list(rows[0])
    cells = [names, ["---"] * len(names)]
    cells += [[_format(row[name]) for name in names] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    for row in cells:
        print("| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |")


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Prints the rows, and writes them to ``options.json`` with the environment and the command.

    ``options.more`` may contain further tables by name.
    """
    print(environment())
    print_table(rows)
    more = getattr(options, "more", {})
    for table in more.values():
        print_table(table)
    if options.json:
        result = {"command": options.command, "environment": environment(), "rows": rows, **more}
        # NaN is not JSON: other programs could not read the file.
        text = json.dumps(_strict(result), indent=2, allow_nan=False)
        with replacing(pathlib.Path(options.json)) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary path in a file's folder; replaces the file by it if nothing is raised.

    Args:
        path: the file to be written completely or not at all.

    Yields:
        The path to write to.

    Example:
        >>> import tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.txt"
        >>> with replacing(path) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> path.read_text()
        'whole'
    """
    # With the process's number, because two processes may share a comparison.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _strict(value: Any) -> Any:
    """Replaces numbers that are not finite, which JSON does not allow, by null."""
    if isinstance(value, dict):
        return {name: _strict(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _format(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
