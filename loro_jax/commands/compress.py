"""Makes low-rank pairs of the dense projections of a LLaMA in Hugging Face's format.

OUT is a directory with factors: train.py --config.init_from=OUT continues from it, generate and
evaluate read it, and export merges the pairs for other programs. --keep is the fraction of the
projections' parameters that remain (embedding, head and norms stay as they are). --energy takes
the lowest rank of each matrix that holds this share of its squared singular values; 1 is the rank
that a matrix has, so that a model trained by TRP loses nothing.

asvd and lord measure the inputs of the projections on --text; with a text, the errors of the
outputs are printed for every method. The text should not be the one for --evaluate.

Example:
  python -m loro_jax compress llama-dir out --method=lord --keep=0.7 --text='texts/*.jsonl'
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from loro_jax.command_line import Parser, failing_in_one_line
from loro_jax.compress import METHODS, Compressed, compress
from loro_jax.errors import TrainingError
from loro_jax.tables import print_table
from loro_jax.text.config import DataConfig
from loro_jax.text.documents import PartReader
from loro_jax.text.encoding import encode_chunks
from loro_jax.text.sources import source_parts
from loro_jax.text.tokenizers.tokenizer import Tokenizer
from loro_jax.training.trained import load_model, run_config
from models.huggingface import read_config, read_model, write_model
from models.huggingface.companions import read_companions, read_token_ids
from models.huggingface.files import DTYPES, read_json
from models.llama import Llama
from models.windows import score

# Options for the ranks, one of which is needed.
_SIZES = ("keep", "rank", "energy")

# Default number of calibration tokens.
_USUAL_TOKENS = 16_384


def main(arguments: Sequence[str]) -> int:
    """Runs ``python -m loro_jax compress``; returns the exit status."""
    options = _parser().parse_args(arguments)
    return failing_in_one_line(lambda: _compress(options), _with_options)


def _compress(options: argparse.Namespace) -> None:
    source = pathlib.Path(options.source)
    _check(options, source)
    stored = read_config(source).param_dtype
    # Computed in float32 whatever the stored dtype.
    model, _ = read_model(source, dtype="float32")
    length = min(options.window, model.config.max_sequence_length)
    tokenizer = None
    if options.text or options.evaluate:
        tokenizer = load_model(source)[1]
    tokens = None
    if options.text:
        tokens = _sequences(options.text, tokenizer, options.tokens, length)
    held_out = None
    if options.evaluate:
        held_out = _stream(options.evaluate, tokenizer, options.evaluate_tokens, "--evaluate")
    sizes = {name: getattr(options, name) for name in _SIZES}
    found = compress(model, options.method, **sizes, tokens_NxL=tokens)
    perplexities = [_perplexity(one, held_out, length) for one in (model, found.model)]
    config = source / "config.json"
    total = write_model(
        found.model,
        options.out,
        dtype=options.dtype or stored,
        keep_factors=True,
        files=read_companions(source),
        token_ids=read_token_ids(read_json(config), str(config)),
    )
    summary = _summary(found, options, perplexities, tokens, held_out)
    if options.json:
        rows = [matrix._asdict() | {"parameters": matrix.parameters} for matrix in found.matrices]
        print(json.dumps(summary | {"matrices": rows}))
        return
    print_table(_table(found))
    _print(summary, options)
    print(f"{total / 1e6:.1f} MB in {options.out}")


def _check(options: argparse.Namespace, source: pathlib.Path) -> None:
    """Raises TrainingError for what can be known before the model is read."""
    for name, least in (("tokens", 1), ("window", 2), ("evaluate_tokens", 0)):
        if getattr(options, name) < least:
            raise TrainingError(f"--{name}={getattr(options, name)}: expected at least {least}.")
    if METHODS[options.method].needs_text and not options.text:
        raise TrainingError(f"--method={options.method} needs a calibration text; expected --text.")
    if sum(getattr(options, name) is not None for name in _SIZES) != 1:
        raise TrainingError("expected one of --keep, --rank and --energy.")
    out = pathlib.Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TrainingError(f"{out} exists already; expected a path that does not exist.")
    if (source / "checkpoints").is_dir() and run_config(source) is not None:
        raise TrainingError(
            f"{source} is a run directory; expected one in Hugging Face's format "
            f"(python -m loro_jax export {source} OUT)."
        )


def _stream(source: str, tokenizer: Any, most: int, option: str) -> np.ndarray:
    """Reads the documents of a source as one stream of ids, as far as they are needed."""
    config = DataConfig(source=source)
    parts, _ = source_parts(source, config)
    reader = PartReader(parts, skip=False)
    begins = tokenizer.adds_bos and bool(tokenizer.bos_ids)
    found: list[np.ndarray] = []
    total = 0
    for _, documents in encode_chunks(reader.chunks(), tokenizer, bos=begins):
        found += documents
        total += sum(map(len, documents))
        if most and total >= most:
            break
    if total < 2:
        raise TrainingError(f"{option}={source}: the text has {total} tokens; expected at least 2.")
    ids = np.concatenate(found).astype(np.int32)
    return ids[: most or len(ids)]


def _sequences(source: str, tokenizer: Tokenizer | None, most: int, length: int) -> np.ndarray:
    """Cuts a calibration text into sequences of one length, (N, L); the rest is left out."""
    ids = _stream(source, tokenizer, most, "--text")
    length = min(length, len(ids))
    return ids[: len(ids) // length * length].reshape(-1, length)


def _perplexity(model: Llama, stream: np.ndarray | None, length: int) -> float | None:
    if stream is None:
        return None
    return score(model, stream, length, length).perplexity


def _table(found: Compressed) -> list[dict[str, Any]]:
    return [
        {
            "layer": one.layer,
            "projection": one.name,
            "shape": f"{one.shape[0]} x {one.shape[1]}",
            "rank": "dense" if one.rank is None else one.rank,
            "parameters": one.parameters,
            "error of W": f"{one.error:.4f}",
            "error of W x": "" if one.output_error is None else f"{one.output_error:.4f}",
        }
        for one in found.matrices
    ]


def _summary(
    found: Compressed,
    options: argparse.Namespace,
    perplexities: Sequence[float | None],
    tokens: np.ndarray | None,
    held_out: np.ndarray | None,
) -> dict[str, Any]:
    dense = sum(one.shape[0] * one.shape[1] for one in found.matrices)
    kept = sum(one.parameters for one in found.matrices)
    config = found.model.config
    ranks = {name: config.projection_rank(name) for name in {m.name for m in found.matrices}}
    padded = 0
    for one in found.matrices:
        rank, (m, n) = ranks[one.name], one.shape
        padded += m * n if rank is None else rank * (m + n)
    rest = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    rest += config.hidden_size * (2 * config.num_layers + 1)
    return {
        "directory": str(options.source),
        "method": options.method,
        "projections_before": dense,
        "projections": kept,
        "projections_in_memory": padded,
        "parameters_before": dense + rest,
        "parameters": kept + rest,
        "calibration_tokens": 0 if tokens is None else int(tokens.size),
        "evaluated_tokens": 0 if held_out is None else len(held_out) - 1,
        "perplexity_before": _finite(perplexities[0]),
        "perplexity": _finite(perplexities[1]),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _print(summary: dict[str, Any], options: argparse.Namespace) -> None:
    before, kept = summary["projections_before"], summary["projections"]
    print(
        f"projections: {kept:,} of {before:,} parameters ({kept / before:.3f}); "
        f"model: {summary['parameters']:,} of {summary['parameters_before']:,} "
        f"({summary['parameters'] / summary['parameters_before']:.3f})"
    )
    padded = summary["projections_in_memory"]
    if padded > kept:
        print(
            f"in memory, where the layers of a projection share the largest rank: {padded:,} "
            f"({padded / before:.3f})"
        )
    if options.evaluate:
        pair = (summary["perplexity_before"], summary["perplexity"])
        words = ["infinite" if one is None else f"{one:.2f}" for one in pair]
        count = summary["evaluated_tokens"]
        print(f"perplexity of {count:,} tokens: {words[0]} before, {words[1]} after")


def _with_options(message: str) -> str:
    """Rewrites a message of the library to name this command's options."""
    for name in (*_SIZES, "method"):
        for before, after in ((f"{name} = ", f"--{name}="), (f"{name} '", f"--{name} '")):
            if message.startswith(before):
                message = after + message.removeprefix(before)
    return message.replace("config.data.source = ", "the text ")


def _parser() -> Parser:
    parser = Parser("python -m loro_jax compress", __doc__)
    parser.add_argument("source", metavar="HF_DIR")
    parser.add_argument("out", metavar="OUT", help="directory to write")
    summaries = "; ".join(f"{name}: {method.summary}" for name, method in METHODS.items())
    parser.add_argument("--method", choices=list(METHODS), default="lord", help=summaries)
    parser.add_argument("--keep", type=float, help="fraction of the projections' parameters")
    parser.add_argument("--rank", type=int, help="one rank for all, instead of --keep")
    parser.add_argument(
        "--energy", type=float, help="share of each matrix's squared singular values, instead"
    )
    parser.add_argument(
        "--text", metavar="SOURCE", help="calibration text: any source that a run can read"
    )
    parser.add_argument("--tokens", type=int, default=_USUAL_TOKENS, help="of the text")
    parser.add_argument("--evaluate", metavar="SOURCE", help="text for perplexities")
    parser.add_argument("--evaluate_tokens", type=int, default=0, metavar="N", help="0: all")
    parser.add_argument("--window", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: as stored")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
