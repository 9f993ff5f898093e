"""LLaMA-7B with LORO: rank 1024, 150k steps of 131k tokens of C4, as in GaLore's 7B run.

The paper has no run of this size; rank and length are those of GaLore's 7B run (Zhao et al. 2024,
arXiv 2403.03507, Table 3), other settings are those of the paper's 1B run. Intended for eight
devices: --config.mesh.fsdp=8; use fewer micro-batches on more devices.
"""

from configs.paper import paper_config
from loro_jax.training.config import Config


def get_config(settings: str = "paper") -> Config:
    """Returns the config of a 7B run."""
    return paper_config(
        "7b",
        settings,
        steps=150_000,
        warmup_steps=15_000,
        micro_batches=8,
        learning_rate=0.005,
        exact_every=200,
    )
