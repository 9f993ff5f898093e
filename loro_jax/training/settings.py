"""What a run trains with: the settings that the study (loro_jax/study) recommends, or the paper's.

The files of ``configs/`` take their name behind a colon::

    python train.py --config=configs/default.py                # "recommended"
    python train.py --config=configs/default.py:paper          # parity, one flag away
    python train.py --config=configs/llama_60m.py:recommended  # the paper's runs, with ours
"""

from __future__ import annotations

import dataclasses
from typing import Any

from loro_jax.training.config import Config

# Fields of the run and of its model. "mergeable" is "recommended" without the activation between
# factors: its products B A are plain matrices, which exports to other programs need. As such they
# have exact steps, with the paper's K, which leave factors and momentum in their basis.
_EXACT: dict[str, Any] = {"basis": "nearest", "restart_warmup_steps": 0}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "recommended": (
        {"direction": "orthogonal", "exact_every": 0},
        {"initialiser": "auto", "projection": "cola"},
    ),
    "mergeable": (
        {"direction": "orthogonal", **_EXACT},
        {"initialiser": "auto", "projection": "low_rank"},
    ),
    "paper": (
        {"direction": "adam"},
        {"initialiser": "xavier", "projection": "low_rank"},
    ),
}


def with_settings(config: Config, settings: str) -> Config:
    """A run with other settings of optimizer and projections.

    Args:
        config: the run, with the K of the paper.
        settings: a name among :data:`SETTINGS`.

    Returns:
        The run with those settings; its learning rate, its length and its data stay.

    Raises:
        ValueError: if there are no settings of that name.

    Example:
        >>> run = with_settings(Config(), "recommended")
        >>> run.direction, run.exact_every, run.model.projection
        ('orthogonal', 0, 'cola')
    """
    if settings not in SETTINGS:
        raise ValueError(
            f"there are no settings {settings!r}; expected one of {', '.join(SETTINGS)} behind the "
            "config file's colon."
        )
    of_run, of_model = SETTINGS[settings]
    model = dataclasses.replace(config.model, **of_model)
    return dataclasses.replace(config, model=model, **of_run)
