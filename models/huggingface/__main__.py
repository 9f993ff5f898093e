"""``python -m models.huggingface``: a run as a directory of Hugging Face's format, and back.

    python -m models.huggingface export runs/60m out            # for any program that serves LLaMA
    python -m models.huggingface export runs/60m out --keep-factors    # for this one
    python -m models.huggingface import llama-dir out --rank=128       # a truncated SVD

A run starts from a directory of either kind with ``train.py --config.init_from=out``.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import sys
from collections.abc import Sequence

from loro_jax.training.errors import TrainingError
from loro_jax.training.trained import load_run
from models.huggingface import CheckpointError, LayerError, read_model, write_model
from models.huggingface.files import DTYPES
from models.huggingface.writing import SHARD_BYTES

# What goes with a model and is neither its config nor its tensors.
_COMPANIONS = ("tokenizer*", "special_tokens_map.json", "generation_config.json")


def main(arguments: Sequence[str]) -> int:
    """Runs the command; the exit status."""
    options = _parser().parse_args(arguments)
    try:
        {"export": _export, "import": _import}[options.command](options)
    except (CheckpointError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _export(options: argparse.Namespace) -> None:
    run = load_run(options.source, options.step)
    tokenizer = run.tokenizer
    total = write_model(
        run.model,
        options.out,
        dtype=options.dtype or run.config.model.param_dtype,
        keep_factors=options.keep_factors,
        files=tokenizer.files(),
        token_ids={"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id},
        shard_bytes=options.shard_bytes,
    )
    print(f"step {run.step} of {options.source}: {total / 1e6:.1f} MB in {options.out}")


def _import(options: argparse.Namespace) -> None:
    model, errors = read_model(options.source, rank=options.rank, dtype=options.dtype)
    companions = {
        path.name: path.read_bytes()
        for pattern in _COMPANIONS
        for path in pathlib.Path(options.source).glob(pattern)
    }
    dtype = model.config.param_dtype
    keywords = {"dtype": dtype, "keep_factors": True, "shard_bytes": options.shard_bytes}
    total = write_model(model, options.out, files=companions, **keywords)
    if errors:
        print(error_table(errors))
    print(f"{total / 1e6:.1f} MB in {options.out}")


def error_table(errors: Sequence[LayerError]) -> str:
    """The relative error of each projection, as a Markdown table.

    Example:
        >>> print(error_table([LayerError("mlp.up_proj", (48, 32), 8, 0.25)]))
        | projection | shape | rank | relative error |
        |---|---|---|---|
        | mlp.up_proj | 48 x 32 | 8 | 0.2500 |
    """
    head = ["| projection | shape | rank | relative error |", "|---|---|---|---|"]
    rows = [
        f"| {e.name} | {e.shape[0]} x {e.shape[1]} | {e.rank} | {e.error:.4f} |" for e in errors
    ]
    return "\n".join(head + rows)


def _size(text: str) -> int:
    """Bytes, from "5GB", "200MB" or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip().upper())
    if match is None or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 5GB")
    return int(float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}[match[2]])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.huggingface",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="a run directory as a Hugging Face one")
    export.add_argument("source", metavar="RUN_DIR")
    export.add_argument("--keep-factors", action="store_true", help="store B and A, not B A")
    export.add_argument("--step", type=int, help="of the checkpoint; default: the last")
    importing = commands.add_parser("import", help="a Hugging Face LLaMA, factored on the way")
    importing.add_argument("source", metavar="HF_DIR")
    importing.add_argument("--rank", type=int, help="factorise by truncated SVD")
    for command in (export, importing):
        command.add_argument("out", metavar="OUT")
        command.add_argument("--dtype", choices=list(DTYPES), help="default: as stored")
        command.add_argument(
            "--shard-bytes", type=_size, default=SHARD_BYTES, metavar="SIZE", help="default: 5GB"
        )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
