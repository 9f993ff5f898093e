"""The smallest run: a LLaMA of 25 thousand parameters on the embedded novels, byte by byte.

It takes less than a minute on two cores; for a model that learns words see default.py.
"""

from loro_jax.text.config import DataConfig
from loro_jax.training.config import Config
from loro_jax.training.settings import with_settings
from models.llama import preset


def get_config(settings: str = "recommended") -> Config:
    """Returns the config of the smallest run; see :mod:`loro_jax.training.settings`."""
    config = Config(
        steps=200,
        batch_size=16,
        sequence_length=64,
        learning_rate=0.01,
        warmup_steps=20,
        exact_every=20,
        clip_norm=1.0,
        log_every=10,
        eval_every=50,
        checkpoint_every=50,
        model=preset("tiny"),
        data=DataConfig(tokenizer="bytes", max_eval_sequences=64),
    )
    return with_settings(config, settings)
