"""Chats: rendered as transformers renders them, with the assistant's turns scored."""

import datetime
import json
import os
import pathlib

import numpy as np
import pytest
import tokenizers

from loro_jax.errors import TrainingError
from loro_jax.text.chat import ChatTemplate, TemplateRefusedError, load_template
from loro_jax.text.chat_prompts import chat_prompt, end_of_turn
from loro_jax.text.config import DataConfig
from loro_jax.text.content import NotTextError
from loro_jax.text.conversations import Conversations, marked_turns
from loro_jax.text.encoding import encode_document
from loro_jax.text.marked import is_counted, plain_ids
from loro_jax.text.tokenizers.tokenizer import load_tokenizer

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<|eot|>"]

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

TEMPLATES = {
    "chatml": CHATML,
    "llama": """{{- bos_token }}
{%- if strftime_now is defined %}{% set today = strftime_now("%d %b %Y") %}{% endif %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system = "" %}{% endif %}
{{- "[system]\\n\\nToday: " + today + "\\n" + system + "<|eot|>" }}
{% for message in messages %}
    {{- '[' + message.role + ']\\n\\n' + message['content'] | trim + '<|eot|>' }}
{% endfor %}
{% if add_generation_prompt %}{{ '[assistant]\\n\\n' }}{% endif %}""",
    "mistral": """{% if messages[0]['role'] == 'system' %}
{% set loop_messages = messages[1:] %}{% set system = messages[0]['content'] %}
{% else %}{% set loop_messages = messages %}{% endif %}
{{ bos_token }}{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{% if message['role'] == 'user' %}
{% if loop.first and system is defined %}{{ '[INST] ' + system + '\\n\\n' }}
{% else %}{{ '[INST] ' }}{% endif %}
{{ message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token}}{% endif %}
{% endfor %}""",
    "helpers": """{% set ns = namespace(count=0) %}
{%- macro turn(m) -%}<|im_start|>{{ m.role }}: {{ m.content | trim }}{%- endmacro %}
{% for message in messages %}
    {% if message.role == "system" %}{% continue %}{% endif %}
    {% set ns.count = ns.count + 1 %}
{{ turn(message) }} {{ ns.count }}{{ {"é": "<&>", "a": [1, none]} | tojson }}
    {% if ns.count > 5 %}{% break %}{% endif %}
{% endfor %}
{{ tools | tojson(indent=2) if tools is not none else 'no tools' }}
{% if documents is none %}none{% endif %}{{ undefined_name }}""",
    "generation": """{{ bos_token }}{% for message in messages %}
{% if message.role == 'assistant' %}
{{ '<|im_start|>assistant\\n' }}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}

{% else %}<|im_start|>{{ message.role + '\\n' + message.content }}<|im_end|>
{% endif %}
{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
}

USER = {"role": "user", "content": "What is  1 + 1?\n"}
CHATS = {
    "one turn": [USER, {"role": "assistant", "content": "It is 2."}],
    "system": [
        {"role": "system", "content": " Be brief. "},
        USER,
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "<b>naïve</b> \U0001f600?"},
        {"role": "assistant", "content": "Ça va, \U0001f600 oui."},
    ],
    "no answer yet": [USER],
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tokenizer of bytes and special tokens in Hugging Face's format, without a template."""
    path = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(alphabet)}
    merges = [("i", "s"), ("Ġ", "is"), ("b", "r")]
    vocabulary |= {a + b: len(vocabulary) + i for i, (a, b) in enumerate(merges)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    made.save(str(path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "model_max_length": 10_000}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def counterpart(directory):
    transformers = pytest.importorskip("transformers", reason="the reference is transformers'")
    return transformers.PreTrainedTokenizerFast.from_pretrained(str(directory))


def with_template(directory, tmp_path, source):
    """(a copy of the directory with a template, our template, our tokenizer)."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(source, encoding="utf-8")
    template = load_template(DataConfig(tokenizer=str(tmp_path), format="chat"), now=None)
    return tmp_path, template, load_tokenizer(str(tmp_path))


def ids_of(template, tokenizer, messages):
    document = marked_turns(template, messages, None)
    ids = encode_document(document, tokenizer)
    return plain_ids(ids).tolist(), is_counted(ids)


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
def test_templates_are_rendered_as_transformers_renders_them(directory, tmp_path, source, chat):
    path, template, tokenizer = with_template(directory, tmp_path, source)
    theirs = counterpart(path)
    tools = [{"type": "function", "function": {"name": "f", "description": "<é>"}}]
    for prompt in (False, True):
        for given in (None, tools):
            options = {"add_generation_prompt": prompt, "tools": given}
            expected = theirs.apply_chat_template(chat, tokenize=False, **options)
            assert template.render(chat, **options) == expected
    encoded = theirs.apply_chat_template(chat, return_dict=True)["input_ids"]
    assert tokenizer.encode([template.render(chat)], special=True) == [encoded]


@pytest.mark.parametrize("name", ["one turn", "system"])
def test_generation_blocks_give_the_masks_of_transformers(directory, tmp_path, name):
    path, template, tokenizer = with_template(directory, tmp_path, TEMPLATES["generation"])
    theirs = counterpart(path).apply_chat_template(
        CHATS[name], return_dict=True, return_assistant_tokens_mask=True
    )
    ids, counted = ids_of(template, tokenizer, CHATS[name])
    assert ids == theirs["input_ids"]
    np.testing.assert_array_equal(counted, theirs["assistant_masks"])
    assert counted.any()


@pytest.mark.parametrize(
    ("source", "turns"),
    [
        ("chatml", ["2<|im_end|>", "Ça va, \U0001f600 oui.<|im_end|>"]),
        ("llama", ["2<|eot|>", "Ça va, \U0001f600 oui.<|eot|>"]),
        ("mistral", [" 2</s>", " Ça va, \U0001f600 oui.</s>"]),
        ("generation", ["2<|im_end|>", "Ça va, \U0001f600 oui.<|im_end|>"]),
    ],
)
def test_the_assistants_turns_are_scored_with_their_ends(directory, tmp_path, source, turns):
    _, template, tokenizer = with_template(directory, tmp_path, TEMPLATES[source])
    document = marked_turns(template, CHATS["system"], None)
    assert [document[start:end] for start, end in document.spans] == turns
    ids, counted = ids_of(template, tokenizer, CHATS["system"])
    scored = [one for one, count in zip(ids, counted, strict=True) if count]
    assert scored == [i for text in turns for i in tokenizer.encode([text], special=True)[0]]


def test_a_mask_by_hand(directory, tmp_path):
    _, template, tokenizer = with_template(directory, tmp_path, CHATML)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    ids, counted = ids_of(template, tokenizer, messages)
    # A special token, "user", a line feed, "Hi", a special token, a line feed: 1 + 4 + 1 + 2 + 1
    # + 1, then a special token, "assistant" (of which "is" is one token) and a line feed.
    before = 10 + 1 + 8 + 1
    assert counted.tolist() == [False] * before + [True] * 3 + [False]
    assert ids[-2] == tokenizer.encode(["<|im_end|>"], special=True)[0][0]


def test_without_special_tokens_white_space_ends_a_turn():
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{{ '' }}{% endfor %}"
    template = ChatTemplate(source)
    document = marked_turns(template, CHATS["one turn"], None)
    assert [document[slice(*span)] for span in document.spans] == ["assistant: It is 2.\n"]


def test_a_template_that_rewrites_earlier_messages_needs_generation_blocks():
    source = "{% for m in messages %}{{ m.content if loop.last else '-' }}{% endfor %}"
    with pytest.raises(TemplateRefusedError, match=r"message 2, .*\{% generation %\}"):
        marked_turns(ChatTemplate(source), CHATS["one turn"], None)


def test_training_fixes_the_date_of_templates(directory, tmp_path):
    _, template, _ = with_template(directory, tmp_path, "{{ strftime_now('%Y-%m-%d') }}")
    assert template.render([USER]) == datetime.datetime.now().strftime("%Y-%m-%d")
    fixed = load_template(DataConfig(tokenizer=str(tmp_path)))
    assert fixed.render([USER]) == "2024-07-26"
    assert fixed.fingerprint != template.fingerprint


def test_templates_run_in_a_sandbox():
    for source in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"):
        with pytest.raises(TemplateRefusedError, match=r"unsafe|not safe"):
            ChatTemplate(source).render([USER])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("text", "not a JSON object with a list of messages in the field 'messages'"),
        ({"text": "a"}, r"the field 'messages' \(config.data.messages_field\)"),
        ({"messages": []}, "list of messages"),
        ({"messages": ["a"]}, "message 1 in the field 'messages' is not an object"),
        ({"messages": [{"role": "user"}]}, "message 1 .* has no text as its 'content'"),
        ({"messages": [USER, {"content": "a"}]}, "message 2 .* has no text as its 'role'"),
        ({"messages": [{"role": "user", "content": 5}]}, "no text as its 'content'"),
        ({"messages": [USER]}, "no message of the assistant"),
        ({"messages": [USER, USER, *CHATS["one turn"]]}, "refuses the messages .roles must alter"),
        ({"messages": CHATS["one turn"], "tools": "{"}, "'tools' is not readable as JSON"),
    ],
)
def test_records_that_are_no_chats(row, reason):
    records = Conversations("messages", ChatTemplate(TEMPLATES["mistral"], {"eos": "</s>"}))
    with pytest.raises(NotTextError, match=reason) as error:
        records.document(row)
    assert "\n" not in str(error.value)


def test_records_of_sharegpt_and_empty_fields():
    records = Conversations("messages", ChatTemplate(CHATML))
    sharegpt = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo", "tools": None}]
    usual = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    documents = [records.document({"messages": one, "tools": None}) for one in (sharegpt, usual)]
    assert documents[0] == documents[1]
    assert documents[0].spans == documents[1].spans


def test_where_a_template_comes_from(directory, tmp_path):
    def load(**fields):
        return load_template(DataConfig(tokenizer=str(tmp_path), **fields))

    with_template(directory, tmp_path, "from its own file")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = [{"name": "tools", "template": "b"}, {"name": "default", "template": "{{ eos_token }}"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    assert load().source == "from its own file"
    (tmp_path / "chat_template.jinja").unlink()
    assert load().render([USER]) == "</s>"
    (tmp_path / "other.jinja").write_text("{{ bos_token }}")
    assert load(chat_template=str(tmp_path / "other.jinja")).render([USER]) == "<s>"
    with pytest.raises(TrainingError, match=r"chat_template = .* does not exist"):
        load(chat_template=str(tmp_path / "none.jinja"))
    (tmp_path / "other.jinja").write_text("{% if %}")
    with pytest.raises(TrainingError, match=r"other.jinja: the chat template is not valid \(Exp"):
        load(chat_template=str(tmp_path / "other.jinja"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for name in (str(tmp_path), "bytes", "embedded"):
        with pytest.raises(TrainingError, match="has no chat template; expected") as error:
            load_template(DataConfig(tokenizer=name))
        assert "\n" not in str(error.value)


def test_prompts_of_a_chat_model(directory, tmp_path):
    _, template, tokenizer = with_template(directory, tmp_path, CHATML)
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert chat_prompt(template, "Hi") == expected
    assert tokenizer.encode(["<|im_end|>"], special=True) == [[end_of_turn(template, tokenizer)]]
    assert end_of_turn(ChatTemplate("{{ messages[-1].content }}"), tokenizer) is None
    with pytest.raises(TrainingError, match=r"refuses a message of the user \(no\)"):
        chat_prompt(ChatTemplate("{{ raise_exception('no') }}"), "Hi")


def test_a_real_tokenizer():
    """Any directory of a chat model in Hugging Face's format."""
    name = os.environ.get("LORO_JAX_CHAT_TOKENIZER", "")
    if not pathlib.Path(name).is_dir() or not name:
        pytest.skip("LORO_JAX_CHAT_TOKENIZER names no directory")
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(name)
    template = load_template(DataConfig(tokenizer=name), now=None)
    tokenizer = load_tokenizer(name)
    for chat in CHATS.values():
        for prompt in (False, True):
            expected = theirs.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=prompt
            )
            assert template.render(chat, add_generation_prompt=prompt) == expected
        ids, counted = ids_of(template, tokenizer, chat)
        assert ids == theirs.apply_chat_template(chat, return_dict=True)["input_ids"]
        assert counted.any() == any(message["role"] == "assistant" for message in chat)
