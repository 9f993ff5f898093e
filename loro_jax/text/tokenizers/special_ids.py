"""Handling of special ids: beginning of text, end of text, padding."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loro_jax.errors import TrainingError

# The usual form of special tokens.
MARKED = re.compile(r"<.+>|\[.+\]", re.DOTALL)

_ROLES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")


class SpecialIds:
    """Base class of tokenizers, for everything about special ids.

    Attributes:
        vocab_size: number of ids.
        eos_id: the id that ends a document.
        eos_ids: all ids that end a generated text; ``eos_id`` is the first.
        pad_id: the padding id.
        bos_id: the beginning-of-text id; None: the tokenizer has none.
        bos_ids: ids added before a prompt; usually ``bos_id`` alone.
        adds_bos: whether they are added by default.
    """

    vocab_size: int
    eos_id: int
    eos_ids: tuple[int, ...]
    pad_id: int
    bos_id: int | None = None
    bos_ids: tuple[int, ...] = ()
    adds_bos: bool = False
    name: str = "tokenizer"

    def encode(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """Encodes texts; implemented by each tokenizer."""
        raise NotImplementedError

    def encode_with_offsets(
        self, text: str, special: bool = False
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Encodes a text as :meth:`encode` does; implemented by each tokenizer.

        Args:
            text: the text.
            special: whether special tokens written out in it become their ids.

        Returns:
            (ids, start and end of each in the text, in characters).

        Example:
            >>> from loro_jax.text.tokenizers.tokenizer import ByteTokenizer
            >>> ByteTokenizer().encode_with_offsets("A</s>", special=True)
            ([68, 1], [(0, 1), (1, 5)])
        """
        raise NotImplementedError

    def encode_prompt(self, text: str, bos: bool | None = None, special: bool = False) -> list[int]:
        """Encodes a prompt for a model to continue.

        Args:
            text: the prompt.
            bos: whether to add the beginning-of-text ids, unless the prompt already begins with
                them; None: the tokenizer's default.
            special: whether special tokens written out in the text become their ids.

        Returns:
            Ids; possibly none for an empty text.

        Raises:
            TrainingError: if ``bos`` is True and the tokenizer has no such id.

        Example:
            >>> from loro_jax.text.tokenizers.tokenizer import ByteTokenizer
            >>> ByteTokenizer().encode_prompt("A</s>", special=True)
            [68, 1]
        """
        (ids,) = self.encode([text], special=special)
        if not (self.adds_bos if bos is None else bos):
            return ids
        if not self.bos_ids:
            raise TrainingError(
                f"config.data.tokenizer = {self.name!r} has no beginning-of-text token to begin a "
                "prompt with."
            )
        # A chat template may have written them out already: they are not doubled.
        begun = tuple(ids[: len(self.bos_ids)]) == self.bos_ids
        return ids if begun else [*self.bos_ids, *ids]


def written_out(text: str, names: Mapping[str, int]) -> Iterable[tuple[str, int | None]]:
    """Splits a text at special tokens.

    Args:
        text: the text.
        names: ids by the text of special tokens.

    Yields:
        (a part without special tokens, the id of the token after it or None at the end).

    Example:
        >>> list(written_out("Hi<a>you", {"<a>": 7}))
        [('Hi', 7), ('you', None)]
    """
    # The longest name first, because alternatives are tried in this order.
    pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    start = 0
    for found in re.finditer(pattern, text) if names else ():
        yield text[start : found.start()], names[found.group()]
        start = found.end()
    yield text[start:], None


class Beside:
    """Special tokens according to the files next to a tokenizer.

    Args:
        directory: directory of the tokenizer.

    Attributes:
        tokens: special tokens by role ("eos", "bos", "pad", ...).
        special: all special tokens, including those without a role.
        added: ids of tokens that were added to the vocabulary, by their text.
        adds_bos: whether texts begin with the beginning-of-text token; None: unknown.
        kind: the tokenizer's class in transformers, or "".

    Raises:
        TrainingError: if a file holds no JSON object.
    """

    def __init__(self, directory: pathlib.Path):
        config = _object(directory / "tokenizer_config.json")
        mapping = _object(directory / "special_tokens_map.json")
        self.tokens: dict[str, str] = {}
        self.special: set[str] = set()
        for content in (mapping, config):  # the config is the newer format and takes precedence
            for role in _ROLES:
                if (token := _token(content.get(f"{role}_token"))) is not None:
                    self.tokens[role] = token
            for key in ("additional_special_tokens", "extra_special_tokens"):
                more = content.get(key) or []
                # A list, or tokens by name.
                more = more.values() if isinstance(more, dict) else more
                self.special |= {one for one in map(_token, more) if one}
        # Two formats: ids by token, without saying which are special, and tokens by id.
        added = _object(directory / "added_tokens.json")
        self.added: dict[str, int] = {
            token: i for token, i in added.items() if token and type(i) is int
        }
        self.special |= {token for token in self.added if MARKED.fullmatch(token)}
        decoder = config.get("added_tokens_decoder")
        for i, one in decoder.items() if isinstance(decoder, dict) else ():
            token = _token(one)
            if not token or not i.isdecimal():
                continue
            self.added[token] = int(i)
            if isinstance(one, dict) and one.get("special"):
                self.special.add(token)
            else:
                self.special.discard(token)
        says = config.get("add_bos_token")
        self.adds_bos: bool | None = says if isinstance(says, bool) else None
        kind = config.get("tokenizer_class")
        self.kind: str = kind if isinstance(kind, str) else ""


def _token(value: Any) -> str | None:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) and value else None


def _object(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object; an empty one if the file is missing."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        raise TrainingError(f"{path}, next to the tokenizer, can't be read as JSON.") from None
    if not isinstance(content, dict):
        raise TrainingError(f"{path}, next to the tokenizer, holds no JSON object.")
    return content
