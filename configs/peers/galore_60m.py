"""LLaMA-60M with GaLore, as in the example of its authors' repository.

Source: the script for 60M in jiaweizzhao/GaLore and the defaults of the program that it runs: Adam
in subspaces of rank 128 that are renewed every 200 steps, scale 0.25; 10k steps of 512 sequences of
256 tokens of C4, one document each, T5's tokenizer; learning rate 0.01, a warm-up of 1,000 steps
from zero and a cosine down to a tenth; no weight decay, no clipping. Parameters and products are
bfloat16; the optimizer's state is float32 here, and bfloat16 in their code.
"""

import dataclasses

from configs.paper import paper_config
from loro_jax.training.config import Config
from loro_jax.training.method_options import MethodOptions


def get_config() -> Config:
    """Returns the config of GaLore's 60M example."""
    # Model, data, length, batch, evaluations and Adam's constants are those of the paper's runs.
    run = paper_config(
        "60m", "paper", steps=10_000, warmup_steps=1_000, micro_batches=2, exact_every=200
    )
    return dataclasses.replace(
        run,
        method="galore",
        method_options=MethodOptions(scale=0.25),
        initial_lr_ratio=0.0,
        final_lr_ratio=0.1,
        model=dataclasses.replace(run.model, rank=128, param_dtype="bfloat16"),
    )
