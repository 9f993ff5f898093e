"""The config file that both commands' tests train: twelve steps of the smallest preset."""

import pytest

from tests.training import runs

CONFIG = """
from loro_jax.text.config import DataConfig
from loro_jax.training.config import Config
from models import preset


def get_config():
    return Config(
        steps=12, batch_size=4, sequence_length=32, warmup_steps=2, exact_every=5, log_every=2,
        eval_every=6, checkpoint_every=12, tensorboard=False, exact_method="svd",
        model=preset("tiny", vocab_size=0),  # the tokenizer's, as in configs/default.py
        data=DataConfig(source={source!r}, tokenizer="bytes", max_eval_sequences=4),
    )
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    path = folder / "tiny.py"
    path.write_text(CONFIG.format(source=str(runs.corpus(folder))))
    return str(path)
