"""The straight line between two models: perplexity of ``(1 - t) W_a + t W_b``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from loro_jax.errors import TrainingError
from loro_jax.layers.projections import PROJECTIONS
from models.config import GROUPS
from models.huggingface.configs import to_huggingface
from models.llama import Llama, LlamaConfig

# Eleven points.
POINTS = tuple(i / 10 for i in range(11))
# Modules of a block by the groups of projections.
_PARTS = {"attn": "attention", "mlp": "mlp"}
# What two models on a line may differ in: how they are stored, and the longest text.
_FREE = ("torch_dtype", "max_position_embeddings")


def along_line(
    first: Llama,
    second: Llama,
    perplexity: Callable[[Llama], float],
    points: Sequence[float] = POINTS,
) -> list[dict[str, Any]]:
    """Evaluates models on the straight line between two, in their dense weights.

    Products B A are merged before they are interpolated: they do not depend on the choice of the
    factors, and the ranks of the two models may differ. Embeddings, norms and heads are
    interpolated, too. Nothing is permuted.

    Args:
        first: the model at 0.
        second: the model at 1.
        perplexity: evaluates a model.
        points: where.

    Returns:
        Rows of ``t`` and ``perplexity`` (None if it is not finite).

    Raises:
        TrainingError: if the architectures differ, or projections can't be merged.

    Example:
        >>> config = LlamaConfig(64, 32, 48, num_layers=1, num_heads=4, rank=8)
        >>> one, two = (Llama(config, nnx.Rngs(seed)) for seed in (0, 1))
        >>> rows = along_line(one, two, lambda model: float(model.norm.scale[0]), points=(0, 0.5))
        >>> rows
        [{'t': 0, 'perplexity': 1.0}, {'t': 0.5, 'perplexity': 1.0}]
    """
    _check(first.config, second.config)
    a, b = merged(first), merged(second)
    config = _dense(first.config)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0))))
    rows = []
    for t in points:
        params = jax.tree.map(lambda x, y, t=t: jnp.asarray((1 - t) * x + t * y), a, b)
        state.replace_by_pure_dict(params)
        found = perplexity(nnx.merge(graphdef, state))
        rows.append({"t": t, "perplexity": found if math.isfinite(found) else None})
    return rows


def merged(model: Llama) -> Any:
    """Returns a model's parameters with dense projections, as nested dicts of float32.

    Raises:
        TrainingError: if its projections are no products.
    """
    config = model.config
    if config.cross_layer:
        raise TrainingError(
            f"model.cross_layer = {config.cross_layer}: outputs that cross layers can't be merged "
            "into dense weights; expected 0."
        )
    if config.scope != "none" and not PROJECTIONS[config.projection].linear:
        raise TrainingError(
            f'projections of kind "{config.projection}" can\'t be merged into dense weights: there '
            "is an activation between their factors."
        )
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    graphdef, stacked = nnx.split(model.blocks)
    by_layer: dict[tuple[str, str], list[np.ndarray]] = {}
    for layer in range(config.num_layers):
        block = nnx.merge(graphdef, jax.tree.map(lambda x, layer=layer: x[layer], stacked))
        for group in GROUPS:
            for name in config.shapes(group):
                weight = getattr(getattr(block, _PARTS[group]), name).weight()
                by_layer.setdefault((_PARTS[group], name), []).append(np.asarray(weight))
    for (part, name), weights in by_layer.items():
        params["blocks"][part][name] = {"W": np.stack(weights)}
    return jax.tree.map(lambda x: np.asarray(x, np.float32), params)


def _dense(config: LlamaConfig) -> LlamaConfig:
    return dataclasses.replace(config.dense(), param_dtype="float32", dtype="float32")


def _check(first: LlamaConfig, second: LlamaConfig) -> None:
    """Raises TrainingError if the architectures differ, whatever the ranks are."""
    one, two = (to_huggingface(config, "float32", factored=False) for config in (first, second))
    for name in sorted(one.keys() | two.keys()):
        if name not in _FREE and one.get(name) != two.get(name):
            raise TrainingError(
                f"the two models differ in {name}: {one.get(name)} and {two.get(name)}; expected "
                "one architecture."
            )
