"""Parameters and memory of every method for one model, compared with the paper's Table 1.

Nothing is allocated: shapes and dtypes come from abstract evaluation of the functions that train.
Weights (trained and frozen), their gradients and the optimizer's state are counted, activations are
not; GB are 1e9 bytes. The paper's Mem column counts weights and optimizer state in bfloat16, and no
gradients. Here Adam's second moments are float32 even for bfloat16 weights, and so are the first
ones of methods that LORO is compared with, so the columns that are compared with the paper are
counted in its way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax

from loro_jax.errors import TrainingError
from loro_jax.memory import count_bytes, count_parameters
from loro_jax.training.config import METHODS, Config
from loro_jax.training.step import make_program
from models.llama import PRESETS, preset

MODELS = ("60m", "130m", "350m", "1b")

# Table 1 of Mo et al., ICLR 2025: (parameters in millions, memory in GB) of each model, for the
# ranks of PRESETS. Its 60M entry for low-rank weights, 0.24 GB, is inconsistent with the others:
# six bytes for each of 43M parameters are 0.26 GB.
PAPER: dict[str, tuple[tuple[int, float], ...]] = {
    "full": ((58, 0.35), (134, 0.81), (368, 2.21), (1339, 8.04)),
    "lowrank": ((43, 0.24), (94, 0.57), (185, 1.11), (609, 3.66)),
    "loro": ((43, 0.24), (94, 0.57), (185, 1.11), (609, 3.66)),
    "sltrain": ((44, 0.26), (97, 0.60), (194, 1.24), (646, 4.16)),
    "galore": ((58, 0.28), (134, 0.61), (368, 1.59), (1339, 4.76)),
}


class Held(NamedTuple):
    """Parameters and bytes held in training by one method.

    Attributes:
        trainable: number of trainable parameters.
        total: number of parameters, including frozen ones.
        weights: bytes of all parameters.
        optimizer: bytes of the optimizer's state.
        gradients: bytes of the gradients.
    """

    trainable: int
    total: int
    weights: int
    optimizer: int
    gradients: int


def held_by(config: Config) -> Held:
    """Counts a run's parameters and bytes, without activations.

    Args:
        config: the run's config.

    Returns:
        The counts.

    Example:
        >>> from models import LlamaConfig
        >>> model = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2,
        ...                     num_heads=4, rank=8)
        >>> held = held_by(Config(model=model))
        >>> held.trainable, held.weights == 4 * held.total, held.optimizer > 2 * held.weights
        (12192, True, True)
    """
    state = jax.eval_shape(make_program(config).init)
    # Indices of a sparse matrix take memory but are not parameters.
    fixed = [
        leaf
        for leaf in jax.tree.leaves(state.fixed)
        if jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating)
    ]
    trainable = count_parameters(state.params)
    weights = count_bytes(state.params)
    return Held(
        trainable=trainable,
        total=trainable + count_parameters(fixed),
        weights=weights + count_bytes(state.fixed),
        optimizer=count_bytes(state.opt_state),
        gradients=weights,
    )


def memory_rows(
    model: str, rank: int | None = None, methods: Iterable[str] = METHODS
) -> list[dict[str, Any]]:
    """Returns one row per method.

    Args:
        model: a preset of ``models.llama``.
        rank: rank of factors and projected gradients; None: the preset's.
        methods: the methods of the table.

    Returns:
        Rows with parameters in millions and GB for bfloat16 and float32. If Table 1 of the paper
        has the method and the model at this rank, also its figures and the differences.

    Raises:
        TrainingError: for an unknown model, or a rank that is too large.
    """
    if model not in PRESETS:
        raise TrainingError(f"--model={model}: expected one of {', '.join(PRESETS)}.")
    llama = preset(model) if rank is None else preset(model, rank=rank)
    rows = []
    for method in methods:
        row: dict[str, Any] = {"method": method}
        for dtype, name in (("bfloat16", "bf16"), ("float32", "f32")):
            config = Config(method=method, model=dataclasses.replace(llama, param_dtype=dtype))
            config.validate()
            held = held_by(config)
            row |= {"trainable M": held.trainable / 1e6, "total M": held.total / 1e6}
            row |= {
                f"{name} weights GB": held.weights / 1e9,
                f"{name} optimizer GB": held.optimizer / 1e9,
                f"{name} gradients GB": held.gradients / 1e9,
                f"{name} sum GB": (held.weights + held.optimizer + held.gradients) / 1e9,
            }
        rows.append(row | _beside_the_paper(row, method, model, llama.rank))
    return rows


def _beside_the_paper(row: dict[str, Any], method: str, model: str, rank: int) -> dict[str, Any]:
    names = ("paper M", "difference M", "paper GB", "difference GB")
    known = method in PAPER and model in MODELS and rank == PRESETS[model].rank
    if not known:
        return dict.fromkeys(names)
    parameters, memory = PAPER[method][MODELS.index(model)]
    ours = row["bf16 weights GB"] + row["f32 optimizer GB"] / 2
    differences = (parameters, row["total M"] - parameters, memory, ours - memory)
    return dict(zip(names, differences, strict=True))
