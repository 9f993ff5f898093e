"""``python -m loro_jax NAME [options]``: all commands except ``python train.py``."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

PROGRAM = "python -m loro_jax"


class Command(NamedTuple):
    """A command.

    Attributes:
        summary: one line for the overview.
        module: the module that implements it, imported only when the command runs.
        function: the module's function, (arguments) -> exit status.
        networks: whether it needs the networks in ``models/``.
    """

    summary: str
    module: str
    function: str = "main"
    networks: bool = True


COMMANDS = {
    "generate": Command("continue a text with a model", "loro_jax.commands.generate"),
    "evaluate": Command("perplexity of a model on a text", "loro_jax.commands.evaluate"),
    "export": Command(
        "write a run as a directory in Hugging Face's format",
        "loro_jax.commands.weights",
        "export_main",
    ),
    "import": Command(
        "read a LLaMA in Hugging Face's format, and factor it",
        "loro_jax.commands.weights",
        "import_main",
    ),
    "compress": Command(
        "make low-rank pairs of a dense LLaMA's projections", "loro_jax.commands.compress"
    ),
    "healing": Command(
        "perplexity over parameters of compressed models, before and after training",
        "loro_jax.commands.healing",
    ),
    "tokenizer": Command(
        "train a tokenizer on your own text", "loro_jax.commands.tokenizer", networks=False
    ),
    "prepare": Command(
        "encode a text once, into shards that runs read",
        "loro_jax.commands.prepare",
        networks=False,
    ),
    "verify": Command(
        "compare every byte of prepared shards with their manifest",
        "loro_jax.commands.prepare",
        "verify_main",
        networks=False,
    ),
    "memory": Command("parameters and memory of every method", "loro_jax.commands.memory"),
    "compare": Command(
        "train methods side by side, with learning rates and seeds", "loro_jax.commands.compare"
    ),
    "plot": Command(
        "perplexity over tokens and FLOPs, from the table of a comparison",
        "loro_jax.study.validation_plot",
        networks=False,
    ),
    "sweep": Command(
        "train an arm's learning rates and seeds together, small models on one device",
        "loro_jax.commands.sweep",
    ),
    "glue": Command("tasks and methods of finished runs on GLUE", "loro_jax.commands.glue"),
    "stability": Command(
        "spikes of the loss and condition numbers of finished runs", "loro_jax.study.stability"
    ),
    "inspect": Command(
        "spectra of products and factors, and the line between two models",
        "loro_jax.commands.inspect",
    ),
    "bench": Command("benchmarks for this machine", "loro_jax.bench.__main__"),
}


def main(arguments: Sequence[str]) -> int:
    """Runs the command that the first argument names; without one, lists them.

    Args:
        arguments: the command line's arguments.

    Returns:
        The exit status.
    """
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help", "help"):
        print(_overview())
        return 0
    command = COMMANDS.get(name)
    if command is None:
        likely = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {likely[0]!r}?" if likely else ""
        print(f"error: there is no command {name!r}{hint} ({PROGRAM} lists them)", file=sys.stderr)
        return 2
    if command.networks and not _networks_are_here():
        print(
            f"error: {PROGRAM} {name} needs the networks in models/, which are part of the "
            "repository and not of the installed package; run it from a checkout.",
            file=sys.stderr,
        )
        return 1
    try:
        # Imported only now, because each command needs other packages.
        module = importlib.import_module(command.module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        # A module of our own that is missing is a mistake of ours, not an extra to install.
        if missing in ("loro_jax", "models", ""):
            raise
        print(
            f"error: {PROGRAM} {name} needs {missing}, which is not installed; "
            "pip install 'loro-jax[train]'.",
            file=sys.stderr,
        )
        return 1
    return getattr(module, command.function)(rest) or 0


def moved(name: str, arguments: Sequence[str]) -> int:
    """Runs a command called by its old spelling, and prints the new one on standard error.

    Args:
        name: the command.
        arguments: its arguments.

    Returns:
        The exit status.
    """
    print(f"moved: {PROGRAM} {name}", file=sys.stderr)
    return main([name, *arguments])


def _networks_are_here() -> bool:
    """Returns whether ``models`` is the checkout's, not another package of that name."""
    found = importlib.util.find_spec("models")
    folders = (found and found.submodule_search_locations) or []
    return any((pathlib.Path(folder) / "llama.py").is_file() for folder in folders)


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} NAME [options]",
            "",
            *lines,
            "",
            f"{PROGRAM} NAME --help describes a command; python train.py trains.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
