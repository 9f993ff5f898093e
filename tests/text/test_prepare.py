"""Shards on disk: the documents of the source, whatever happened while they were written."""

import bz2
import gzip
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from loro_jax.errors import TrainingError
from loro_jax.text.config import DataConfig
from loro_jax.text.prepare import prepare
from loro_jax.text.prepared import open_prepared, verify
from loro_jax.text.tokenizers.tokenizer import load_tokenizer
from tests.helpers import command
from tests.text.samples import (
    BYTES,
    assert_equal_batches,
    config,
    load_corpus,
    take,
    texts_of,
    train_iterator,
    write_lines,
)

ROOT = pathlib.Path(__file__).parents[2]


def write_source(folder, files=3, documents=800):
    folder.mkdir(exist_ok=True)
    for number in range(files):
        texts = [f"file {number}, document {i}: " + "word " * (i % 50) for i in range(documents)]
        write_lines(folder / f"{number}.jsonl", texts)
    return str(folder / "*.jsonl")


def data(source, **changes):
    return DataConfig(source=source, tokenizer="bytes", **changes)


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "texts")


def content(directory):
    """All that a reader may look at, byte for byte."""
    return {path.name: path.read_bytes() for path in sorted(pathlib.Path(directory).iterdir())}


def test_shards_hold_what_the_source_holds(tmp_path, source):
    out = str(tmp_path / "out")
    manifest = prepare(data(source), BYTES, out, shard_tokens=50_000)
    assert len(manifest["shards"]) >= 10
    prepared = open_prepared(out, BYTES, skip=False)
    direct = load_corpus(config(source), BYTES)
    assert texts_of(prepared.train) == texts_of(direct.train[0].documents)
    assert manifest["splits"]["train"] == {
        "documents": len(prepared.train),
        "tokens": prepared.train.tokens,
    }
    assert len(prepared.train) + len(prepared.validation) == 2400
    assert verify(pathlib.Path(out)) == []
    assert not list(pathlib.Path(out).glob("*.tmp"))


@pytest.mark.parametrize("shape", ["packed", "padded"])
def test_training_from_shards_is_training_from_the_source(tmp_path, source, shape):
    out = str(tmp_path / "out")
    prepare(data(source), BYTES, out, shard_tokens=30_000)
    runs = [config(name, data={"shape": shape}) for name in (source, out)]
    corpora = [load_corpus(run, BYTES) for run in runs]
    np.testing.assert_array_equal(corpora[0].validation_tokens, corpora[1].validation_tokens)
    batches = [take(train_iterator(*pair), 50) for pair in zip(runs, corpora, strict=True)]
    assert_equal_batches(*batches)


class InterruptionError(Exception):
    pass


def prepare_with_interruptions(config, out, shard_tokens):
    """Stops after every few chunks, and starts again from what is on disk; how often it stopped."""
    for interruptions in range(50):
        count = interruptions % 5 + 1

        def report(progress):
            nonlocal count
            count -= 1
            if count == 0:
                raise InterruptionError

        try:
            prepare(config, BYTES, str(out), shard_tokens=shard_tokens, report=report)
        except InterruptionError:
            with pytest.raises(TrainingError, match=r"unfinished|without manifest"):
                open_prepared(str(out), BYTES, skip=False)
        else:
            return interruptions
    raise AssertionError("it does not end")


def test_interrupted_anywhere_it_goes_on_without_loss_or_duplicates(tmp_path, source):
    reference, out = tmp_path / "reference", tmp_path / "out"
    prepare(data(source), BYTES, str(reference), shard_tokens=40_000)
    assert prepare_with_interruptions(data(source), out, shard_tokens=40_000) >= 3
    assert content(out) == content(reference)


def test_interrupted_in_files_of_every_kind_also_damaged_ones(tmp_path):
    texts = [f"document {i}: " + "word " * (i % 50) for i in range(1200)]
    lines = ["".join(json.dumps({"text": t}) + "\n" for t in texts[i::2]) for i in range(2)]
    members = [b"\xef\xbb\xbf" + "".join(lines[0]).encode(), b"oops\n" + lines[1].encode()]
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_bytes("\r\n \r\n".join(texts).encode())
    (folder / "b.jsonl.gz").write_bytes(b"\0\0".join(map(gzip.compress, members)) + b"garbage")
    (folder / "c.txt.bz2").write_bytes(bz2.compress("\r\r".join(texts).encode()))
    table = pyarrow.table({"text": [text.encode() for text in texts] + [b"\xff", None]})
    pyarrow.parquet.write_table(table, folder / "d.parquet", row_group_size=500)
    every = data(f"{folder}/*", bad_documents="skip")
    reference, out = tmp_path / "reference", tmp_path / "out"
    manifest = prepare(every, BYTES, str(reference), shard_tokens=60_000)
    assert sum(split["documents"] for split in manifest["splits"].values()) == 4 * 1200
    assert sum(manifest["bad_documents"].values()) == 4
    assert prepare_with_interruptions(every, out, shard_tokens=60_000) >= 3
    assert content(out) == content(reference)


