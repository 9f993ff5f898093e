"""LLaMA-130M with LORO, as in the paper: rank 256, 20k steps of 131k tokens of C4."""

from configs.paper import paper_config
from loro_jax.training.config import Config


def get_config(settings: str = "paper") -> Config:
    """Returns the config of the paper's 130M run."""
    return paper_config("130m", settings, steps=20_000, warmup_steps=2_000, micro_batches=4)
