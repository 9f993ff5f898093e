"""Speed of the data pipeline, and the time that training steps wait for it.

The same documents are stored as plain text, JSON lines (compressed or not), a table, a
tensorflow-dataset and prepared shards. First every source is read and encoded once, as by
``prepare`` or at the start of a run; then training batches are drawn; then a model is trained from
prepared shards.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import itertools
import json
import lzma
import pathlib
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import pyarrow
import pyarrow.parquet
from backports import zstd

from loro_jax.bench.options import make_parser, parse_options
from loro_jax.planning.timing import time_in_turns
from loro_jax.tables import report
from loro_jax.text import Corpus, load_corpus, train_iterator
from loro_jax.text.batches import TrainBatches
from loro_jax.text.config import DataConfig
from loro_jax.text.documents import PartReader
from loro_jax.text.encoding import encode_chunks
from loro_jax.text.prepare import prepare
from loro_jax.text.sources import source_parts
from loro_jax.text.tokenizers.tokenizer import Tokenizer, load_tokenizer
from loro_jax.training import mesh as meshes
from loro_jax.training.batch import to_batch
from loro_jax.training.config import Config
from loro_jax.training.step import compile_program, make_program
from models.llama import PRESETS, preset

# Batches per timing.
_BATCHES = 20

# Training steps before timing starts.
_WARM_UP = 2


def prepare_tfds(folder: str, splits: dict[str, list[str]]) -> None:
    """Prepares the dataset ``sample/en``, in C4's format, by tfds as ArrayRecord files.

    Args:
        folder: directory of datasets.
        splits: texts by split.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow_datasets as tfds

        tfds.disable_progress_bar()

        # A registered class could only be defined once per process.
        class Sample(  # type: ignore[call-arg]
            tfds.core.GeneratorBasedBuilder, skip_registration=True
        ):
            """Text, url and timestamp, as in C4."""

            VERSION = tfds.core.Version("3.1.0")
            BUILDER_CONFIGS = (tfds.core.BuilderConfig(name="en", description="English"),)

            def _info(self) -> Any:
                features = {name: tfds.features.Text() for name in ("text", "url", "timestamp")}
                return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager: Any) -> Any:
                return {name: self._generate_examples(name) for name in splits}

            def _generate_examples(self, split: str) -> Any:
                for i, text in enumerate(splits[split]):
                    yield i, {"text": text, "url": f"https://example.org/{i}", "timestamp": "now"}

        builder = Sample(data_dir=folder, config="en", file_format="array_record")
        builder.download_and_prepare()


def write_sources(folder: pathlib.Path, texts: Sequence[str]) -> dict[str, DataConfig]:
    """Writes the texts in every format.

    Args:
        folder: an empty directory.
        texts: documents.

    Returns:
        For each format, the data group of a config that reads it.
    """
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    packed: dict[str, Callable[[bytes], bytes]] = {
        "": bytes,
        ".gz": gzip.compress,
        ".xz": lzma.compress,
        ".zst": zstd.compress,
    }
    names = {".txt": "\n\n".join(texts).encode()} | {
        f".jsonl{suffix}": pack(lines.encode()) for suffix, pack in packed.items()
    }
    for suffix, content in names.items():
        (folder / f"text{suffix}").write_bytes(content)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "text.parquet")
    found = {
        suffix: DataConfig(source=str(folder / f"text{suffix}")) for suffix in [*names, ".parquet"]
    }
    middle = len(texts) // 10
    splits = {"train": list(texts[middle:]), "validation": list(texts[:middle])}
    prepare_tfds(str(folder / "tfds"), splits)
    found["tfds"] = DataConfig(source="tfds:sample/en", data_dir=str(folder / "tfds"))
    return found


def read_all(data: DataConfig, tokenizer: Tokenizer) -> int:
    """Reads and encodes a source once; returns its number of tokens."""
    parts, held_out = source_parts(data.source, data)
    reader = PartReader(parts, data.bad_documents == "skip", held_out)
    encoded = encode_chunks(reader.chunks(), tokenizer)
    return sum(len(document) for _, documents in encoded for document in documents)


def _batches_of(config: Config, corpus: Corpus) -> TrainBatches:
    return train_iterator(
        config.data,
        corpus,
        batch_size=config.batch_size,
        sequence_length=config.sequence_length,
        seed=config.seed,
    )


def waiting_share(config: Config, tokenizer: Tokenizer, steps: int) -> tuple[float, float]:
    """Times training steps.

    Args:
        config: a run's config.
        tokenizer: its tokenizer.
        steps: number of steps to time.

    Returns:
        (share of the time spent waiting for data, seconds per step).
    """
    devices = meshes.make_mesh(config.mesh)
    program, _ = compile_program(make_program(config, devices), devices)
    state = program.init()
    sharding = meshes.batch_sharding(devices)
    iterator = _batches_of(config, load_corpus(config.data, config.sequence_length, tokenizer))
    waited = started = 0.0
    for step in range(_WARM_UP + steps):
        if step == _WARM_UP:
            jax.block_until_ready(state)
            waited, started = 0.0, time.perf_counter()
        # Only the call itself: batches are prefetched while the device computes.
        before = time.perf_counter()
        rows = next(iterator)
        waited += time.perf_counter() - before
        batch = jax.device_put(to_batch(rows["tokens"], rows["mask"]), sharding)
        state, metrics = program.train_step(state, batch)
        jax.block_until_ready(metrics)
    elapsed = time.perf_counter() - started
    return waited / elapsed, elapsed / steps


