"""LLaMA-60M with Fira, as in the example of its authors' repository.

Source: the script for 60M in xichen-fy/Fira and the defaults of the program that it runs. It is
GaLore's example with Fira's optimizer: rank 128, a new subspace every 200 steps, alpha 0.25, and
the remainder's norm grows by at most a factor of 1.01 in a step.
"""

import dataclasses

from configs.peers.galore_60m import get_config as galore_config
from loro_jax.training.config import Config
from loro_jax.training.method_options import MethodOptions


def get_config() -> Config:
    """Returns the config of Fira's 60M example."""
    options = MethodOptions(scale=0.25, gamma=1.01)
    return dataclasses.replace(galore_config(), method="fira", method_options=options)
