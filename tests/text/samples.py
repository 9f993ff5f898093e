"""Small corpora for tests of the data pipeline."""

import dataclasses
import json

import chex

from loro_jax import text
from loro_jax.text.config import DataConfig
from loro_jax.text.readers import Tally, read_documents
from loro_jax.text.tokenizers.tokenizer import load_tokenizer
from loro_jax.training.config import Config
from models import LlamaConfig

BYTES = load_tokenizer("bytes")


def write_lines(path, texts):
    """A JSON-lines file of texts."""
    rows = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return str(path)


def read_file(path, skip=False, **options):
    """(texts, tally) of a file."""
    tally = Tally("config.data.source", skip)
    options = {"text_field": "text", "whole_files": False} | options
    texts = list(read_documents(str(path), tally, **options))
    tally.close()
    return texts, tally


def read_content(folder, name, content, skip=False, **options):
    """(texts, reasons of bad documents) of a file of this name and content."""
    (folder / name).write_bytes(content)
    texts, tally = read_file(folder / name, skip, **options)
    return texts, list(tally.bad)


def config(source="embedded", data=None, **changes):
    """A run's config with bytes for tokens, batches of 4 and sequences of 8 unless told."""
    data = {"source": source, "tokenizer": "bytes", **(data or {})}
    base = Config(
        batch_size=4,
        sequence_length=8,
        model=LlamaConfig(vocab_size=300),
        data=DataConfig(**data),
    )
    return dataclasses.replace(base, **changes)


def with_corpus(folder, train, validation=("abc",), data=None, **changes):
    """A config of these texts, and their corpus."""
    files = {
        "source": write_lines(folder / "train.jsonl", train),
        "validation": write_lines(folder / "validation.jsonl", validation),
    }
    run = config(data=files | (data or {}), **changes)
    return run, load_corpus(run, BYTES)


def load_corpus(run, tokenizer):
    """What a run with this config reads."""
    return text.load_corpus(run.data, run.sequence_length, tokenizer)


def train_iterator(run, corpus, rows=None):
    """The batches of a run with this config."""
    return text.train_iterator(
        run.data,
        corpus,
        batch_size=run.batch_size,
        sequence_length=run.sequence_length,
        seed=run.seed,
        rows=rows,
    )


def describe(run, corpus):
    """What a run with this config says of its corpus."""
    return text.describe(run.data, corpus, run.sequence_length)


def random_text(rng, length):
    return bytes(rng.integers(97, 123, size=length).tolist()).decode()


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_equal_batches(some, others):
    chex.assert_trees_all_equal(list(some), list(others), strict=True)


def texts_of(documents):
    """Documents of a training source or of shards as texts."""
    return [BYTES.decode(documents[i]) for i in range(len(documents))]
