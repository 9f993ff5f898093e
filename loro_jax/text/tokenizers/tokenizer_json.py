"""Tokenizers in Hugging Face's ``tokenizer.json`` format, used on documents.

Such a file is made for prompts: any text that looks like a special token becomes one. In documents
that would be wrong: a page about tokenizers would end in the middle. The library has an option not
to match the tokens that the file declares special, but this is not enough: a unigram, word or
WordPiece vocabulary that contains "</s>" matches it like any other piece, and some files don't
declare their end-of-text token special. Documents are therefore encoded by a copy of the tokenizer
whose special tokens have names that no text contains.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import re
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers

from loro_jax.errors import TrainingError
from loro_jax.text.tokenizers.conversion import tokenizer_files
from loro_jax.text.tokenizers.special_ids import MARKED, Beside, SpecialIds

# Usual names, in order of preference.
_USUAL_EOS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[SEP]")
_USUAL_PAD = ("<pad>", "<|pad|>", "[PAD]")
_USUAL_BOS = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "[CLS]")
_USUAL = {*_USUAL_EOS, *_USUAL_PAD, *_USUAL_BOS, "<unk>", "[UNK]", "<mask>", "[MASK]"}


class HuggingFaceTokenizer(SpecialIds):
    """A ``tokenizer.json`` of Hugging Face's tokenizers library.

    The file does not say what its special tokens are for: they come from the arguments, from
    ``tokenizer_config.json`` next to it, or are found by their usual names. The dropout of a
    byte-pair encoding is left out: a document has the same ids in every epoch and after a resume.

    Args:
        path: the file.
        name: name in error messages.
        eos_ids: the end-of-text ids; none: find one.
        pad_id: the padding id; None: find it, or take the end-of-text id (padding is masked).

    Raises:
        TrainingError: if the file is not a tokenizer, or its end-of-text token is unknown.
    """

    def __init__(
        self, path: pathlib.Path, name: str, eos_ids: Sequence[int] = (), pad_id: int | None = None
    ):
        content = _without_dropout(path.read_bytes())
        self._tokenizer, data = _read(content, name)
        self._content, self.name = content, name
        beside = Beside(path.parent)
        # Not the number of tokens: ids may have gaps.
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.eos_ids = tuple(eos_ids)
        if not self.eos_ids:
            found = self._find([beside.tokens.get("eos"), *_USUAL_EOS])
            if found is None:
                raise TrainingError(
                    f"config.data.tokenizer = {name!r} does not say which token ends a text; name "
                    "its id with config.data.eos_id."
                )
            self.eos_ids = (found,)
        self.eos_id = self.eos_ids[0]
        if pad_id is None:
            pad_id = self._find([beside.tokens.get("pad"), *_USUAL_PAD])
        self.pad_id = self.eos_id if pad_id is None else pad_id
        self._find_beginning(beside)
        control = self._control(data, beside)
        ids = (self._tokenizer.token_to_id(token) for token in control)
        self._control_ids = {one for one in ids if one is not None}
        hidden, reachable = _with_hidden_names(data, control)
        self._documents, _ = _read(json.dumps(hidden).encode(), name)
        self._documents.encode_special_tokens = True
        # If a text could produce special tokens by their names, its ids have changed.
        mark = b" special tokens are text" if reachable else b""
        self.fingerprint = hashlib.sha256(content + mark).hexdigest()[:16]

    def _find(self, tokens: Iterable[str | None]) -> int | None:
        ids = (self._tokenizer.token_to_id(token) for token in tokens if token is not None)
        return next((found for found in ids if found is not None), None)

    def _find_beginning(self, beside: Beside) -> None:
        """Sets the beginning-of-text ids, from the config or else from the file's template."""
        prefix = self._prefix()
        named = self._find([beside.tokens.get("bos")])
        usual = prefix[0] if prefix else self._find(_USUAL_BOS)
        self.bos_id = usual if named is None else named
        own = () if self.bos_id is None else (self.bos_id,)
        self.bos_ids = prefix or own
        says = bool(prefix) if beside.adds_bos is None else beside.adds_bos
        self.adds_bos = says and bool(self.bos_ids)

    def _prefix(self) -> tuple[int, ...]:
        """Returns the ids that the file's template adds before a text."""
        # A text that every vocabulary can encode; what the template adds is found by comparison.
        for letter in ("a", "A", "1", "."):
            try:
                plain = self._tokenizer.encode(letter, add_special_tokens=False).ids
                whole = self._tokenizer.encode(letter).ids
            except Exception:  # the letter is not in the vocabulary, and there is no unknown token
                continue
            for start in range(len(whole) - len(plain) + 1) if plain else ():
                if whole[start : start + len(plain)] == plain:
                    return tuple(whole[:start])
        return ()

    def _control(self, data: dict[str, Any], beside: Beside) -> set[str]:
        """Returns the names of the tokens that documents must not produce."""
        tokens = self._tokenizer
        model = data["model"]
        added = data.get("added_tokens") or ()
        special = {one["content"] for one in added if one.get("special")}
        named = {*beside.tokens.values(), *beside.special, *_USUAL}
        ids = (*self.eos_ids, self.pad_id, self.bos_id, model.get("unk_id"))
        named |= {tokens.id_to_token(one) or "" for one in ids if one is not None}
        if isinstance(model.get("unk_token"), str):
            named.add(model["unk_token"])
        # Pieces of ordinary text stay available even if used as special tokens (some pad with "!").
        own = {one["content"] for one in added}
        named = {token for token in named if token in own or MARKED.fullmatch(token)}
        found = {token for token in special | named if tokens.token_to_id(token) is not None}
        # A byte-pair encoding needs its single characters for merges.
        return {token for token in found if len(token) > 1 or "merges" not in model}

    def encode(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """Encodes texts, without special ids before or after them.

        Args:
            texts: texts.
            special: whether special tokens written out in a text become their ids.
        """
        tokenizer = self._tokenizer if special else self._documents
        encoded = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [one.ids for one in encoded]

    def encode_with_offsets(
        self, text: str, special: bool = False
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Encodes a text; see :meth:`SpecialIds.encode_with_offsets`."""
        tokenizer = self._tokenizer if special else self._documents
        encoded = tokenizer.encode(text, add_special_tokens=False)
        return encoded.ids, encoded.offsets

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes ids; special tokens and ids outside the vocabulary are dropped."""
        kept = [int(i) for i in ids if 0 <= i < self.vocab_size and i not in self._control_ids]
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    def files(self) -> dict[str, bytes]:
        """Returns the file, with a config that names its special tokens.

        If no beginning-of-text ids are added to prompts (as in training), the file's template,
        truncation and padding are removed, so that other programs encode texts as in training.
        """
        made = tokenizer_files(
            self._tokenizer, self.eos_id, self.pad_id, self.bos_id, self.adds_bos
        )
        return made | {"tokenizer.json": self._content if self.adds_bos else self._bare()}

    def _bare(self) -> bytes:
        data = json.loads(self._content.decode("utf-8-sig"))
        post = data.get("post_processor")
        several = (post or {}).get("type") == "Sequence"
        steps = post["processors"] if several else [post] if post else []
        # ByteLevel adds no ids; it only adjusts offsets.
        kept = [one for one in steps if one["type"] == "ByteLevel"]
        changed = len(kept) < len(steps) or data.get("truncation") or data.get("padding")
        if not changed:
            return self._content
        data["post_processor"] = kept[0] if kept else None
        data["truncation"] = data["padding"] = None
        return (json.dumps(data, ensure_ascii=False, indent=2) + "\n").encode()


def _without_dropout(content: bytes) -> bytes:
    """Removes the dropout of a BPE model, which would draw other ids for a text every time."""
    if re.search(rb'"dropout"\s*:\s*[\d.]', content) is None:  # the vocabulary may match, too
        return content
    try:
        data = json.loads(content.decode("utf-8-sig"))
        if not data["model"].get("dropout"):
            return content
    except (ValueError, LookupError, TypeError, AttributeError):
        return content  # not a tokenizer.json; the reader names it
    data["model"]["dropout"] = None
    return (json.dumps(data, ensure_ascii=False, indent=2) + "\n").encode()


def _read(content: bytes, name: str) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8-sig"))
        data = json.loads(content.decode("utf-8-sig"))
    except Exception:  # the library raises nothing narrower
        raise TrainingError(f"config.data.tokenizer = {name!r} is not a tokenizer.json.") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, data


def _with_hidden_names(data: dict[str, Any], control: set[str]) -> tuple[dict[str, Any], bool]:
    """Renames the control tokens of a tokenizer.json so that no text contains them.

    Args:
        data: content of the file.
        control: names of the tokens.

    Returns:
        (the content with new names, whether a text could produce a token by its old name).
    """
    # A private-use character and a random number, different in each process: no text has them.
    nonce = secrets.token_hex(16)
    model = dict(data["model"])
    vocabulary, merges = model["vocab"], model.get("merges")
    renamed = {token: f"\ue000{nonce} {token}" for token in control}
    reachable = False
    # A piece can be produced by its text without a merge in word vocabularies, and in byte-pair
    # ones that look up whole words first.
    if isinstance(vocabulary, dict):
        reachable = merges is None and not renamed.keys().isdisjoint(vocabulary)
        reachable |= bool(model.get("ignore_merges")) and not renamed.keys().isdisjoint(vocabulary)
        model["vocab"] = {renamed.get(piece, piece): i for piece, i in vocabulary.items()}
    else:
        reachable = any(piece in renamed for piece, _ in vocabulary)
        model["vocab"] = [[renamed.get(piece, piece), score] for piece, score in vocabulary]
    if merges is not None:
        # Without the merges that lead to a token's name, its text stays several pieces.
        kept = [pair for pair in merges if _joined(pair, model).isdisjoint(renamed)]
        reachable |= len(kept) < len(merges)
        model["merges"] = kept
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = renamed.get(model["unk_token"], model["unk_token"])
    added = data.get("added_tokens") or []
    reachable |= any(one["content"] in control and not one.get("special") for one in added)
    added = [one | {"content": renamed.get(one["content"], one["content"])} for one in added]
    return data | {"model": model, "added_tokens": added, "post_processor": None}, reachable


def _joined(pair: str | Sequence[str], model: dict[str, Any]) -> set[str]:
    """Returns the two pieces of a merge and the merged piece."""
    left, right = pair.split(" ") if isinstance(pair, str) else pair
    return {left, right, left + right.removeprefix(model.get("continuing_subword_prefix") or "")}
