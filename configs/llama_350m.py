"""LLaMA-350M with LORO, as in the paper: rank 256, 60k steps of 131k tokens of C4."""

from configs.paper import paper_config
from loro_jax.training.config import Config


def get_config(settings: str = "paper") -> Config:
    """Returns the config of the paper's 350M run."""
    return paper_config("350m", settings, steps=60_000, warmup_steps=6_000, micro_batches=8)
