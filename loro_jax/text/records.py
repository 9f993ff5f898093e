"""Records as documents: texts, prompts with answers, or chats. Of the last two, answers are scored.

A record is a line of a JSON-lines file, a row of a table, or an example of a dataset.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from loro_jax.text.config import DataConfig
from loro_jax.text.content import NotTextError, decoded
from loro_jax.text.marked import Marked


class Records(Protocol):
    """Makes documents of records.

    Attributes:
        columns: the fields that it reads, with the setting that names each.
        optional: fields that it reads where they exist.
        kind: what the fields hold, "text" or "list of messages".
    """

    columns: Mapping[str, str]
    optional: tuple[str, ...]
    kind: str

    def document(self, row: Any) -> str:
        """Returns the document of a record; raises NotTextError if there is none."""


def records_of(config: DataConfig) -> Records | None:
    """Returns what makes documents of the records of a run's sources; None: they are texts.

    Args:
        config: the data group of a run's config.

    Raises:
        TrainingError: if the chat template is missing or invalid.
    """
    if config.format == "text":
        return None
    if config.format == "prompt_answer":
        return PromptAnswer(config.prompt_field, config.answer_field, config.separator)
    from loro_jax.text.chat import load_template  # needs jinja2, which only chats use
    from loro_jax.text.conversations import Conversations

    return Conversations(config.messages_field, load_template(config))


class TextField:
    """Records that hold a text, all of which is scored.

    Args:
        field: the field that holds it.
    """

    optional: tuple[str, ...] = ()
    kind = "text"

    def __init__(self, field: str):
        self.columns: Mapping[str, str] = {field: "config.data.text_field"}
        self._field = field

    def document(self, row: Any) -> str:
        """Returns the text of a record; raises NotTextError if there is none."""
        return text_in(row, self._field, self.columns[self._field])


class PromptAnswer:
    r"""Records of a prompt and its answer, as TRL's "prompt" and "completion".

    The document is the prompt, the separator and the answer, encoded as one text. The answer and
    the end-of-text token are scored.

    Args:
        prompt_field: the field that holds the prompt.
        answer_field: the field that holds the answer.
        separator: put between them; not scored.

    Example:
        >>> records = PromptAnswer("question", "answer", "\n")
        >>> records.document({"question": "1 + 1?", "answer": "2"}).spans
        ((7, 8),)
    """

    optional: tuple[str, ...] = ()
    kind = "text"

    def __init__(self, prompt_field: str, answer_field: str, separator: str = ""):
        self._prompt, self._answer, self._separator = prompt_field, answer_field, separator
        self.columns: Mapping[str, str] = {
            prompt_field: "config.data.prompt_field",
            answer_field: "config.data.answer_field",
        }

    def document(self, row: Any) -> Marked:
        """Returns the document of a record.

        Raises:
            NotTextError: if a field is missing or holds no text.
        """
        before = text_in(row, self._prompt, self.columns[self._prompt]) + self._separator
        answer = text_in(row, self._answer, self.columns[self._answer])
        return Marked(before + answer, [(len(before), len(before) + len(answer))])


def text_in(row: Any, field: str, setting: str) -> str:
    """Returns the text in a field of a record.

    Args:
        row: the record, a mapping.
        field: the field.
        setting: the config field that names it, for messages.

    Raises:
        NotTextError: if there is none.
    """
    value = row.get(field) if isinstance(row, Mapping) else None
    if isinstance(value, bytes):
        return decoded(value)
    if not isinstance(value, str):
        raise NotTextError(f"not a JSON object with a text in the field {field!r} ({setting})")
    return value