def test_what_an_earlier_version_began_is_not_mixed_with_what_this_one_reads(tmp_path, source):
    out = tmp_path / "out"
    with pytest.raises(InterruptionError):
        prepare(data(source), BYTES, str(out), shard_tokens=9000, report=interrupt)
    progress = json.loads((out / "progress.json").read_text())
    del progress["request"]["reader"]
    (out / "progress.json").write_text(json.dumps(progress))
    with pytest.raises(TrainingError, match=r"reader: None there, 2 now"):
        prepare(data(source), BYTES, str(out), shard_tokens=9000)
    # What it has finished is left as it is.
    prepare(data(source), BYTES, str(tmp_path / "done"))
    manifest = json.loads((tmp_path / "done" / "manifest.json").read_text())
    del manifest["request"]["reader"]
    (tmp_path / "done" / "manifest.json").write_text(json.dumps(manifest))
    assert prepare(data(source), BYTES, str(tmp_path / "done"))["complete"]


def interrupt(_):
    raise InterruptionError


def test_threads_change_nothing(tmp_path, source):
    for threads in (1, 3):
        prepare(data(source), BYTES, str(tmp_path / str(threads)), threads=threads)
    assert content(tmp_path / "1") == content(tmp_path / "3")


@pytest.mark.slow
def test_killed_it_goes_on(tmp_path):
    """SIGKILL, at moments nobody chose, of the command itself."""
    source = write_source(tmp_path / "texts", files=6, documents=4000)
    command = [sys.executable, "-m", "loro_jax", "prepare", source]
    command += ["--tokenizer=bytes", "--shard_tokens=200000"]
    reference, out = tmp_path / "reference", tmp_path / "out"
    subprocess.run([*command, f"--out={reference}"], check=True, cwd=ROOT, capture_output=True)
    killed = 0
    for shards in (1, 4, 9):
        process = subprocess.Popen([*command, f"--out={out}"], cwd=ROOT, stdout=subprocess.DEVNULL)
        while process.poll() is None and not (out / f"train-{shards:05d}.ends.npy").exists():
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 2
    done = subprocess.run(
        [*command, f"--out={out}"], check=True, cwd=ROOT, capture_output=True, text=True
    )
    assert "train 23,7" in done.stdout or "train 23,8" in done.stdout
    assert content(out) == content(reference)


def test_a_finished_directory_is_left_alone(tmp_path, source):
    out = tmp_path / "out"
    prepare(data(source), BYTES, str(out))
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    manifest = prepare(data(source), BYTES, str(out))
    assert manifest["splits"]["train"]["documents"] > 2000
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_another_preparation_is_refused_and_nothing_damaged(tmp_path, source):
    out = tmp_path / "out"
    prepare(data(source), BYTES, str(out))
    before = content(out)
    with pytest.raises(TrainingError, match=r"another preparation \(shard_tokens: .* 99 now"):
        prepare(data(source), BYTES, str(out), shard_tokens=99)
    write_source(tmp_path / "texts", documents=801)
    with pytest.raises(TrainingError, match=r"another preparation \(inputs_sha256"):
        prepare(data(source), BYTES, str(out))
    assert content(out) == before
    with pytest.raises(TrainingError, match=r"is not empty and not a prepared directory"):
        prepare(data(source), BYTES, str(tmp_path / "texts"))
    with pytest.raises(TrainingError, match="is a file; expected a directory"):
        prepare(data(source), BYTES, str(tmp_path / "texts" / "0.jsonl"))
    with pytest.raises(TrainingError, match="expected one source of text"):
        prepare(data(str(out)), BYTES, str(tmp_path / "again"))


def test_validation_files_are_kept_out_of_training(tmp_path):
    texts = [f"document {i}" for i in range(300)]
    source = write_lines(tmp_path / "a.jsonl", texts)
    held_out = write_lines(tmp_path / "v.jsonl", texts[50:60])
    out = str(tmp_path / "out")
    prepare(data(source, validation=held_out), BYTES, out, shard_tokens=1000)
    prepared = open_prepared(out, BYTES, skip=False)
    assert texts_of(prepared.validation) == texts[50:60]
    assert texts_of(prepared.train) == texts[:50] + texts[60:]


def test_bad_documents_are_recorded(tmp_path, source):
    with (tmp_path / "texts" / "1.jsonl").open("a") as file:
        file.write("oops\n")
    manifest = prepare(data(source), BYTES, str(tmp_path / "out"))
    assert sum(manifest["bad_documents"].values()) == 1
    assert "skipped 1 of 2401 documents" in manifest["notes"][0]


