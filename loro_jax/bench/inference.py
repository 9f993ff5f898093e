"""Speed of serving: prefill and decoding, dense and low-rank in turns.

Prefill reads a batch of prompts; decode adds one token to each. A low-rank model keeps its factors,
and may cache latents (``--caches``; see :mod:`models.cache`). Ratios are the dense model's over the
low-rank one's: ``byte ratio`` of the bytes read in one decoding step (weights and cache), ``FLOP
ratio`` of matrix products per decoded token. Speed is bound by bytes at batch size 1, and by FLOPs
for large batches.

``--counterpart=transformers`` compares greedy texts with those by its ``generate`` instead, in
turns, from the same weights and prompts: ``ratio`` is our speed over its speed, with the prompt.
``same tokens`` is the fraction of tokens that agree; after a near tie all later ones differ.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from loro_jax.bench.counterpart import decoding, process
from loro_jax.bench.options import make_parser, parse_options, whole_numbers
from loro_jax.memory import count_bytes
from loro_jax.planning.timing import time_in_turns
from loro_jax.tables import report
from models.cache import CACHES, empty_cache
from models.decoding import extend, for_decoding
from models.llama import PRESETS, Llama, LlamaConfig, preset


class _Case(NamedTuple):
    """A compiled model, ready to be timed."""

    prefill: Callable[[], Any]
    decode: Callable[[], Any]
    weight_bytes: int
    cache_bytes: int
    flops_per_token: int


def main(arguments: Sequence[str]) -> None:
    """Runs the benchmark; see ``--help``."""
    parser = make_parser("inference", __doc__, "60m", rounds=5)
    parser.add_argument("--batch_sizes", default="1,8,64", help="default 1,8,64")
    parser.add_argument("--prompt", type=int, default=128, help="tokens per prompt")
    parser.add_argument("--rank", type=int, help="default: the model's")
    parser.add_argument("--dtype", default="float32", help="dtype of weights, products and cache")
    parser.add_argument(
        "--caches", default="full", help=f"caches of the low-rank model, some of {','.join(CACHES)}"
    )
    _add_counterpart(parser, arguments)
    options = parse_options(parser, arguments, [*PRESETS, decoding.SMOLLM2])
    if options.counterpart is None and decoding.SMOLLM2 in options.models:
        parser.error(f"--models={decoding.SMOLLM2}: needs --counterpart=transformers")
    options.caches = options.caches.split(",")
    for cache in options.caches:
        if cache not in CACHES:
            parser.error(f"--caches: expected some of {', '.join(CACHES)}, not {cache!r}")
    (options.batch_sizes,) = whole_numbers(parser, options, "batch_sizes")
    if options.counterpart:
        _report_beside_counterpart(options)
        return
    rows = []
    for name in options.models:
        changes = {"dtype": options.dtype, "param_dtype": options.dtype}
        low_rank = preset(name, **changes, **({"rank": options.rank} if options.rank else {}))
        try:
            low_rank.validate()
        except ValueError as error:
            parser.error(str(error))
        if not 1 <= options.prompt < low_rank.max_sequence_length:
            parser.error(
                f"--prompt: expected 1 to {low_rank.max_sequence_length - 1}, not {options.prompt}"
            )
        models = {"full": (low_rank.dense(), "full")}
        models |= {f"low_rank, {cache} cache": (low_rank, cache) for cache in options.caches}
        for batch_size in options.batch_sizes:
            rows += _measure(name, models, batch_size, options)
    report(rows, options)


def _add_counterpart(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Adds the options of the comparison with transformers, and its defaults if it is asked for."""
    defaults = {"models": f"60m,{decoding.SMOLLM2}", "batch_sizes": "1,8", "prompt": 64}
    parser.add_argument(
        "--counterpart",
        choices=["transformers"],
        help="compare with transformers' texts (float32, full cache); the defaults are then those "
        "of " + ", ".join(f"--{name}={value}" for name, value in defaults.items()),
    )
    parser.add_argument("--new_tokens", type=int, default=128, help="of these texts, default 128")
    parser.add_argument("--weights", help="a Hugging Face directory of one more model for them")
    if parser.parse_known_args(arguments)[0].counterpart:
        parser.set_defaults(**defaults)


