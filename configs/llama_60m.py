"""LLaMA-60M with LORO, as in the paper: rank 128, 10k steps of 131k tokens of C4."""

from configs.paper import paper_config
from loro_jax.training.config import Config


def get_config(settings: str = "paper") -> Config:
    """Returns the config of the paper's 60M run."""
    return paper_config("60m", settings, steps=10_000, warmup_steps=1_000, micro_batches=2)
