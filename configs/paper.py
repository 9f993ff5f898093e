"""What the paper's pretraining runs share. Not a run itself: see llama_60m.py and its kin.

C4 in English, one document per sequence (truncated or padded to 256 tokens), T5's tokenizer, 131k
tokens a step, bfloat16, Adam without weight decay or clipping, evaluation on about ten million
tokens. Sources: the paper's Section 5 and the launch scripts in the authors' repository
(mzf666/LORO-main). Where they store bfloat16 parameters, these configs store float32 ones and
compute in bfloat16: a retraction through bfloat16 costs the factors their balance. For the
authors' own precision: --config.model.param_dtype=bfloat16.

Settings that are better than the paper's on small models (loro_jax/study/README.md) are chosen by a
name after the file's colon, --config=configs/llama_60m.py:recommended.
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
    """One of the paper's runs.

    Args:
        model: a preset of ``models.llama``.
        settings: "paper", or others of :mod:`loro_jax.training.settings`.
        steps: length of the run.
        warmup_steps: length of its warm-up.
        micro_batches: parts of a step, sized for one GPU with 80 GB; fewer on several.
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
