"""Continues texts with a model.

DIR is a run directory, or a directory in Hugging Face's format. The text of a single prompt is
streamed; several prompts are continued together and written at the end. Prompts start with the
beginning-of-text token if the tokenizer of a directory in Hugging Face's format adds it.

Example:
  python -m loro_jax generate runs/default --prompt="Once upon a time" --top_p=0.9
"""

from __future__ import annotations

import argparse
import io
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

from loro_jax.command_line import NO_READER, Parser, Switch, drop_output, failing_in_one_line
from loro_jax.commands.adapter_option import add_adapter, add_adapter_option
from loro_jax.errors import TrainingError
from loro_jax.text.config import DataConfig
from loro_jax.text.tokenizers.tokenizer import Tokenizer
from loro_jax.training.trained import load_model, run_config
from models.cache import CACHES
from models.decoding import check_prompts, check_seed, generate
from models.llama import Llama
from models.sampling import Sampling

# Default number of new tokens, if the model has room for them.
_USUAL_TOKENS = 100


def continuations(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int | None,
    sampling: Sampling,
    seed: int = 0,
    cache: str = "full",
    *,
    bos: bool | None = None,
    special: bool = False,
) -> Iterator[list[str]]:
    """Continues texts; yields the new text of each, token by token.

    A character of several tokens is yielded when it is complete; an incomplete one at the end is
    dropped.

    Args:
        model: the model.
        tokenizer: its tokenizer; ids that it does not have are not drawn.
        prompts: texts; an empty one starts after an end-of-text token, unless there is a
            beginning-of-text token.
        max_new_tokens: maximal number of new tokens for each; None: 100, or fewer if the model has
            no room for them.
        sampling: settings of the sampling.
        seed: seed of the sampling.
        cache: kind of cache, one of :data:`models.cache.CACHES`.
        bos: whether prompts start with the beginning-of-text token; None: as configured in the
            tokenizer.
        special: whether special tokens written in a prompt are encoded as their ids.

    Yields:
        A string for each prompt, usually that of one token.

    Raises:
        ValueError: as :func:`models.decoding.generate`, and for a prompt that is not Unicode.
        TrainingError: if ``bos`` asks for a token that the tokenizer does not have.
    """
    for prompt in prompts:
        _check_unicode(prompt)
    ids = [tokenizer.encode_prompt(prompt, bos, special) for prompt in prompts]
    # A model needs a token to start from; in training a document follows an end-of-text token.
    ids = [found or [tokenizer.eos_id] for found in ids]
    longest = model.config.max_sequence_length
    check_prompts(ids, model.config.vocab_size, longest)
    if max_new_tokens is None:
        limits = [min(_USUAL_TOKENS, longest - len(prompt)) for prompt in ids]
    else:
        limits = [max_new_tokens] * len(ids)
    steps = generate(
        model,
        ids,
        limits,
        sampling,
        eos_id=tokenizer.eos_ids,
        seed=seed,
        cache=cache,
        vocab_size=tokenizer.vocab_size,
    )
    texts = [_GrowingText(tokenizer, *row) for row in zip(ids, limits, strict=True)]
    for tokens in steps:
        yield [text.grown_by(int(token)) for text, token in zip(texts, tokens, strict=True)]


class _GrowingText:
    """A text that grows token by token, until an end-of-text token or the limit."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], limit: int):
        self._tokenizer, self._ids, self._left = tokenizer, list(prompt), limit
        self._written = tokenizer.decode(prompt)

    def grown_by(self, token: int) -> str:
        """Adds a token; returns the text that can be written now."""
        self._left = 0 if token in self._tokenizer.eos_ids else self._left - 1
        if self._left < 0 or token in self._tokenizer.eos_ids:
            return ""
        self._ids.append(token)
        # An incomplete character decodes to a replacement character until its last byte is added.
        # All ids are decoded again, because a token's text may depend on those before it.
        text = self._tokenizer.decode(self._ids).rstrip("\ufffd")
        if not text.startswith(self._written):
            return ""
        grown, self._written = text[len(self._written) :], text
        return grown


def _check_unicode(prompt: str) -> None:
    """Raises ValueError for invalid Unicode, such as command-line bytes that are not UTF-8."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the prompt {prompt[:60]!a} is not valid Unicode at character {error.start}; "
            "expected UTF-8."
        ) from None


