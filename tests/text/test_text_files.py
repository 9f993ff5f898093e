"""Plain text and JSON lines: ends of lines, byte order marks, encodings, what a file holds."""

import json

import pytest

from loro_jax.errors import TrainingError
from tests.text.samples import BYTES, config, load_corpus, read_content, read_file

MARK = b"\xef\xbb\xbf"
TEXT = "one\n\ntwo\nlines \n\n\n \t\n\nthree\n"
DOCUMENTS = ["one", "two\nlines ", "three"]
LINES = b'{"text": "first"}\n{"text": "second"}\n'
CHUNK = 1 << 20  # bytes that are read at a time


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\r\r\n"])
def test_paragraphs_are_those_of_line_feeds_whatever_ends_the_lines(tmp_path, end):
    content = TEXT.replace("\n", end).encode()
    assert read_content(tmp_path, "a.txt", content) == (DOCUMENTS, [])
    assert read_content(tmp_path, "a.txt", content, whole_files=True) == ([TEXT], [])


@pytest.mark.parametrize("end", ["\r\n", "\r", " \n", "\n \t\n"])
@pytest.mark.parametrize("before", range(4))
def test_ends_of_lines_where_a_chunk_ends(tmp_path, end, before):
    first = "x" * (CHUNK - before)
    content = f"{first}\n{end}z\n".replace("\n" + end, end * 2 if end[0] == "\r" else "\n" + end)
    assert read_content(tmp_path, "a.txt", content.encode()) == ([first, "z"], [])


BLANK = [" ", "\t", "\f", "\v", "\u00a0", "\u3000", "\u2028", "\u0085", "\x1c", " \u2003\t"]


@pytest.mark.parametrize("blank", BLANK)
def test_lines_of_any_white_space_separate_and_other_places_do_not(tmp_path, blank):
    content = f"one\n{blank}\ntwo{blank}{blank}too".encode()
    assert read_content(tmp_path, "a.txt", content) == (["one", f"two{blank}{blank}too"], [])


@pytest.mark.parametrize("end", [b"\r\n\x1a", b"\r\n\r\n\x1a\x1a\x1a", b"\x1a"])
def test_the_sign_that_ends_files_of_dos_is_no_text(tmp_path, end):
    assert read_content(tmp_path, "a.txt", b"one\r\n\r\ntwo" + end) == (["one", "two"], [])


def test_ends_of_files_do_not_hide_held_out_texts(tmp_path):
    """What stands last in a file is the same document as elsewhere."""
    (tmp_path / "a.txt").write_bytes(b"kept\r\n\r\nheld out\r\n")
    (tmp_path / "v.txt").write_bytes(b"held out\n\nother\n")
    corpus = load_corpus(
        config(str(tmp_path / "a.txt"), data={"validation": str(tmp_path / "v.txt")}), BYTES
    )
    documents = corpus.train[0].documents
    assert [BYTES.decode(documents[i]) for i in range(len(documents))] == ["kept"]


@pytest.mark.parametrize("name", ["a.txt", "a"])
def test_byte_order_marks_leave_no_trace_in_text(tmp_path, name):
    content = MARK + b"one\n\n" + MARK + b"two\n" + MARK + b"more\n" + MARK * 2 + b"\n" + MARK
    assert read_content(tmp_path, name, content) == (["one", "two\nmore"], [])
    content = MARK + b"one\n\n" + MARK + b"two"
    assert read_content(tmp_path, name, content, whole_files=True) == (["one\n\ntwo"], [])


def test_byte_order_marks_leave_no_trace_in_json_lines(tmp_path):
    content = MARK + MARK + LINES + MARK + LINES + MARK + b"\n"
    assert read_content(tmp_path, "a.jsonl", content) == (["first", "second"] * 2, [])
    for mark in ("\ufeff", "\\ufeff"):  # of the file that the text came from
        row = f'{{"text": "{mark}first"}}\n'.encode()
        assert read_content(tmp_path, "a.jsonl", row) == (["first"], [])
    kept = '{"text": "a\ufeffb"}\n'.encode()  # a character of the text
    assert read_content(tmp_path, "a.jsonl", kept) == (["a\ufeffb"], [])


OTHERS = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]


@pytest.mark.parametrize("encoding", OTHERS)
@pytest.mark.parametrize(
    "text",
    ["first text\n\nsecond", "привет мир\r\n\r\nещё раз", "слово", "日本語\n\n文章", "مرحبا"],
)
def test_other_encodings_are_refused(tmp_path, encoding, text):
    """Many of these bytes are valid UTF-8."""
    texts, reasons = read_content(tmp_path, "a.txt", text.encode(encoding), skip=True)
    assert texts == []
    assert "UTF-8" in reasons[0]
    line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
    assert read_content(tmp_path, "a.jsonl", line.encode(encoding), skip=True)[0] == []
    with pytest.raises(TrainingError, match=r"a\.jsonl.* expected UTF-8"):
        read_file(tmp_path / "a.jsonl")


