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
from collections.abc import Iterator, Sequence

from loro_jax.errors import TrainingError
from loro_jax.text.tokenizers.tokenizer import Tokenizer
from loro_jax.training.trained import load_run
from models.huggingface import CheckpointError, LayerError, read_model, write_model
from models.huggingface.companions import read_companions, read_token_ids
from models.huggingface.files import DTYPES, read_json
from models.huggingface.writing import SHARD_BYTES, zero_matrices
from models.llama import Llama


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
        token_ids=_token_ids(tokenizer),
        shard_bytes=options.shard_bytes,
    )
    print(f"step {run.step} of {options.source}: {total / 1e6:.1f} MB in {options.out}")


def _token_ids(tokenizer: Tokenizer) -> dict[str, int | list[int] | None]:
    """What ``config.json`` says of a run's tokenizer."""
    ends = list(getattr(tokenizer, "eos_ids", (tokenizer.eos_id,)))
    ids: dict[str, int | list[int] | None] = {
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": tokenizer.pad_id,
    }
    begin = getattr(tokenizer, "bos_id", None)
    return ids if begin is None else {"bos_token_id": begin, **ids}


def _import(options: argparse.Namespace) -> None:
    source = pathlib.Path(options.source)
    ranks = {"rank": options.rank, "attn_rank": options.attn_rank, "mlp_rank": options.mlp_rank}
    model, errors = read_model(source, **ranks, dtype=options.dtype)
    config = source / "config.json"
    total = write_model(
        model,
        options.out,
        dtype=model.config.param_dtype,
        keep_factors=True,
        files=read_companions(source),
        token_ids=read_token_ids(read_json(config), str(config)),
        shard_bytes=options.shard_bytes,
    )
    if errors:
        print(error_table(errors))
    for note in _notes(model, errors, options):
        print(f"note: {note}")
    print(f"{total / 1e6:.1f} MB in {options.out}")


def _notes(
    model: Llama, errors: Sequence[LayerError], options: argparse.Namespace
) -> Iterator[str]:
    """What an import did that its user may not expect."""
    asked, given = options.rank, model.config.attn_rank
    if errors and options.attn_rank is None and given not in (None, asked):
        yield (
            f"attention is factored at rank {given}, not {asked}: keys and values have {given} "
            "rows (--attn-rank asks for another)."
        )
    for error in errors:
        if error.zero:
            yield f"{error.name} is all zeros, and so are its factors: training can't move them."
    for name in zero_matrices(model):
        yield f"{name} is all zeros."


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
    for name, layers in (("attn", "q, k, v and o"), ("mlp", "gate, up and down")):
        importing.add_argument(f"--{name}-rank", type=int, help=f"of {layers}; default: --rank")
    for command in (export, importing):
        command.add_argument("out", metavar="OUT")
        command.add_argument("--dtype", choices=list(DTYPES), help="default: as stored")
        command.add_argument(
            "--shard-bytes", type=_size, default=SHARD_BYTES, metavar="SIZE", help="default: 5GB"
        )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
