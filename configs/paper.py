"""Settings shared by the paper's pretraining runs, which are in llama_60m.py to llama_1b.py.

C4 in English, one document per sequence (truncated or padded to 256 tokens), T5's tokenizer, 131k
tokens per step, bfloat16, Adam without weight decay or clipping, evaluation on about ten million
tokens. Sources: the paper's Section 5 and the launch scripts in the authors' repository
(mzf666/LORO-main). The authors store parameters in bfloat16; these configs store them in float32
and compute in bfloat16, because rounding to bfloat16 after a retraction unbalances the factors. For
the authors' precision use --config.model.param_dtype=bfloat16.

For settings that are better than the paper's on small models (loro_jax/study/README.md), append
their name to the path: --config=configs/llama_60m.py:recommended.
"""

from loro_jax.text.config import DataConfig
from loro_jax.training.config import Config
from loro_jax.training.settings import with_settings
from models.llama import preset


def paper_config(
    model: str,
    settings: str,
    steps: int,
    warmup_steps: int,
    micro_batches: int,
    learning_rate: float = 0.01,
    exact_every: int = 500,
) -> Config:
    """Returns the config of one of the paper's runs.

    Args:
        model: a preset of ``models.llama``.
        settings: "paper", or another name in :mod:`loro_jax.training.settings`.
        steps: length of the run.
        warmup_steps: length of its warm-up.
        micro_batches: micro-batches per step, for one GPU with 80 GB; use fewer on several GPUs.
        learning_rate: peak learning rate.
        exact_every: K.

    Returns:
        The config.
    """
    config = Config(
        steps=steps,
        batch_size=512,
        sequence_length=256,
        gradient_accumulation=micro_batches,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        exact_every=exact_every,
        log_every=10,
        eval_every=1_000,
        checkpoint_every=1_000,
        model=preset(model, dtype="bfloat16", remat="dots"),
        data=DataConfig(source="tfds:c4/en", shape="padded", tokenizer="t5/spiece.model"),
    )
    return with_settings(config, settings)
