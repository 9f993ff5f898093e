"""Every task reads the same from GLUE's own files, JSON lines, Parquet and tfds."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from loro_jax.errors import TrainingError
from loro_jax.glue import TASKS, read_rows
from tests.glue.samples import (
    prepare_tfds,
    records,
    sentences,
    tsv,
    write_jsonl,
    write_parquet,
    write_tsv,
)

WRITERS = {"tsv": write_tsv, "jsonl": write_jsonl, "parquet": write_parquet}


def assert_rows(task, found, split):
    texts, labels = sentences(task, split)
    assert found.texts == texts
    np.testing.assert_array_equal(found.labels, labels)
    assert found.labels.dtype == (np.float32 if task.regression else np.int32)
    assert found.notes == ()


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("name", TASKS)
def test_every_split_of_every_task(name, form, tmp_path):
    task = TASKS[name]
    WRITERS[form](tmp_path / task.title, task)
    for split in ("train", *task.validation):
        for source in (tmp_path, tmp_path / task.title):  # GLUE's folder, or the task's
            assert_rows(task, read_rows(task, str(source), split), split)


@pytest.mark.parametrize("name", ["stsb", "mnli"])
def test_tfds(name, tmp_path):
    task = TASKS[name]
    prepare_tfds(tmp_path, task, 48)
    for split in ("train", *task.validation):
        for source in ("tfds:mini", f"tfds:mini/{name}"):
            # Shuffled when it was prepared.
            found = read_rows(task, source, split, str(tmp_path))
            texts, labels = sentences(task, split)
            pairs = zip(found.texts, found.labels.tolist(), strict=True)
            assert sorted(pairs) == sorted(zip(texts, labels, strict=True))
    with pytest.raises(
        TrainingError, match=r"config\.data\.source = 'tfds:mini/rte' can't be opened"
    ):
        read_rows(TASKS["rte"], "tfds:mini", "train", str(tmp_path))


def test_quotes_and_odd_line_breaks_are_text(tmp_path):
    task = TASKS["cola"]
    odd = 'He said "no\u2028 and left.'
    (tmp_path / "train.tsv").write_text(f"a\t1\t\t{odd}\r\nb\t0\t*\t\u00a0x\r\n", newline="")
    assert read_rows(task, str(tmp_path), "train").texts == [(odd,), ("\u00a0x",)]
    # With a header, as some copies have it.
    (tmp_path / "train.tsv").write_text("sentence\tlabel\nOne.\t1\n")
    assert read_rows(task, str(tmp_path), "train").texts == [("One.",)]


def test_labels_by_name_or_number(tmp_path):
    task = TASKS["rte"]
    rows = [{"sentence1": "a", "sentence2": "b", "label": x} for x in (1, "entailment", "1", 0.0)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_rows(task, str(tmp_path), "train").labels.tolist() == [1, 0, 1, 0]


def test_mrpc_as_microsoft_distributes_it(tmp_path):
    task = TASKS["mrpc"]
    text = tsv(task, "train", 10)
    (tmp_path / "msr_paraphrase_train.txt").write_text(text, encoding="utf-8")
    (tmp_path / "dev_ids.tsv").write_text("2\t20\n5\t50\n")
    whole, _ = sentences(task, "train", 10)
    assert read_rows(task, str(tmp_path), "validation").texts == [whole[2], whole[5]]
    rest = [row for i, row in enumerate(whole) if i not in (2, 5)]
    assert read_rows(task, str(tmp_path), "train").texts == rest
    (tmp_path / "dev_ids.tsv").unlink()
    with pytest.raises(TrainingError, match=r"needs GLUE's dev_ids\.tsv beside it"):
        read_rows(task, str(tmp_path), "train")


def test_a_few_rows_with_too_few_columns_are_left_out_and_counted(tmp_path):
    task = TASKS["qqp"]
    lines = tsv(task, "train", 200).split("\n")
    lines[50] = "17\tbroken"
    (tmp_path / "train.tsv").write_text("\n".join(lines))
    found = read_rows(task, str(tmp_path), "train")
    assert len(found.texts) == len(found.labels) == 199
    assert len(found.notes) == 1
    assert (
        "1 of 200 rows have too few columns and are left out (the first in line 51)"
        in (found.notes[0])
    )
    (tmp_path / "train.tsv").write_text("\n".join(lines[:52]))
    with pytest.raises(TrainingError, match="line 51 has 2 columns; expected 6, tab-separated"):
        read_rows(task, str(tmp_path), "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("index\tsentence1\tsentence2\n1\ta\tb\n", "has no column 'label' (the label of RTE)"),
        ("index\tone\tsentence2\tlabel\n1\ta\tb\t0\n", "has no column 'sentence1' (a text of RTE)"),
        ("sentence1\tsentence2\tlabel\na\tb\tmaybe\n", "line 2: label = 'maybe'; expected one of"),
        ("sentence1\tsentence2\tlabel\na\tb\t-1\n", "whose labels GLUE keeps hidden?"),
        ("sentence1\tsentence2\tlabel\n", "holds no rows"),
        ("", "holds no rows"),
    ],
)
def test_wrong_columns_and_labels_are_errors_of_one_line(content, message, tmp_path):
    (tmp_path / "train.tsv").write_text(content)
    with pytest.raises(TrainingError) as raised:
        read_rows(TASKS["rte"], str(tmp_path), "train")
    assert message in str(raised.value)
    assert str(tmp_path / "train.tsv") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_wrong_values_of_other_formats(tmp_path):
    task, path = TASKS["stsb"], tmp_path / "train.jsonl"

    def fails(message, **changes):
        row = records(task, "train", 1)[0] | changes
        path.write_text(json.dumps(row))
        with pytest.raises(TrainingError, match=message):
            read_rows(task, str(tmp_path), "train")

    fails("label = 6; expected a number from 0 to 5", label=6)
    fails("label = None; expected a number", label=None)
    fails("label = True; expected a number", label=True)
    fails("sentence2 = 3; expected text", sentence2=3)
    path.write_text('{"sentence1": "a"')
    with pytest.raises(TrainingError, match="line 1 is no JSON"):
        read_rows(task, str(tmp_path), "train")
    path.write_text("[1]")
    with pytest.raises(TrainingError, match="line 1 holds no JSON object"):
        read_rows(task, str(tmp_path), "train")
    path.unlink()
    (tmp_path / "train.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(TrainingError, match=r"train\.parquet can't be read"):
        read_rows(task, str(tmp_path), "train")


def test_missing_and_doubled_files(tmp_path):
    task = TASKS["mnli"]
    with pytest.raises(TrainingError, match="is not a directory; expected that of MNLI or of GLUE"):
        read_rows(task, str(tmp_path / "none"), "train")
    with pytest.raises(TrainingError, match=r"expected dev_matched\.tsv or validation_matched"):
        read_rows(task, str(tmp_path), "validation_matched")
    write_tsv(tmp_path, task)
    table = pyarrow.Table.from_pylist(records(task, "train"))
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(TrainingError, match=r"holds train\.parquet and train\.tsv for the split"):
        read_rows(task, str(tmp_path), "train")
