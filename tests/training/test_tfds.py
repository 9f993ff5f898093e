"""A tensorflow-datasets corpus of C4's format, prepared here, read without TensorFlow."""

import sys
import warnings

import numpy as np
import pytest

from loro_jax.training.config import Config, DataConfig
from loro_jax.training.data import tokenise, train_iterator
from loro_jax.training.documents import load_corpus
from loro_jax.training.errors import TrainingError
from loro_jax.training.tokenizer import load_tokenizer
from models import LlamaConfig

TEXTS = {
    "train": [f"Training document {i}, with an é." for i in range(30)],
    "validation": [f"Held-out document {i}." for i in range(5)],
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow_datasets as tfds

        class TinyC4(tfds.core.GeneratorBasedBuilder):
            """Text, url and timestamp in two splits, as in C4."""

            VERSION = tfds.core.Version("3.1.0")
            BUILDER_CONFIGS = (tfds.core.BuilderConfig(name="en", description="English"),)

            def _info(self):
                return self.dataset_info_from_configs(
                    features=tfds.features.FeaturesDict(
                        {name: tfds.features.Text() for name in ("text", "url", "timestamp")}
                    )
                )

            def _split_generators(self, dl_manager):
                return {name: self._generate_examples(name) for name in TEXTS}

            def _generate_examples(self, split):
                for i, text in enumerate(TEXTS[split]):
                    yield i, {"text": text, "url": f"https://example.org/{i}", "timestamp": "now"}

        folder = tmp_path_factory.mktemp("tfds")
        builder = TinyC4(data_dir=str(folder), config="en", file_format="array_record")
        builder.download_and_prepare()
    return folder


def test_documents_come_by_split_and_field(data_dir):
    corpus = load_corpus(DataConfig(source="tfds:tiny_c4/en", data_dir=str(data_dir)))
    assert sorted(corpus.train[i] for i in range(len(corpus.train))) == sorted(TEXTS["train"])
    assert len(corpus.validation) == 5
    assert "tensorflow" not in sys.modules


def test_batches_of_padded_documents(data_dir):
    config = Config(
        batch_size=6,
        sequence_length=64,
        model=LlamaConfig(vocab_size=300),
        data=DataConfig(
            source="tfds:tiny_c4/en", data_dir=str(data_dir), tokenizer="bytes", shape="padded"
        ),
    )
    tokenizer = load_tokenizer("bytes")
    data = tokenise(config, load_corpus(config.data), tokenizer)
    iterator = train_iterator(config, data)
    texts = [tokenizer.decode(row) for _ in range(5) for row in next(iterator)["tokens"]]
    assert sorted(texts) == sorted(TEXTS["train"]), "one epoch holds each document once"
    assert data.validation_tokens.shape == (5, 65)
    assert np.all(data.validation_mask.sum(axis=1) == len("Held-out document 0."))


def test_a_field_that_is_not_there_is_named(data_dir):
    with pytest.raises(TrainingError, match=r"no field 'body'.*text"):
        load_corpus(DataConfig(source="tfds:tiny_c4/en", data_dir=str(data_dir), text_field="body"))


def test_packed_needs_memory(data_dir):
    config = Config(
        sequence_length=64,
        model=LlamaConfig(vocab_size=300),
        data=DataConfig(source="tfds:tiny_c4/en", data_dir=str(data_dir), tokenizer="bytes"),
    )
    with pytest.raises(TrainingError, match='use "padded"'):
        tokenise(config, load_corpus(config.data), load_tokenizer("bytes"))
