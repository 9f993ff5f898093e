"""Prompts with answers, and chats, on their way into batches: only answers are scored."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from loro_jax.bench.data import prepare_tfds
from loro_jax.errors import TrainingError
from loro_jax.text.config import DataConfig
from loro_jax.text.encoding import encode_document
from loro_jax.text.marked import counted_tokens, is_counted, mark, plain_ids
from loro_jax.text.prepare import prepare
from loro_jax.text.records import PromptAnswer, records_of
from loro_jax.text.tokenizers.tokenizer import load_tokenizer
from loro_jax.training.batch import validation_batches
from loro_jax.training.report import corpus_ngrams
from tests.text.samples import (
    BYTES,
    assert_equal_batches,
    config,
    load_corpus,
    read_content,
    take,
    train_iterator,
)

ROWS = [{"prompt": f"{i} + 1 = ", "completion": str(i + 1) * (1 + i % 5)} for i in range(60)]
HELD_OUT = [{"prompt": f"{i} * 2 = ", "completion": str(2 * i)} for i in range(4)]
CHATML = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
CHATML += "{% if add_generation_prompt %}[assistant]{% endif %}"


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def with_records(folder, rows=ROWS, held_out=HELD_OUT, data=None, **changes):
    """A config of these records, and their corpus."""
    files = {
        "source": write_rows(folder / "train.jsonl", rows),
        "validation": write_rows(folder / "validation.jsonl", held_out),
        "format": "prompt_answer",
    }
    run = config(data=files | (data or {}), **changes)
    return run, load_corpus(run, BYTES)


def scored_texts(batch):
    """The scored bytes of each row, with "|" for the end of text."""
    rows = []
    for tokens, mask in zip(batch["tokens"], batch["mask"], strict=True):
        scored = tokens[1:][mask > 0]
        rows.append(BYTES.decode(np.where(scored == BYTES.eos_id, ord("|") + 3, scored)))
    return rows


def test_marks_are_undone():
    ids = np.array([0, 5, 70_000])
    marked = mark(ids, np.array([False, True, False]))
    assert marked.tolist() == [-1, 5, -70_001]
    assert plain_ids(marked).tolist() == ids.tolist()
    assert is_counted(marked).tolist() == [False, True, False]
    plain = np.array([1, 65_535], np.uint16)
    assert plain_ids(plain) is plain
    assert is_counted(plain).all()


def test_tokens_that_overlap_a_span_are_scored():
    # Three bytes of one character, of which some tokenizers give the last one its width.
    offsets = [(0, 1), (1, 1), (1, 1), (1, 2), (2, 5), (5, 6)]
    assert counted_tokens(offsets, [(1, 2)]).tolist() == [False, True, True, True, False, False]
    assert counted_tokens(offsets, [(0, 1)]).tolist() == [True] + [False] * 5
    assert counted_tokens(offsets, [(4, 6), (0, 1)]).tolist() == [True, *[False] * 3, True, True]
    assert counted_tokens([], [(0, 1)]).tolist() == []


@pytest.mark.parametrize("name", ["embedded", "bytes"])
def test_offsets_cover_the_text(name):
    tokenizer = load_tokenizer(name)
    text = "Hé llo  wörld \U0001f600 x</s>and  more"
    for special in (False, True):
        ids, offsets = tokenizer.encode_with_offsets(text, special)
        assert ids == tokenizer.encode([text], special)[0]
        covered = {place for start, end in offsets for place in range(start, end)}
        assert covered == set(range(len(text)))
        if special:
            assert offsets[ids.index(tokenizer.eos_id)] == (17, 21)


def test_an_answer_and_its_end_are_scored():
    document = PromptAnswer("q", "a", " -> ").document({"q": "né", "a": "à\U0001f600"})
    ids = encode_document(document, BYTES)
    answer = [byte + 3 for byte in "à\U0001f600".encode()] + [BYTES.eos_id]
    assert plain_ids(ids).tolist() == [byte + 3 for byte in "né -> ".encode()] + answer
    assert ids[is_counted(ids)].tolist() == answer


def test_a_token_across_the_border_belongs_to_the_answer():
    """Encoded as one text, whose tokens are those that a prompt continues with."""
    tokenizer = load_tokenizer("embedded")
    tokenizer.adds_bos = False
    prompt, answer = "Call for", " the captain"
    document = PromptAnswer("q", "a").document({"q": prompt, "a": answer})
    ids = encode_document(document, tokenizer)
    assert plain_ids(ids).tolist() == [*tokenizer.encode([prompt + answer])[0], tokenizer.eos_id]
    assert tokenizer.decode(ids[is_counted(ids)]) == answer.strip()


def test_prompts_begin_as_the_tokenizer_says(monkeypatch):
    monkeypatch.setattr(BYTES, "bos_ids", (7, 8), raising=False)
    document = PromptAnswer("q", "a").document({"q": "x", "a": "y"})
    assert len(encode_document(document, BYTES)) == 3
    monkeypatch.setattr(BYTES, "adds_bos", True, raising=False)
    assert encode_document(document, BYTES).tolist() == [~7, ~8, ~(ord("x") + 3), ord("y") + 3, 1]


def test_packed_windows_score_the_answers_alone(tmp_path):
    run, corpus = with_records(tmp_path, ROWS, HELD_OUT, batch_size=1)
    assert len(corpus.train[0].documents) == len(ROWS)
    batches = take(train_iterator(run, corpus), len(corpus.train_stream) // 8 - 1)
    seen = "".join(text for batch in batches for text in scored_texts(batch))
    answers = sum(len(row["completion"]) + 1 for row in ROWS)
    # All but what an epoch's offset and its last window leave out.
    assert answers - 16 <= len(seen) <= answers
    assert set(seen) <= set("0123456789|")


def test_padded_records_keep_their_beginning(tmp_path):
    rows = [
        {"prompt": "abcd", "completion": "efghijkl"},  # cut
        {"prompt": "abcdefgh", "completion": "i"},  # one token fits
        {"prompt": "abcdefghi", "completion": "j"},  # none does
    ]
    held_out = [{**row, "prompt": row["prompt"].upper()} for row in rows]
    run, corpus = with_records(tmp_path, rows, held_out, {"shape": "padded"}, batch_size=2)
    assert len(corpus.train[0].documents) == 2
    assert sorted(scored_texts(next(train_iterator(run, corpus)))) == ["efghi", "i"]
    assert corpus.validation_mask.sum() == 6
    assert [note.split(":")[0] for note in corpus.notes] == [
        "config.data.source",
        "config.data.validation",
    ]
    assert "dropped 1 records whose prompts leave no room" in corpus.notes[1]
    with pytest.raises(TrainingError, match=r"leaves no training document.*dropped 1 records"):
        with_records(tmp_path, rows[2:], held_out, {"shape": "padded"})


def test_the_validation_set_counts_the_answers_tokens(tmp_path):
    for shape in ("packed", "padded"):
        _, corpus = with_records(tmp_path, data={"shape": shape}, sequence_length=32)
        (batch,) = validation_batches(corpus, len(corpus.validation_tokens))
        assert batch.mask.sum() == sum(len(row["completion"]) + 1 for row in HELD_OUT)
        assert batch.targets.min() >= 0
        ngrams = corpus_ngrams(corpus, BYTES.vocab_size)
        assert 1 < ngrams.bigram < 30


@pytest.mark.parametrize("shape", ["packed", "padded"])
def test_runs_resume_with_the_same_batches_whoever_reads(tmp_path, shape):
    run, corpus = with_records(tmp_path, data={"shape": shape}, sequence_length=16)
    iterator = train_iterator(run, corpus)
    take(iterator, 7)
    position = iterator.position()
    expected = take(iterator, 5)
    fresh = train_iterator(run, load_corpus(run, BYTES))
    fresh.seek(position)
    assert_equal_batches(expected, take(fresh, 5))
    half = train_iterator(run, corpus, range(2, 4))
    half.seek(position)
    some = [{name: value[2:] for name, value in batch.items()} for batch in expected]
    assert_equal_batches(some, take(half, 5))


def test_shards_hold_the_marks(tmp_path):
    run, corpus = with_records(tmp_path)
    out = str(tmp_path / "out")
    manifest = prepare(run.data, BYTES, out)
    assert manifest["request"]["format"] == "prompt_answer"
    shards = config(out, data={"format": "prompt_answer"})
    stored = load_corpus(shards, BYTES)
    assert_equal_batches(
        take(train_iterator(run, corpus), 20), take(train_iterator(shards, stored), 20)
    )
    np.testing.assert_array_equal(stored.validation_mask, corpus.validation_mask)
    with pytest.raises(TrainingError, match="holds records of format 'prompt_answer'"):
        load_corpus(config(out), BYTES)
    changed = DataConfig(**{**vars(run.data), "separator": " "})
    with pytest.raises(TrainingError, match="separator: '' there, ' ' now"):
        prepare(changed, BYTES, out)


def test_datasets_of_records_are_read_by_index_or_in_order(tmp_path):
    folder = str(tmp_path / "tfds")
    prepare_tfds(folder, {"train": ["abc"] * 8, "validation": ["abc"]})
    # One feature for both: prompt and answer are the same text.
    fields = {"data_dir": folder, "format": "prompt_answer", "prompt_field": "text"}
    fields |= {"answer_field": "text", "separator": "="}
    for shape in ("packed", "padded"):
        run = config("tfds:sample/en", data=fields | {"shape": shape}, batch_size=2)
        batches = take(train_iterator(run, load_corpus(run, BYTES)), 4)
        assert "".join("".join(scored_texts(batch)) for batch in batches)[:4] == "abc|"
    out = str(tmp_path / "out")
    prepare(run.data, BYTES, out)
    stored = load_corpus(config(out, data={"format": "prompt_answer"}), BYTES)
    assert stored.train[0].documents[0].tolist()[4:] == [100, 101, 102, 1]
    with pytest.raises(TrainingError, match=r"has no field 'q' .config.data.prompt_field."):
        load_corpus(config("tfds:sample/en", data=fields | {"prompt_field": "q"}), BYTES)


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"text": "a"}, "'prompt' (config.data.prompt_field)"),
        ({"prompt": "a"}, "'completion' (config.data.answer_field)"),
        ({"prompt": "a", "completion": ["b"]}, "'completion' (config.data.answer_field)"),
        (["a", "b"], "'prompt' (config.data.prompt_field)"),
    ],
)
def test_a_record_without_a_field_is_named_with_its_line(tmp_path, row, field):
    with pytest.raises(TrainingError) as error:
        with_records(tmp_path, [*ROWS[:2], row])
    assert f"train.jsonl, line 3: not a JSON object with a text in the field {field}" in str(
        error.value
    )
    assert "\n" not in str(error.value)


def test_texts_are_no_records(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    data = {"format": "prompt_answer"}
    for source, message in (
        (str(tmp_path / "a.txt"), "plain text; expected JSON lines or Parquet, with prompt and"),
        ("embedded", r'holds texts; expected config.data.format = "text"'),
    ):
        with pytest.raises(TrainingError, match=message):
            load_corpus(config(source, data=data), BYTES)
    (tmp_path / "t.jinja").write_text("x")
    chat = {"format": "chat", "chat_template": str(tmp_path / "t.jinja")}
    with pytest.raises(TrainingError, match=r"reads .jsonl and .parquet files"):
        load_corpus(config("tfds:sample/en", data=chat), BYTES)


def test_tables_give_the_records_of_json_lines(tmp_path):
    table = pyarrow.Table.from_pylist([*ROWS[:3], {"prompt": None, "completion": "a"}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    options = {"records": PromptAnswer("prompt", "completion")}
    texts, bad = read_content(tmp_path, "b.parquet", content, skip=True, **options)
    expected = [PromptAnswer("prompt", "completion").document(row) for row in ROWS[:3]]
    assert texts == expected
    assert [text.spans for text in texts] == [text.spans for text in expected]
    assert bad == ["no text in the column 'prompt'"]
    with pytest.raises(TrainingError, match=r"no column 'answer' .config.data.answer_field."):
        read_content(tmp_path, "b.parquet", content, records=PromptAnswer("prompt", "answer"))


def test_tables_of_chats(tmp_path):
    chats = [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo", "name": "x"}],
        None,
        [{"role": "assistant", "content": None}],
    ]
    rows = [{"messages": chat, "other": 1} for chat in chats]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "t.jinja").write_text(CHATML)
    data = DataConfig(format="chat", tokenizer="bytes", chat_template=str(tmp_path / "t.jinja"))
    content = (tmp_path / "a.parquet").read_bytes()
    records = records_of(data)
    texts, bad = read_content(tmp_path, "b.parquet", content, skip=True, records=records)
    assert texts == ["[user]Hi</s>[assistant]Yo</s>"]
    ids = encode_document(texts[0], BYTES)
    assert BYTES.decode(ids[is_counted(ids)]) == "Yo"
    assert ids[-1] == BYTES.eos_id, "scored, as the end of the turn"
    assert ids[8] == ~BYTES.eos_id
    assert bad == [
        "no list of messages in the column 'messages'",
        "message 1 in the field 'messages' has no text as its 'content'",
    ]
    other = records_of(DataConfig(**{**vars(data), "messages_field": "other"}))
    with pytest.raises(TrainingError, match=r"'other' .config.data.messages_field. holds int64"):
        read_content(tmp_path, "b.parquet", content, records=other)
