"""Fine-tuning of a Hugging Face LLaMA, or of a run, on text of your own.

    python train.py --config=configs/finetune_llama.py --config.init_from=DIR \
        --config.data.source="notes/*.txt"

Settings, after a colon: "loro" (the default) and "adamw" train adapters beside the fixed network,
"full" all of its weights. For prompts with answers and for chats see ``--config.data.format``.
"""

from loro_jax.text.config import DataConfig
from loro_jax.training.config import AdapterConfig, Config
from models.llama import LlamaConfig


def get_config(settings: str = "loro") -> Config:
    """Returns the config of a fine-tuning run; the architecture is that of ``init_from``."""
    config = Config(
        steps=200,
        batch_size=8,
        sequence_length=256,
        warmup_steps=20,
        final_lr_ratio=0.0,
        restart_warmup_steps=0,
        clip_norm=1.0,
        log_every=10,
        eval_every=100,
        checkpoint_every=100,
        model=LlamaConfig(num_layers=0),  # those of init_from, as all of the architecture
        data=DataConfig(tokenizer="init_from"),
    )
    if settings == "full":
        # The best of two in the study (loro_jax/study/README.md); twice as much was not tried.
        config.method, config.learning_rate = "full", 5e-5
        return config
    config.adapter = AdapterConfig(kind="lora", rank=16, alpha=16.0)
    if settings == "adamw":
        config.method, config.learning_rate = "lowrank", 1e-3
    elif settings == "loro":
        # The best of the study; the factors' rate is not scaled by their rank.
        config.method, config.learning_rate, config.lr_scale = "loro", 1e-3, 1.0
        config.exact_every = 25
        # Exact steps need factors that are not zero; what they add at first is subtracted from W.
        config.adapter.initialiser = "xavier"
    else:
        raise ValueError(
            f'there are no settings {settings!r}; expected "loro", "adamw" or "full" after the '
            "config file's colon."
        )
    return config
