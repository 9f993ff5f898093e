"""Export of a run to a directory in Hugging Face's format, and import."""

from __future__ import annotations

import argparse
import pathlib
import re
from collections.abc import Iterator, Sequence

from loro_jax.command_line import Parser, failing_in_one_line
from loro_jax.errors import TrainingError
from loro_jax.glue import TASKS, PairTokenizer
from loro_jax.text.tokenizers.tokenizer import Tokenizer
from loro_jax.training.glue_trained import is_classifier, load_classifier
from loro_jax.training.stored_adapter import export_adapter
from loro_jax.training.trained import is_hugging_face, load_run
from models.huggingface import LayerError, read_model, write_model
from models.huggingface.companions import read_companions, read_token_ids
from models.huggingface.files import DTYPES, read_json
from models.huggingface.writing import SHARD_BYTES, zero_matrices
from models.llama import Llama
from models.roberta import write_roberta

_EXPORT = """Writes a run as a directory in Hugging Face's format.

SOURCE is a run directory, or a directory with factors that this library has written. By default
factors are merged: projections are dense, and any program that serves LLaMA can read them. With
--keep_factors, B and A are stored for this library. To start a run from either, use
train.py --config.init_from=OUT. A run on GLUE becomes a RoBERTa with its head.

With --adapter only the adapters of a run are written, in PEFT's format, for the base that the run
started from; those of a run on GLUE with its head. To start a run from them, use
train.py --config.adapter.init_from=OUT.

Example:
  python -m loro_jax export runs/60m out
  python -m loro_jax export runs/tuned out --adapter --base=HuggingFaceTB/SmolLM2-135M
  python -m loro_jax export runs/60m out --keep_factors
"""

_IMPORT = """Reads a LLaMA in Hugging Face's format and writes it with low-rank factors.

With --rank, each projection becomes its truncated SVD, and its relative error is printed. To start
a run from OUT, use train.py --config.init_from=OUT.

Example:
  python -m loro_jax import llama-dir out --rank=128
"""


def export_main(arguments: Sequence[str]) -> int:
    """Runs ``python -m loro_jax export``; returns the exit status."""
    parser = Parser("python -m loro_jax export", _EXPORT)
    parser.add_argument("source", metavar="SOURCE")
    _add_writing(parser)
    parser.add_argument("--keep_factors", action="store_true", help="store B and A, not B A")
    parser.add_argument("--adapter", action="store_true", help="the adapters alone")
    parser.add_argument(
        "--base", help="with --adapter, name of their base; default: config.init_from of the run"
    )
    parser.add_argument("--step", type=int, help="step of the checkpoint; default: the last")
    options = parser.parse_args(arguments)
    return failing_in_one_line(lambda: _export(options))


def import_main(arguments: Sequence[str]) -> int:
    """Runs ``python -m loro_jax import``; returns the exit status."""
    parser = Parser("python -m loro_jax import", _IMPORT)
    parser.add_argument("source", metavar="HF_DIR")
    _add_writing(parser)
    parser.add_argument("--rank", type=int, help="factor by truncated SVD")
    for name, layers in (("attn", "q, k, v and o"), ("mlp", "gate, up and down")):
        parser.add_argument(f"--{name}_rank", type=int, help=f"rank of {layers}; default: --rank")
    options = parser.parse_args(arguments)
    return failing_in_one_line(lambda: _import(options))


def _add_writing(parser: Parser) -> None:
    """Adds OUT and the options for writing it."""
    parser.add_argument("out", metavar="OUT", help="directory to write")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: as stored")
    parser.add_argument(
        "--shard_bytes",
        type=_size,
        default=SHARD_BYTES,
        metavar="SIZE",
        help="largest size of a file of weights; default: 5GB",
    )


def _export(options: argparse.Namespace) -> None:
    if options.base is not None and not options.adapter:
        raise TrainingError("--base names the base of adapters; expected --adapter, too.")
    if options.adapter:
        _export_adapter(options)
        return
    if is_hugging_face(options.source):
        _merge(options)
        return
    if is_classifier(options.source):
        _export_classifier(options)
        return
    run = load_run(options.source, options.step)
    tokenizer = run.tokenizer
    files = tokenizer.files()
    if run.config.data.format == "chat":
        from loro_jax.text.chat import load_template  # needs jinja2, which only chats use

        files["chat_template.jinja"] = load_template(run.config.data).source.encode()
    total = write_model(
        run.model,
        options.out,
        dtype=options.dtype or run.config.model.param_dtype,
        keep_factors=options.keep_factors,
        files=files,
        token_ids=_token_ids(tokenizer),
        shard_bytes=options.shard_bytes,
    )
    print(f"step {run.step} of {options.source}: {total / 1e6:.1f} MB in {options.out}")


def _export_adapter(options: argparse.Namespace) -> None:
    if options.keep_factors:
        raise TrainingError("--keep_factors is for whole models; expected it without --adapter.")
    step, total = export_adapter(
        options.source, options.out, step=options.step, base=options.base, dtype=options.dtype
    )
    print(f"adapters of step {step} of {options.source}: {total / 1e6:.1f} MB in {options.out}")


def _merge(options: argparse.Namespace) -> None:
    """Writes a directory in Hugging Face's format again, with its factors merged."""
    if options.step is not None:
        raise TrainingError(f"--step={options.step}: {options.source} is not a run directory.")
    source = pathlib.Path(options.source)
    model, _ = read_model(source)
    config = source / "config.json"
    total = write_model(
        model,
        options.out,
        dtype=options.dtype or model.config.param_dtype,
        keep_factors=options.keep_factors,
        files=read_companions(source),
        token_ids=read_token_ids(read_json(config), str(config)),
        shard_bytes=options.shard_bytes,
    )
    print(f"{options.source}: {total / 1e6:.1f} MB in {options.out}")


def _export_classifier(options: argparse.Namespace) -> None:
    if options.keep_factors:
        raise TrainingError(
            f"--keep_factors: {options.source} is a run on GLUE, whose adapters are merged; "
            "expected no --keep_factors."
        )
    run = load_classifier(options.source, options.step)
    source, tokenizer = pathlib.Path(run.tokenizer), PairTokenizer(run.tokenizer)
    total = write_roberta(
        run.model,
        options.out,
        dtype=options.dtype or run.config.model.param_dtype,
        labels=TASKS[run.config.task].labels or None,
        files=read_companions(source if source.is_dir() else source.parent),
        token_ids={"bos_token_id": tokenizer.first_id, "eos_token_id": tokenizer.last_id},
        shard_bytes=options.shard_bytes,
    )
    print(f"step {run.step} of {options.source}: {total / 1e6:.1f} MB in {options.out}")


def _token_ids(tokenizer: Tokenizer) -> dict[str, int | list[int] | None]:
    """Returns the token ids of a run's tokenizer for ``config.json``."""
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
        # A dense model has no factors: it is written as it was read.
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
    """Yields notes about results of an import that may be unexpected."""
    asked, given = options.rank, model.config.attn_rank
    if errors and options.attn_rank is None and given not in (None, asked):
        yield (
            f"attention is factored at rank {given}, not {asked}: keys and values have {given} "
            "rows (--attn_rank asks for another)."
        )
    for error in errors:
        if error.zero:
            yield f"{error.name} is all zeros, and so are its factors: training can't move them."
    for name in zero_matrices(model):
        yield f"{name} is all zeros."


def error_table(errors: Sequence[LayerError]) -> str:
    """Formats the relative error of each projection as a Markdown table.

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
    """Parses a number of bytes such as "5GB", "200MB" or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip().upper())
    if match is None or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 5GB")
    return int(float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}[match[2]])