def test_without_a_validation_document_there_is_no_manifest(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", ["one", "two"])
    with pytest.raises(TrainingError, match=r"no validation document.*config.data.validation"):
        prepare(data(source), BYTES, str(tmp_path / "out"))
    assert not (tmp_path / "out" / "manifest.json").exists()


class TestOpening:
    @pytest.fixture
    def out(self, tmp_path, source):
        prepare(data(source), BYTES, str(tmp_path / "out"), shard_tokens=60_000)
        return tmp_path / "out"

    def load(self, out, **changes):
        return load_corpus(config(str(out), data=changes), BYTES)

    def test_another_tokenizer_is_named(self, out):
        run = config(str(out), data={"tokenizer": "embedded"})
        with pytest.raises(TrainingError, match=r"prepared with the tokenizer 'bytes'"):
            load_corpus(run, load_tokenizer("embedded"))

    @pytest.mark.parametrize("damage", ["gone", "truncated", "shorter", "no array"])
    def test_a_shard_that_is_not_there(self, out, damage):
        path = out / "train-00001.tokens.npy"
        whole = path.read_bytes()
        if damage == "gone":
            path.unlink()
        elif damage == "shorter":
            np.save(path, np.load(path)[:-5])
        else:
            path.write_bytes(whole[:-1000] if damage == "truncated" else b"nothing")
        with pytest.raises(TrainingError, match=r"shard train-00001 can't be used"):
            self.load(out)
        corpus = self.load(out, bad_documents="skip")
        assert "shard train-00001 can't be used" in corpus.notes[0]
        assert "documents are skipped" in corpus.notes[0]
        assert any("train-00001.tokens.npy" in line for line in verify(out))
        path.write_bytes(whole)
        assert corpus.fingerprint != self.load(out).fingerprint

    def test_changed_bytes_are_found_by_verify(self, out):
        tokens = np.load(out / "train-00000.tokens.npy", mmap_mode="r+")
        tokens[7] ^= 1
        tokens.flush()
        (problem,) = verify(out)
        assert problem.endswith(
            "train-00000.tokens.npy: its bytes have changed since it was written"
        )

    def test_ids_outside_the_vocabulary_are_fatal(self, out):
        tokens = np.load(out / "train-00000.tokens.npy", mmap_mode="r+")
        tokens[:] = 60_000
        tokens.flush()
        run = config(str(out), data={"prefetch": 0, "bad_documents": "skip"})
        with pytest.raises(TrainingError, match=r"token id 60000 in .*out.* outside the vocab"):
            take(train_iterator(run, load_corpus(run, BYTES)), 3000)

    @pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": 2}'])
    def test_a_manifest_that_is_none(self, out, text):
        (out / "manifest.json").write_text(text)
        with pytest.raises(TrainingError, match=r"manifest.json (can't be read|has format 2)"):
            self.load(out)

    def test_a_directory_of_something_else(self, out, tmp_path):
        with pytest.raises(TrainingError, match=r"a directory without manifest.json"):
            self.load(tmp_path / "texts")

    def test_many_shards_need_no_higher_limit(self, tmp_path, source):
        """A mapping holds a file open, and 1,024 are what a shell usually allows."""
        import resource

        out = str(tmp_path / "many")
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        prepare(data(source), BYTES, out, shard_tokens=400)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
            corpus = self.load(out)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert len(corpus.train[0].documents) > 2000


def test_the_command_and_its_errors(tmp_path, source):
    out = tmp_path / "out"
    status, output = command("prepare", source, "--tokenizer=bytes", f"--out={out}")
    assert status == 0, output
    assert f"{out}: train 2,3" in output
    status, output = command("verify", out)
    assert (status, output) == (0, f"{out}: all bytes as they were written\n")
    os.truncate(out / "train-00000.ends.npy", 200)
    status, output = command("verify", out)
    assert status == 1
    assert "train-00000.ends.npy" in output
    shutil.rmtree(out)
    for arguments, message in (
        ((tmp_path / "none*", "--tokenizer=bytes", f"--out={out}"), "error: SOURCE = .* no file"),
        ((source, "--tokenizer=none.model", f"--out={out}"), "error: --tokenizer = 'none.model'"),
        ((source, "--tokenizer=bytes", f"--out={out}", "--shard_tokens=0"), "--shard_tokens=0"),
    ):
        status, output = command("prepare", *arguments)
        assert status == 1
        assert "Traceback" not in output
        assert re.search(message, output), output
        assert not out.exists()


def test_json_of_the_manifest_names_no_private_things(tmp_path, source):
    out = tmp_path / "out"
    prepare(data(source), BYTES, str(out))
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["tokenizer"] == {
        "name": "bytes",
        "fingerprint": "bytes",
        "vocab_size": 259,
        "eos_id": 1,
    }
