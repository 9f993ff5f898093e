"""Chat records: lists of messages, rendered by a chat template; the assistant's are scored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from loro_jax.text.chat import ChatTemplate, Message, TemplateRefusedError
from loro_jax.text.content import NotTextError, decoded
from loro_jax.text.marked import Marked, Span

_SETTING = "config.data.messages_field"

# Roles of ShareGPT's records, whose messages have the keys "from" and "value".
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}

_ASSISTANT = "assistant"


class Conversations:
    """Records of a list of messages.

    A message has a ``role`` and a ``content``, both text, or ``from`` and ``value`` as in ShareGPT.
    Its other fields, and the record's ``tools``, are passed to the template.

    Args:
        field: the field that holds the messages.
        template: the chat template.
    """

    optional: tuple[str, ...] = ("tools",)
    kind = "list of messages"

    def __init__(self, field: str, template: ChatTemplate):
        self._field, self._template = field, template
        self.columns: Mapping[str, str] = {field: _SETTING}

    def document(self, row: Any) -> Marked:
        """Returns the rendered messages, with the assistant's turns scored.

        Raises:
            NotTextError: if the record has no such messages, or the template refuses them.
        """
        value = row.get(self._field) if isinstance(row, Mapping) else None
        if not isinstance(value, list) or not value:
            raise NotTextError(
                f"not a JSON object with a list of messages in the field {self._field!r} "
                f"({_SETTING})"
            )
        messages = [self._message(one, number) for number, one in enumerate(value, 1)]
        if not any(message["role"] == _ASSISTANT for message in messages):
            raise NotTextError(f"no message of the assistant in the field {self._field!r}")
        try:
            return marked_turns(self._template, messages, _tools(row.get("tools")))
        except TemplateRefusedError as error:
            raise NotTextError(f"the chat template refuses the messages ({error})") from None

    def _message(self, value: Any, number: int) -> Message:
        place = f"message {number} in the field {self._field!r}"
        if not isinstance(value, Mapping):
            raise NotTextError(f"{place} is not an object with a role and a content")
        # Tables fill fields that a message lacks with null.
        message = {key: one for key, one in value.items() if one is not None}
        if "role" not in message and "from" in message:
            role = message.pop("from")
            message = {"role": _SHAREGPT_ROLES.get(str(role), role)} | {
                {"value": "content"}.get(key, key): one for key, one in message.items()
            }
        if "content" not in message and message.get("tool_calls"):
            message["content"] = ""
        for key in ("role", "content"):
            one = message.get(key)
            if isinstance(one, bytes):
                message[key] = one = decoded(one)
            if not isinstance(one, str):
                raise NotTextError(f"{place} has no text as its {key!r}")
        return message


def _tools(value: Any) -> Any:
    """Returns the descriptions of tools, which tables hold as JSON; None: there are none."""
    if not isinstance(value, str | bytes):
        return value or None
    try:
        return json.loads(value) or None
    except ValueError:
        raise NotTextError("the field 'tools' is not readable as JSON") from None


def marked_turns(template: ChatTemplate, messages: list[Message], tools: Any) -> Marked:
    """Renders messages, with spans of the assistant's turns.

    A template's ``{% generation %}`` blocks define them. Without such blocks, a turn is what is
    added to the prompt that asks for it: it starts after the generation prompt and includes the end
    of the turn.
    """
    whole = template.render(messages, tools=tools)
    if template.has_generation_blocks:
        return Marked(whole, whole.spans, rendered=True)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != _ASSISTANT:
            continue
        prompt = template.render(messages[:number], tools=tools, add_generation_prompt=True)
        turn = template.render(messages[: number + 1], tools=tools)
        if not (whole.startswith(turn) and turn.startswith(prompt)):
            raise TemplateRefusedError(
                f"message {number + 1}, of the assistant, changes the text before it, or other "
                "messages change it; mark the assistant's text in the template by {% generation %} "
                "and {% endgeneration %}"
            )
        spans.append(_without_space_after(turn, len(prompt), message["content"]))
    return Marked(whole, spans, rendered=True)


def _without_space_after(turn: str, start: int, content: str) -> Span:
    """Returns the span of a turn, without white space that follows its end-of-turn token."""
    stripped = turn.rstrip()
    # If nothing but white space follows the content, that is what ends the turn.
    own_end = stripped[start:].endswith(content.rstrip())
    return start, len(turn) if own_end else max(len(stripped), start)
