"""The command that continues texts: where they begin, what ends them, what can't be continued."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from loro_jax.commands.generate import _GrowingText, continuations, main
from loro_jax.text.tokenizers.tokenizer import load_tokenizer
from loro_jax.training.trained import load_model
from models.huggingface import write_model
from models.sampling import GREEDY
from tests.models.test_decoding import make

SPECIAL = ("<unk>", "<s>", "</s>", "<|user|>")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model and a byte-level tokenizer that begins texts with <s>."""
    folder = tmp_path_factory.mktemp("model") / "out"
    write_model(make(vocab_size=264), folder)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=256 + len(SPECIAL),
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["text"], trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder


def set_ends(directory, config, generation):
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(content | {"eos_token_id": config}))
    path = directory / "generation_config.json"
    path.unlink(missing_ok=True)
    if generation is not None:
        path.write_text(json.dumps({"eos_token_id": generation}))


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (2, None, (2,)),
        ([3, 2], None, (3, 2)),
        (2, [2, 3], (2, 3)),
        (None, 3, (3,)),
        (-1, [3, -1], (3,)),
        ([2], {}, None),
        ("</s>", None, None),
    ],
)
def test_ends_of_both_files(directory, config, generation, expected):
    set_ends(directory, config, generation)
    if expected is None:
        error = io.StringIO()
        assert run([directory, "--prompt=x"], error=error)[0] == 1
        assert "expected an id or a list of ids" in error.getvalue()
    else:
        assert load_model(directory)[1].eos_ids == expected
    set_ends(directory, 2, None)


def run(arguments, error=None):
    out = io.StringIO()
    before, sys.stderr = sys.stderr, error or sys.stderr
    try:
        return main([str(a) for a in arguments], out), out.getvalue()
    finally:
        sys.stderr = before


def test_prompts_begin_and_are_read_as_the_tokenizer_says(directory, monkeypatch):
    seen = []

    def fake(model, prompts, limits, *_, **options):
        seen.append((prompts, limits, options["eos_id"], options["vocab_size"]))
        return iter([np.full(len(prompts), 2)])

    monkeypatch.setattr("loro_jax.commands.generate.generate", fake)
    x = load_model(directory)[1].encode(["x"])[0][0]
    letters = load_model(directory)[1].encode(["<|user|>"])[0]
    for arguments, expected in (
        (["--prompt=x"], [[1, x]]),
        (["--prompt=x", "--no_bos"], [[x]]),
        (["--prompt="], [[1]]),
        (["--prompt=", "--no_bos"], [[2]]),
        (["--prompt=<|user|>x"], [[1, 3, x]]),
        (["--prompt=<s>x"], [[1, x]]),
        (["--prompt=<|user|>", "--no_parse_special"], [[1, *letters]]),
        (["--prompt=x", "--prompt=<|user|>", "--no_bos"], [[x], [3]]),
    ):
        assert run([directory, *arguments])[0] == 0
        prompts, limits, ends, vocab_size = seen.pop()
        assert prompts == expected
        assert limits == [min(100, 96 - len(prompt)) for prompt in expected]
        assert (ends, vocab_size) == ((2,), 260)


def test_a_message_is_rendered_by_the_chat_template(directory, monkeypatch):
    seen = []

    def fake(model, prompts, limits, *_, **options):
        seen.append((prompts, options["eos_id"]))
        return iter([np.full(len(prompts), 69), np.full(len(prompts), 3)])

    monkeypatch.setattr("loro_jax.commands.generate.generate", fake)
    path = directory / "chat_template.jinja"
    path.write_text(
        "<s>{% for m in messages %}{{ m.role[0] }}{{ m.content }}<|user|>{% endfor %}"
        "{% if add_generation_prompt %}a{% endif %}"
    )
    try:
        tokenizer = load_model(directory)[1]
        reply = tokenizer.decode([69])
        u, x, a = (tokenizer.encode([letter])[0][0] for letter in "uxa")
        # The token that ends the assistant's turn ends the text, besides the tokenizer's.
        assert run([directory, "--chat", "--prompt=x"]) == (0, reply + "\n")
        assert seen.pop() == ([[1, u, x, 3, a]], (2, 3))
        several = run([directory, "--chat", "--prompt=x", "--prompt=xx"])
        assert several == (0, f"x\n{reply}\n\nxx\n{reply}\n\n")
    finally:
        path.unlink()
    error = io.StringIO()
    assert run([directory, "--chat", "--prompt=x"], error)[0] == 1
    assert "has no chat template" in error.getvalue()
    assert error.getvalue().count("\n") == 1