def main(arguments: Sequence[str]) -> None:
    """Runs the benchmark; see ``--help``."""
    parser = make_parser("data", __doc__, "60m", rounds=3)
    parser.add_argument("--source", default="embedded", help="texts to use: a glob of files")
    parser.add_argument("--tokenizer", default="embedded")
    parser.add_argument("--documents", type=int, default=20_000, help="most documents to use")
    parser.add_argument("--batch_size", type=int, default=512, help="size of the batches drawn")
    parser.add_argument("--sequence_length", type=int, default=256)
    parser.add_argument("--train_batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8, help="training steps")
    options = parse_options(parser, arguments, PRESETS)
    tokenizer = load_tokenizer(options.tokenizer)
    for model in options.models:
        rows = preset(model).vocab_size
        if tokenizer.vocab_size > rows:
            parser.error(
                f"--models: {model} has {rows} ids; expected at least {tokenizer.vocab_size}, "
                f"those of --tokenizer={options.tokenizer}"
            )
    with tempfile.TemporaryDirectory() as folder:
        report(_measure(options, tokenizer, pathlib.Path(folder)), options)


def _measure(options: Any, tokenizer: Tokenizer, folder: pathlib.Path) -> list[dict[str, Any]]:
    sources = write_sources(folder, _texts(options))
    shards = DataConfig(source=str(folder / "shards"))
    prepare(sources[".jsonl"], tokenizer, shards.source)
    return [
        *_reading(sources, tokenizer, options.rounds),
        *_drawing(shards, sources["tfds"], tokenizer, options),
        *(_training(model, shards, tokenizer, options) for model in options.models),
    ]


def _texts(options: Any) -> list[str]:
    """Reads the documents of ``--source``, about as long as those of C4."""
    parts, _ = source_parts(options.source, DataConfig(source=options.source))
    documents = (text for chunk in PartReader(parts, skip=True).chunks() for text in chunk.texts)
    texts = list(itertools.islice(documents, options.documents))
    if options.source == "embedded":
        # Paragraphs of novels are short; ten of them are about as long as a C4 document.
        texts = ["\n".join(texts[i : i + 10]) for i in range(0, len(texts), 10)]
    return texts


def _reading(
    sources: dict[str, DataConfig], tokenizer: Tokenizer, rounds: int
) -> list[dict[str, Any]]:
    """Returns rows for reading and encoding every source once."""
    tokens = {name: read_all(data, tokenizer) for name, data in sources.items()}
    readers: dict[str, Callable[[], Any]] = {
        name: functools.partial(read_all, data, tokenizer) for name, data in sources.items()
    }
    seconds = time_in_turns(readers, rounds)
    return [
        {"source": name, "what": "read and encode", "tokens/s": tokens[name] / seconds[name]}
        for name in sources
    ]


def _drawing(
    shards: DataConfig, tfds: DataConfig, tokenizer: Tokenizer, options: Any
) -> list[dict[str, Any]]:
    """Returns rows for drawing batches, packed and padded."""

    def drawing(data: DataConfig, shape: str) -> Callable[[], float]:
        config = Config(
            batch_size=options.batch_size,
            sequence_length=options.sequence_length,
            data=dataclasses.replace(data, shape=shape),
        )
        corpus = load_corpus(config.data, config.sequence_length, tokenizer)

        def draw() -> float:
            # A new iterator, because an old one has prefetched batches meanwhile.
            iterator = _batches_of(config, corpus)
            drawn = sum(float(next(iterator)["mask"].sum()) for _ in range(_BATCHES))
            iterator.close()
            return drawn

        return draw

    mixed = DataConfig(source=f"{shards.source},3;{shards.source},1")
    rows = []
    # Sources that are encoded on the fly are timed separately, because their threads run on for a
    # moment.
    for group in ({"shards": shards, "mixed shards": mixed}, {"tfds": tfds}):
        cases = {
            f"{name}, {shape} batches": drawing(data, shape)
            for name, data in group.items()
            for shape in ("packed", "padded")
        }
        drawn = {case: draw() for case, draw in cases.items()}
        seconds = time_in_turns(cases, options.rounds)
        for case in cases:
            source, what = case.split(", ")
            rows.append({"source": source, "what": what, "tokens/s": drawn[case] / seconds[case]})
    return rows


def _training(model: str, shards: DataConfig, tokenizer: Tokenizer, options: Any) -> dict[str, Any]:
    """Returns the row for training a model from shards."""
    config = Config(
        batch_size=options.train_batch_size,
        sequence_length=options.sequence_length,
        steps=100,
        warmup_steps=10,
        model=preset(model),
        data=shards,
    )
    share, step = waiting_share(config, tokenizer, options.steps)
    return {
        "source": "shards",
        "what": f"{model}: {step:.2f} s per step, {share:.3%} of it waiting for data",
        "tokens/s": options.train_batch_size * options.sequence_length / step,
    }
