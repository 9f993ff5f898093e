"""Settings of a run: those that the study (loro_jax/study) recommends, or the paper's.

Append their name to the path of a file in ``configs/``, after a colon::

    python train.py --config=configs/default.py                # "recommended"
    python train.py --config=configs/default.py:paper          # parity with the paper
    python train.py --config=configs/llama_60m.py:recommended  # the paper's run, our settings
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from loro_jax.training.config import Config

# Fields of the run and of its model. "mergeable" is "recommended" without the activation between
# factors: its products B A are plain matrices, as required for export to other programs. This also
# allows exact steps, with the paper's K; the basis "nearest" keeps factors and momentum consistent.
# "scaffold" is what learns most from the same tokens and from the same operations, for networks
# that need not be LLaMAs.
_EXACT: dict[str, Any] = {"basis": "nearest", "restart_warmup_steps": 0}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "recommended": (
        {"direction": "orthogonal", "exact_every": 0},
        {"initialiser": "auto", "projection": "cola"},
    ),
    "scaffold": (
        {"direction": "orthogonal", "exact_every": 0, "method_options": {"row_moment": 0.95}},
        {"initialiser": "auto", "projection": "scaffold_cola", "cross_layer": 0.5},
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
    """Returns a config with other settings of optimizer and projections.

    Args:
        config: the run's config, with the K of the paper.
        settings: a name in :data:`SETTINGS`.

    Returns:
        The config with these settings; learning rate, length and data stay the same.

    Raises:
        ValueError: if there are no settings of that name.

    Example:
        >>> run = with_settings(Config(), "recommended")
        >>> run.direction, run.exact_every, run.model.projection
        ('orthogonal', 0, 'cola')
    """
    if settings not in SETTINGS:
        raise ValueError(
            f"there are no settings {settings!r}; expected one of {', '.join(SETTINGS)} after the "
            "config file's colon."
        )
    of_run, of_model = SETTINGS[settings]
    model = dataclasses.replace(config.model, **of_model)
    # Copied, because a config may change its method options.
    return dataclasses.replace(config, model=model, **copy.deepcopy(of_run))
