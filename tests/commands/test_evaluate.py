"""The command that scores texts: sizes of windows, what counts, what can't be scored."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from loro_jax.commands.evaluate import _parser, _sizes, main
from loro_jax.text.tokenizers.tokenizer import load_tokenizer
from loro_jax.training.config import Config
from loro_jax.training.trained import load_model
from models.huggingface import write_model
from models.windows import score
from tests.models.test_decoding import make

TEXT = "one two three four\n\nfive six seven\n\neight"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model that takes long texts, with bytes for a tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "out"
    files = load_tokenizer("bytes").files()
    model = make(max_sequence_length=1 << 15)
    write_model(model, folder, files=files, token_ids={"eos_token_id": 1, "pad_token_id": 0})
    (folder / "text.txt").write_text(TEXT)
    return folder


def sizes(directory, *arguments, longest=1 << 15):
    return _sizes(_parser().parse_args([str(directory), "embedded", *arguments]), longest)


def test_the_default_window_takes_no_more_than_a_batch_of_training(directory, tmp_path):
    assert sizes(directory) == (2048, 2048, 4)
    assert sizes(directory, longest=64) == (64, 64, 8)
    assert sizes(directory, "--window=32768") == (32768, 32768, 1)
    assert sizes(directory, "--window=32", "--stride=8", "--batch_size=3") == (32, 8, 3)
    config = Config(batch_size=16, gradient_accumulation=4, sequence_length=128)
    (tmp_path / "config.json").write_text(config.to_json())
    assert sizes(tmp_path) == (128, 128, 4)
    assert sizes(tmp_path, "--window=512") == (512, 512, 1)
    assert sizes(tmp_path, "--window=64") == (64, 64, 8)


def test_documents_begin_with_what_the_tokenizer_says_and_it_is_not_scored(directory, capsys):
    model, tokenizer = load_model(directory)
    documents = tokenizer.encode(TEXT.split("\n\n"))
    ids = np.array([i for ids in documents for i in (2, *ids, 1)], np.int32)
    expected = score(model, ids, 512, 512, counted=ids != 2)
    path = directory / "tokenizer_config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"bos_token": "<unk>", "add_bos_token": True}))
    try:
        assert load_model(directory)[1].bos_ids == (2,)
        text = str(directory / "text.txt")
        assert main([str(directory), text, "--split=all", "--json"]) == 0
        row = json.loads(capsys.readouterr().out)
        assert row["tokens"] == expected.tokens == sum(len(ids) + 1 for ids in documents)
        assert row["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
        assert main([str(directory), text, "--split=all", "--json", "--no_bos"]) == 0
        assert json.loads(capsys.readouterr().out)["tokens"] == expected.tokens - 1
    finally:
        path.write_text(before)


def test_of_records_the_answers_are_scored(directory, capsys):
    """Given the prompts, and as the mean over the answers' tokens."""
    model, tokenizer = load_model(directory)
    records = [{"q": "2 + 2 = ", "a": "4"}, {"q": "Say hello: ", "a": "hello!"}]
    path = directory / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    ids, counted = [], []
    for record in records:
        prompt, answer = tokenizer.encode([record["q"], record["a"]])
        ids += [*prompt, *answer, 1]
        counted += [False] * len(prompt) + [True] * (len(answer) + 1)
    expected = score(model, np.array(ids, np.int32), 64, 64, counted=np.array(counted))
    options = ["--format=prompt_answer", "--prompt_field=q", "--answer_field=a", "--window=64"]
    assert main([str(directory), str(path), *options, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["tokens"] == expected.tokens == 2 + 7
    assert row["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    assert main([str(directory), str(path), "--format=chat"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: the tokenizer {str(directory)!r} has no chat template")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stride=0"], "--stride=0: expected at least 1"),
        (["--window=0"], "--window=0: expected at least 1"),
        (["--window=-5"], "--window=-5: expected at least 1"),
        (["--window=40000"], "--window=40000, --stride=40000: expected 1 <= stride <= window <="),
        (["--window=8", "--stride=9"], "--window=8, --stride=9"),
        (["--max_tokens=1"], "--max_tokens=1: expected 0 (all) or at least 2"),
    ],
)
def test_what_can_not_be_scored_is_named(directory, capsys, arguments, message):
    assert main([str(directory), str(directory / "text.txt"), "--split=all", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_a_beginning_that_the_tokenizer_does_not_have_is_named(directory, capsys):
    path = directory / "tokenizer_config.json"
    before = path.read_text()
    path.write_text(json.dumps({k: v for k, v in json.loads(before).items() if k != "bos_token"}))
    try:
        arguments = [str(directory), str(directory / "text.txt"), "--split=all", "--bos"]
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: --bos: the tokenizer has no beginning-of-text token")
    finally:
        path.write_text(before)


def test_a_loss_that_is_no_number_is_an_error(directory, capsys, tmp_path):
    model = make()
    model.head.W[...] = jnp.full_like(model.head.W[...], 3e38)  # logits overflow
    files = load_tokenizer("bytes").files()
    ids = {"eos_token_id": 1, "pad_token_id": 0}
    write_model(model, tmp_path / "bad", files=files, token_ids=ids)
    assert main([str(tmp_path / "bad"), str(directory / "text.txt"), "--split=all"]) == 1
    assert "loss on the text is not a number" in capsys.readouterr().err
