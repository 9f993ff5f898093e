"""``python -m models.generate DIR --prompt="Once upon a time"``: text from a model.

DIR is a run directory, or one of Hugging Face's format. One prompt's text is written as it grows;
several are continued together and written when they have ended.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

import numpy as np

from loro_jax.training.errors import TrainingError
from loro_jax.training.tokenizer import Tokenizer
from loro_jax.training.trained import load_model
from models.cache import CACHES
from models.decoding import generate
from models.huggingface import CheckpointError
from models.llama import Llama
from models.sampling import Sampling


def continuations(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    cache: str = "full",
) -> Iterator[list[str]]:
    """Continues texts; yields what each has grown by.

    A character of several tokens comes when it is whole.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        prompts: texts; an empty one starts behind an end of text.
        max_new_tokens: tokens to add at most to each.
        sampling: how they are drawn.
        seed: of the draws.
        cache: what is kept of the past, one of :data:`models.cache.CACHES`.

    Yields:
        A string for each prompt, most of them one token's.

    Raises:
        ValueError: as :func:`models.decoding.generate`.
    """
    ids = [found or [tokenizer.eos_id] for found in tokenizer.encode(list(prompts))]
    written = [tokenizer.decode(prompt) for prompt in ids]
    ended = np.zeros(len(ids), bool)
    steps = generate(
        model, ids, max_new_tokens, sampling, eos_id=tokenizer.eos_id, seed=seed, cache=cache
    )
    for tokens in steps:
        ended |= tokens == tokenizer.eos_id
        grown = []
        for i, token in enumerate(tokens):
            if not ended[i]:
                ids[i] = [*ids[i], int(token)]
            text = tokenizer.decode(ids[i])
            # An unfinished character shows as a replacement until its last byte is there.
            whole = not text.endswith("\ufffd") and text.startswith(written[i])
            grown.append(text[len(written[i]) :] if whole else "")
            written[i] = text if whole else written[i]
        yield grown


def main(arguments: Sequence[str], out: TextIO = sys.stdout) -> int:
    """Runs the command; the exit status."""
    options = _parser().parse_args(arguments)
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    try:
        sampling.validate()
        model, tokenizer = load_model(options.source)
        steps = continuations(
            model,
            tokenizer,
            options.prompt,
            options.max_new_tokens,
            sampling,
            options.seed,
            options.cache,
        )
        if len(options.prompt) == 1:
            out.write(options.prompt[0])
            for (text,) in steps:
                out.write(text)
                out.flush()
            out.write("\n")
        else:
            for prompt, texts in zip(options.prompt, zip(*steps, strict=True), strict=True):
                out.write(f"{prompt}{''.join(texts)}\n\n")
    except (CheckpointError, TrainingError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="DIR", type=pathlib.Path)
    parser.add_argument("--prompt", action="append", required=True, help="may be repeated")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, metavar="K")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cache",
        choices=CACHES,
        default="full",
        help="what is kept of the past; with a rank, values or both may be kept as latents",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