def test_a_batch_gets_what_each_gets_alone(directory):
    model, tokenizer = load_model(directory)
    prompts = ["x" * 90, "y"]

    def texts(prompts):
        steps = continuations(model, tokenizer, prompts, None, GREEDY)
        return ["".join(grown) for grown in zip(*steps, strict=True)]

    assert texts(prompts) == [text for prompt in prompts for text in texts([prompt])]


def test_a_text_stops_before_a_character_that_is_not_whole():
    tokenizer = load_tokenizer("bytes")
    for text, cut, expected in (("a日", 3, "a"), ("a日", 4, "a日"), ("日", 2, ""), ("ab", 1, "a")):
        ids = tokenizer.encode([text])[0]
        growing = _GrowingText(tokenizer, [70], cut)
        assert "".join(growing.grown_by(token) for token in [*ids, 70, 70][:9]) == expected
    # A byte that no character has stays one where something follows it.
    growing = _GrowingText(tokenizer, [70], 9)
    assert [growing.grown_by(token) for token in (0xFF + 3, 100, 1, 100)] == ["", "\ufffda", "", ""]
    # What comes with the start of a character in one token does not wait for the rest of it.

    class Pieces:
        eos_ids = (0,)

        def decode(self, ids):
            pieces = {5: b"x", 6: "a日".encode()[:2], 7: "日".encode()[1:]}
            return b"".join(pieces[i] for i in ids).decode(errors="replace")

    growing = _GrowingText(Pieces(), [5], 9)
    assert [growing.grown_by(token) for token in (6, 7, 6)] == ["a", "日", "a"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt=" + "x" * 200], "the prompt has 201 tokens; expected at most 95"),
        (["--prompt=x", "--max_new_tokens=95"], "--max_new_tokens must be between 1 and 94"),
        (["--prompt=x", "--max_new_tokens=0"], "--max_new_tokens must be at least 1, but is 0"),
        (["--prompt=x", "--seed=-1"], "--seed must be between 0 and 4294967295, but is -1"),
        (["--prompt=x", f"--seed={2**70}"], "--seed must be between 0 and 4294967295"),
        (["--prompt=x", "--temperature=nan"], "--temperature must be at least 0 and finite"),
        (["--prompt=ab\udcff"], "'ab\\udcff' is not valid Unicode at character 2"),
    ],
)
def test_what_can_not_be_continued_is_named(directory, arguments, message):
    error = io.StringIO()
    status, out = run([directory, *arguments], error=error)
    assert (status, out) == (1, "")
    assert error.getvalue().startswith("error: ")
    assert error.getvalue().count("\n") == 1
    assert message in error.getvalue()


class _Broken(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self._error = error

    def write(self, text):
        raise self._error


def test_output_that_nobody_takes(directory, capsys):
    arguments = [str(directory), "--prompt=x", "--max_new_tokens=2"]
    assert main(arguments, _Broken(BrokenPipeError())) == 141
    assert capsys.readouterr().err == ""
    assert main(arguments, _Broken(OSError(28, "No space left on device"))) == 1
    assert capsys.readouterr().err == (
        "error: the text can't be written (No space left on device).\n"
    )


def test_a_pipe_without_a_reader_leaves_no_traceback(directory):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "loro_jax", "generate", str(directory), "--prompt=x"]
    done = subprocess.run(
        [*command, "--max_new_tokens=2"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
