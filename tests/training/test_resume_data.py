"""Runs that read shards or pack on the way, killed within documents, go on at the next token."""

import pathlib
import signal
import time

import pytest

from loro_jax.bench.data import prepare_tfds
from loro_jax.text.config import DataConfig
from loro_jax.text.prepare import prepare
from loro_jax.text.tokenizers.tokenizer import load_tokenizer
from tests.training import runs

# Documents longer than a few sequences: whenever the run is killed, it is within most of them.
TEXTS = [f"Document {i}. " + f"{i * 37 % 101} lazy dogs and {i} foxes. " * 30 for i in range(60)]


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    (folder / "text.txt").write_text("\n\n".join(TEXTS))
    (folder / "held_out.txt").write_text("\n\n".join(TEXTS[:2]))
    data = DataConfig(
        source=str(folder / "text.txt"),
        validation=str(folder / "held_out.txt"),
        tokenizer="bytes",
    )
    prepare(data, load_tokenizer("bytes"), str(folder / "shards"), shard_tokens=20_000)
    splits = {"train": TEXTS[2:], "validation": TEXTS[:2]}
    prepare_tfds(str(folder / "tfds"), splits)
    return {
        "data.source": f"tfds:sample/en,1;{folder / 'shards'},2",
        "data.data_dir": folder / "tfds",
    }


def start(workdir, fields):
    return runs.start(*runs.flags(workdir, fields["data.source"], **fields))


@pytest.mark.slow
def test_killed_and_started_again_it_ends_the_same(fields, tmp_path):
    """Shards and documents that are packed on the way, mixed."""
    fields = {**fields, "steps": 40, "checkpoint_every": 7, "eval_every": 20}
    status, output = runs.finish(start(tmp_path / "reference", fields))
    assert status == 0, output
    workdir = tmp_path / "run"
    for step in (7, 21):
        process = start(workdir, fields)
        checkpoint = workdir / "checkpoints" / str(step)
        deadline = time.monotonic() + 120
        while not checkpoint.is_dir() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        runs.finish(process)
    status, output = runs.finish(start(workdir, fields))
    assert status == 0, output
    assert "continuing" in output
    assert runs.rows(workdir) == runs.rows(tmp_path / "reference")


def test_a_run_does_not_go_on_with_another_text(tmp_path):
    source = runs.corpus(tmp_path)
    arguments = runs.flags(tmp_path / "run", source, steps=10)
    status, output = runs.run(*arguments)
    assert status == 0, output
    pathlib.Path(source).write_text(runs.TEXT.replace("lazy", "busy"))
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    status, output = runs.run(*arguments)
    assert status == 1
    assert "is not the text that the run in" in output
    assert output.count("\n") == 1
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
