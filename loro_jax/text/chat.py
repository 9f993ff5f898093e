"""Chat templates: Jinja templates that write a list of messages as one text.

They come with tokenizers in Hugging Face's format, and are rendered with the same settings, filters
and functions as there. Templates are programs from elsewhere, so they run in Jinja's sandbox.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import pathlib
import re
import secrets
from collections.abc import Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from loro_jax.errors import TrainingError
from loro_jax.text.config import DataConfig
from loro_jax.text.marked import Marked, Span
from loro_jax.text.tokenizers.special_ids import Beside

Message = dict[str, Any]

# The date that templates see in training: the tokens of a run must not depend on the day on which
# it starts or resumes.
TRAINING_DATE = datetime.datetime(2024, 7, 26)

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

# Both names may be missing without harm.
_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")


class TemplateRefusedError(Exception):
    """A template can't render these messages."""


class ChatTemplate:
    """A compiled template.

    Args:
        source: the template.
        tokens: special tokens by role ("bos", "eos", ...), which templates know as ``bos_token``
            and so on.
        now: the date that templates see; None: the current one.

    Attributes:
        source: the template.
        has_generation_blocks: whether it marks what the assistant has written, by
            ``{% generation %}``.
        fingerprint: identifies what it writes.

    Raises:
        TrainingError: if it is no valid template.

    Example:
        >>> source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        >>> template = ChatTemplate(source)
        >>> str(template.render([{"role": "user", "content": "Hi"}]))
        '<user>Hi'
    """

    def __init__(
        self,
        source: str,
        tokens: dict[str, str] | None = None,
        now: datetime.datetime | None = None,
    ):
        self.source = source
        self._tokens = {f"{role}_token": token for role, token in (tokens or {}).items()}
        content = json.dumps([source, self._tokens, None if now is None else now.isoformat()])
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]
        self.has_generation_blocks = _GENERATION.search(source) is not None
        environment = _environment(now)
        self._marks = environment.generation_marks  # type: ignore[attr-defined]
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise TrainingError(f"the chat template is not valid ({_line(error)}).") from None

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Any = None,
        add_generation_prompt: bool = False,
    ) -> Marked:
        """Renders messages.

        Args:
            messages: dicts of ``role``, ``content``, and whatever else the template uses.
            tools: descriptions of functions, as JSON schemas; None: none.
            add_generation_prompt: whether to end with the beginning of the assistant's turn.

        Returns:
            The text, with the spans of generation blocks.

        Raises:
            TemplateRefusedError: if the template can't render them.
        """
        try:
            text = self._template.render(
                messages=list(messages),
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
            )
        # A template can raise anything: it indexes, adds and calls what it finds in the messages.
        except Exception as error:
            raise TemplateRefusedError(_line(error)) from None
        return _without_marks(text, *self._marks)


def load_template(
    config: DataConfig, now: datetime.datetime | None = TRAINING_DATE
) -> ChatTemplate:
    """Loads the template of a tokenizer, or the one in ``config.chat_template``.

    Args:
        config: the data group of a run's config; uses ``tokenizer`` and ``chat_template``.
        now: the date that the template sees; None: the current one.

    Raises:
        TrainingError: if there is no template, or it can't be read.
    """
    beside = pathlib.Path(config.tokenizer).expanduser()
    directory = beside if beside.is_dir() else beside.parent
    built_in = config.tokenizer in ("embedded", "bytes")
    if config.chat_template is not None:
        path = pathlib.Path(config.chat_template).expanduser()
        source: str | None = _text(path)
        if source is None:
            raise TrainingError(
                f"config.data.chat_template = {config.chat_template!r} does not exist; expected a "
                "file with a Jinja template."
            )
    else:
        path, source = directory, None if built_in else _stored(directory)
    if source is None:
        raise TrainingError(
            f"the tokenizer {config.tokenizer!r} has no chat template; expected "
            "chat_template.jinja, or tokenizer_config.json with a chat_template, next to it (or "
            "a file in config.data.chat_template)."
        )
    try:
        return ChatTemplate(source, {} if built_in else Beside(directory).tokens, now)
    except TrainingError as error:
        raise TrainingError(f"{path}: {error}") from None


def _stored(directory: pathlib.Path) -> str | None:
    """Returns the template in a tokenizer's directory, or None."""
    for name in _FILES:
        content = _text(directory / name)
        if content is None:
            continue
        if name.endswith(".jinja"):
            return content
        try:
            found = json.loads(content)["chat_template"]
        except (ValueError, KeyError, TypeError):
            continue  # read for the special tokens as well, where errors are reported
        if isinstance(found, list):  # several, by name
            named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
            found = named.get("default")
        if isinstance(found, str):
            return found
    return None


def _text(path: pathlib.Path) -> str | None:
    """Reads a file; None if it is missing."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise TrainingError(f"{path} can't be read ({reason}).") from None


def _environment(now: datetime.datetime | None) -> jinja2.Environment:
    """Returns Jinja's environment with the settings and helpers that chat templates expect."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlocks, jinja2.ext.loopcontrols],
    )

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return (now or datetime.datetime.now()).strftime(form)

    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


class _GenerationBlocks(jinja2.ext.Extension):
    """Blocks ``{% generation %}`` ... ``{% endgeneration %}``, whose text is put between marks."""

    tags = {"generation"}  # noqa: RUF012

    def __init__(self, environment: jinja2.Environment):
        super().__init__(environment)
        # Private-use characters and a random number: no message contains them.
        nonce = secrets.token_hex(16)
        self._marks = (f"\ue000{nonce}\ue001", f"\ue002{nonce}\ue003")
        environment.extend(generation_marks=self._marks)

    def parse(self, parser: Any) -> Any:
        """Parses a block as the call of a function with the block's content."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        start, end = self._marks
        return f"{start}{caller()}{end}"


def _without_marks(text: str, start: str, end: str) -> Marked:
    """Returns the text without marks, and the spans between them."""
    spans: list[Span] = []
    pieces: list[str] = []
    begun, length = 0, 0
    for piece in re.split(f"({start}|{end})", text):
        if piece == start:
            begun = length
        elif piece == end:
            spans.append((begun, length))
        else:
            pieces.append(piece)
            length += len(piece)
    return Marked("".join(pieces), spans, rendered=True)


def _line(error: BaseException) -> str:
    """Returns an error's message as one printable line."""
    line = " ".join(str(error).split())[:200] or type(error).__name__
    return "".join(character if character.isprintable() else "?" for character in line)