def main(arguments: Sequence[str], out: TextIO | None = None) -> int:
    """Runs ``python -m loro_jax generate``; returns the exit status.

    Args:
        arguments: the command line's arguments.
        out: stream for the texts; None: standard output.
    """
    options = _parser().parse_args(arguments)
    out = sys.stdout if out is None else out
    return failing_in_one_line(lambda: _generate(options, out), _with_options)


def _generate(options: argparse.Namespace, out: TextIO | None) -> int:
    if out is None:
        raise TrainingError("standard output is closed; there is nowhere to write to.")
    try:
        _write(options, out)
        out.flush()
    except BrokenPipeError:
        drop_output(out)
        return NO_READER
    except ValueError as error:
        raise TrainingError(str(error)) from None
    except OSError as error:
        drop_output(out)
        raise TrainingError(f"the text can't be written ({error.strerror}).") from None
    return 0


def _write(options: argparse.Namespace, out: TextIO) -> None:
    """Loads the model and writes the prompts and their continuations."""
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    sampling.validate()
    check_seed(options.seed)
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, but is {options.max_new_tokens}.")
    if isinstance(out, io.TextIOWrapper):  # characters that the encoding lacks become "?"
        out.reconfigure(errors="replace")
    model, tokenizer = load_model(options.source)
    add_adapter(model, options.adapter, options.source)
    prompts, bos = options.prompt, options.bos
    if options.chat:
        prompts, bos = _chat_prompts(options, tokenizer), False  # the template writes it
    steps = continuations(
        model,
        tokenizer,
        prompts,
        options.max_new_tokens,
        sampling,
        options.seed,
        options.cache,
        bos=bos,
        special=options.parse_special or options.chat,
    )
    if len(options.prompt) == 1:
        for i, (text,) in enumerate(steps):
            # Written with the first token, because all errors in a prompt are known by then.
            out.write(options.prompt[0] + text if i == 0 and not options.chat else text)
            out.flush()
        out.write("\n")
    else:
        for prompt, texts in zip(options.prompt, zip(*steps, strict=True), strict=True):
            between = "\n" if options.chat else ""
            out.write(f"{prompt}{between}{''.join(texts)}\n\n")


def _chat_prompts(options: argparse.Namespace, tokenizer: Tokenizer) -> list[str]:
    """Renders the prompts as messages of the user; the end of a turn ends a text as well."""
    from loro_jax.text.chat import load_template  # needs jinja2, which only chats use
    from loro_jax.text.chat_prompts import chat_prompt, end_of_turn

    run = run_config(options.source)
    config = DataConfig(tokenizer=str(options.source)) if run is None else run.data
    template = load_template(config, now=None)
    end = end_of_turn(template, tokenizer)
    if end is not None and end not in tokenizer.eos_ids:
        tokenizer.eos_ids = (*tokenizer.eos_ids, end)
    return [chat_prompt(template, prompt) for prompt in options.prompt]


def _with_options(message: str) -> str:
    """Rewrites a message of the library to name this command's options."""
    for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed"):
        message = message.replace(f"{name} must", f"--{name} must")
    return message.removeprefix("generate: ")


def _parser() -> Parser:
    parser = Parser("python -m loro_jax generate", __doc__)
    parser.add_argument("source", metavar="DIR", type=pathlib.Path)
    add_adapter_option(parser)
    parser.add_argument("--prompt", action="append", required=True, help="may be repeated")
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        metavar="N",
        help=f"default: {_USUAL_TOKENS}, or fewer if the model has no room for them",
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest token")
    parser.add_argument("--top_k", type=int, default=0, metavar="K")
    parser.add_argument("--top_p", type=float, default=1.0, metavar="P")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--bos",
        action=Switch,
        help="whether prompts start with the beginning-of-text token; default: as configured in "
        "the tokenizer",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="each prompt is a message of the user, rendered by the tokenizer's chat template",
    )
    parser.add_argument(
        "--parse_special",
        action=Switch,
        default=True,
        help="whether special tokens written in a prompt, such as <|user|>, are encoded as special "
        "tokens or as plain text; default: as special tokens",
    )
    parser.add_argument(
        "--cache",
        choices=CACHES,
        default="full",
        help="with a rank, values or both keys and values may be cached as latents",
    )
    return parser