def test_utf_16_appended_to_utf_8_is_one_bad_document(tmp_path):
    content = b"good text\n\n" * 20 + "appended by\n\nanother".encode("utf-16-le")
    texts, reasons = read_content(tmp_path, "a.txt", content, skip=True)
    assert texts == ["good text"] * 20
    assert reasons == ["not UTF-8 (holds NUL bytes, as UTF-16 and UTF-32 do)"]


@pytest.mark.parametrize(
    "name", ["a.ndjson", "a.jsonlines", "a.JSONL", "a.Json", "a.ldjson", "a.txt", "a", "a.jsonl.1"]
)
def test_json_lines_are_known_by_name_and_by_content(tmp_path, name):
    assert read_content(tmp_path, name, LINES) == (["first", "second"], [])
    assert read_content(tmp_path, name, MARK + b"\n" + LINES.replace(b"\n", b"\r\n"))[0] == [
        "first",
        "second",
    ]
    assert read_content(tmp_path, name, LINES.replace(b"\n", b"\r"))[0] == ["first", "second"]


def test_json_lines_in_a_text_file_are_read_whatever_is_wrong_in_them(tmp_path):
    content = b'{"text": "first"}\noops\n{"text": "second"}\n'
    texts, reasons = read_content(tmp_path, "a.txt", content, skip=True)
    assert (texts, len(reasons)) == (["first", "second"], 1)
    texts, reasons = read_content(tmp_path, "a.txt", b'{"content": "x"}\n' * 3, skip=True)
    assert texts == []
    assert "config.data.text_field" in reasons[0]


@pytest.mark.parametrize(
    "text",
    ['{"a": 1} is one.\nThis is prose.\nAnd more.', "{\\bf bold} and", "[Illustration]\n{b}"],
)
def test_prose_is_no_json(tmp_path, text):
    assert read_content(tmp_path, "a.txt", text.encode()) == ([text], [])


def test_a_whole_file_is_a_document_even_if_it_holds_json(tmp_path):
    assert read_content(tmp_path, "a.txt", LINES, whole_files=True) == ([LINES.decode()], [])


@pytest.mark.parametrize("name", ["a.json", "a.txt"])
@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ('[{"text": "first"}, {"text": "second"}]', "a JSON array"),
        ('[\n{"text": "first"},\n{"text": "second"}\n]', "a JSON array"),
        ('[\n  {\n    "text": "first"\n  }\n]\n', "a JSON array"),
        ('{\n  "text": "first"\n}\n', "objects over several lines"),
    ],
)
def test_other_layouts_of_json_are_refused(tmp_path, name, content, kind):
    (tmp_path / name).write_text(content)
    with pytest.raises(TrainingError, match=rf"line 1: {kind}|line 1: JSON {kind}"):
        read_file(tmp_path / name)
    texts, tally = read_file(tmp_path / name, skip=True)
    assert (texts, tally.bad.total()) == ([], 1)


AWKWARD = {
    "a number of 5,000 digits": b'{"text": "x", "id": ' + b"1" * 5000 + b"}",
    "brackets 100,000 deep": b'{"text": "x", "meta": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "objects 100,000 deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "only brackets": b"[" * 100_000,
    "a trailing comma": b'{"text": "x"},',
    "half a surrogate pair": b'{"text": "\\ud800"}',
}


@pytest.mark.parametrize("kind", AWKWARD)
@pytest.mark.parametrize("first", [False, True])
def test_json_of_every_kind_that_raises_is_a_bad_document(tmp_path, kind, first):
    lines = [AWKWARD[kind], b'{"text": "good"}'] if first else [LINES.strip(), AWKWARD[kind]]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*lines, b'{"text": "last"}']))
    texts, tally = read_file(tmp_path / "a.jsonl", skip=True)
    assert texts == (["good", "last"] if first else ["first", "second", "last"])
    assert tally.bad.total() == 1
    assert f"a.jsonl, line {1 if first else 3}: not" in tally.first


def test_json_that_only_looks_awkward_is_read(tmp_path):
    lines = [
        '{"text": "a", "x": NaN, "y": -Infinity, "z": 1e99999}',
        '{"text": "b", "x": ' + "1" * 5000 + ".5}",
        '{"text": "first of two", "text": "c"}',
        '{"text": "d \u2028 \u0085 \\f e"}',
    ]
    content = "\n \n".join(lines).encode()
    assert read_content(tmp_path, "a.jsonl", content)[0] == ["a", "b", "c", "d \u2028 \u0085 \f e"]