def _report_beside_counterpart(options: argparse.Namespace) -> None:
    if process.skipped(f"--counterpart={options.counterpart}"):
        return
    rows: list[dict[str, Any]] = []
    for name in options.models:
        rows += decoding.decoding_rows(name, options)
        report(rows, options)  # after each model, in case a later one is interrupted
    if options.weights:
        rows += decoding.rows_of_directory(options)
        report(rows, options)


def _measure(
    name: str,
    models: dict[str, tuple[LlamaConfig, str]],
    batch_size: int,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    cases = {kind: _prepare(*made, batch_size, options.prompt) for kind, made in models.items()}
    candidates = {f"prefill {kind}": case.prefill for kind, case in cases.items()}
    candidates |= {f"decode {kind}": case.decode for kind, case in cases.items()}
    seconds = time_in_turns(candidates, options.rounds)
    dense = cases["full"]
    rows = []
    for kind, case in cases.items():
        prefill, decode = seconds[f"prefill {kind}"], seconds[f"decode {kind}"]
        byte_ratio = (dense.weight_bytes + dense.cache_bytes) / (
            case.weight_bytes + case.cache_bytes
        )
        flop_ratio = dense.flops_per_token / case.flops_per_token
        rows.append(
            {
                "model": name,
                "projections": kind,
                "batch": batch_size,
                "prefill tokens/s": batch_size * options.prompt / prefill,
                "prefill speed-up": seconds["prefill full"] / prefill,
                "decode tokens/s": batch_size / decode,
                "decode speed-up": seconds["decode full"] / decode,
                "byte ratio": byte_ratio,
                "FLOP ratio": flop_ratio,
                "weights MB": case.weight_bytes / 1e6,
                "cache MB": case.cache_bytes / 1e6,
            }
        )
    return rows


def _prepare(config: LlamaConfig, cache: str, batch_size: int, prompt: int) -> _Case:
    graphdef, state = nnx.split(for_decoding(Llama(config, nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(config.vocab_size, size=(batch_size, prompt)), jnp.int32)
    padding = jnp.zeros(batch_size, jnp.int32)

    @functools.partial(jax.jit, donate_argnums=2)
    def read(state: Any, tokens: jax.Array, cache: Any, slot: jax.Array) -> Any:
        return extend(nnx.merge(graphdef, state), tokens, cache, slot, padding)

    held = [empty_cache(config, batch_size, prompt + 1, cache)]

    # On the device already, so that only the step is timed.
    start, end = jnp.asarray(0, jnp.int32), jnp.asarray(prompt, jnp.int32)
    next_token = tokens[:, :1]

    def run(part: jax.Array, slot: jax.Array) -> Any:
        logits, held[0] = read(state, part, held[0], slot)
        return logits

    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(state))
    # A step reads one row of the embedding per token; every other matrix is part of a product.
    looked_up = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    products = sum(leaf.size for path, leaf in leaves if path[-1].key != "scale")
    products -= looked_up
    rank = config.group_rank("attn") or 0
    # Per cached token: scores, the sum of values, and the recomputation of keys.
    past = config.num_heads * (config.head_size + (config.head_size if cache == "full" else rank))
    past += config.kv_heads * config.head_size * rank if cache == "latent" else 0
    attention = config.num_layers * past * (prompt + 1)
    itemsize = jnp.dtype(config.param_dtype).itemsize
    return _Case(
        prefill=lambda: run(tokens, start),
        decode=lambda: run(next_token, end),
        weight_bytes=products * itemsize,
        cache_bytes=count_bytes(held[0]),
        flops_per_token=2 * (products + attention),
    )
