"""LLaMA-1B with LORO, as in the paper: rank 512, 100k steps of 131k tokens of C4."""

from configs.paper import paper_config
from loro_jax.training.config import Config


def get_config(settings: str = "paper") -> Config:
    """Returns the config of the paper's 1B run."""
    return paper_config(
        "1b",
        settings,
        steps=100_000,
        warmup_steps=10_000,
        micro_batches=16,
        learning_rate=0.005,
        exact_every=200,
    )
