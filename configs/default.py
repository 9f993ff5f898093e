"""A first run: a small low-rank LLaMA on the embedded novels, minutes on two cores."""

from loro_jax.training.config import Config
from loro_jax.training.settings import with_settings
from models.llama import LlamaConfig


def get_config(settings: str = "recommended") -> Config:
    """Returns the default config of ``python train.py``; see :mod:`loro_jax.training.settings`."""
    config = Config(
        steps=1000,
        batch_size=16,
        sequence_length=128,
        learning_rate=0.01,
        warmup_steps=100,
        exact_every=100,
        clip_norm=1.0,
        log_every=10,
        eval_every=100,
        checkpoint_every=100,
        model=LlamaConfig(
            vocab_size=0,  # the tokenizer's
            hidden_size=128,
            intermediate_size=344,
            num_layers=4,
            num_heads=4,
            max_sequence_length=512,
            rank=32,
        ),
    )
    return with_settings(config, settings)
