"""Prompts for models that were trained on chats."""

from __future__ import annotations

from loro_jax.errors import TrainingError
from loro_jax.text.chat import ChatTemplate, TemplateRefusedError
from loro_jax.text.conversations import marked_turns
from loro_jax.text.encoding import encode_document
from loro_jax.text.marked import is_counted
from loro_jax.text.tokenizers.tokenizer import Tokenizer


def chat_prompt(template: ChatTemplate, text: str) -> str:
    r"""Returns the prompt that asks for an answer to one message of the user.

    Raises:
        TrainingError: if the template can't render it.

    Example:
        >>> source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        >>> source += "{% if add_generation_prompt %}assistant:{% endif %}"
        >>> chat_prompt(ChatTemplate(source), "Hi")
        'user: Hi\nassistant:'
    """
    messages = [{"role": "user", "content": text}]
    try:
        return str(template.render(messages, add_generation_prompt=True))
    except TemplateRefusedError as error:
        raise TrainingError(f"the chat template refuses a message of the user ({error}).") from None


def end_of_turn(template: ChatTemplate, tokenizer: Tokenizer) -> int | None:
    """Returns the special token with which the assistant's turns end; None: there is none."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    try:
        document = marked_turns(template, messages, None)
    except TemplateRefusedError:
        return None
    ids = encode_document(document, tokenizer)
    scored = ids[is_counted(ids)]
    # Special tokens have no text.
    ends = len(scored) and tokenizer.decode([int(scored[-1])]) == ""
    return int(scored[-1]) if ends else None
