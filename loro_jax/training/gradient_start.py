"""Starts the adapters of a run from the gradient of the weights that they change."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from loro_jax.layers.adapters import ADAPTERS, probed, start_from_gradients
from loro_jax.layers.common import Fixed
from loro_jax.training.config import Config
from loro_jax.training.mesh import tree_shardings
from loro_jax.training.step import TrainState, joined, make_loss_and_gradient, merge_model
from loro_jax.training.tasks import task_of


def batches_to_start_from(config: Config) -> int:
    """Returns the number of training batches that a run's adapters start from; 0 for most kinds."""
    if not config.has_adapters or not ADAPTERS[config.adapter_kind].starts_from_gradient:
        return 0
    return -(-config.adapter.start_sequences // config.batch_size)


def start_from_text(
    config: Config, state: TrainState, batches: Iterable[Any], mesh: jax.sharding.Mesh
) -> TrainState:
    """Starts a run's adapters from the mean gradient over some batches.

    Args:
        config: the run's config.
        state: the state before the first step.
        batches: batches on the devices.
        mesh: the devices.

    Returns:
        The state with adapters whose change is about as large as the first full step of the
        warm-up, ``learning_rate / warmup_steps``.
    """
    task = task_of(config)
    abstract = nnx.eval_shape(lambda: probed(task.make()))
    graphdef = nnx.graphdef(abstract)
    shapes = nnx.to_pure_dict(nnx.state(abstract, nnx.Param))
    shardings = tree_shardings(mesh, shapes)

    def loss_sum(changes: Any, others: Any, batch: Any) -> jax.Array:
        return task.loss(nnx.merge(graphdef, joined(changes, others)), batch)

    loss_and_gradient = make_loss_and_gradient(loss_sum, task.number, config, mesh)

    def add(total: Any, others: Any, batch: Any) -> Any:
        zeros = jax.tree.map(jnp.zeros_like, total)
        return jax.tree.map(jnp.add, total, loss_and_gradient(zeros, others, batch)[1])

    added = jax.jit(add, out_shardings=shardings, donate_argnums=0)
    others = _without_adapters(joined(state.params, state.fixed))
    zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)  # noqa: E731
    # A sum: only signs matter.
    total = jax.jit(zeros, out_shardings=shardings)()
    for batch in batches:
        total = added(total, others, batch)
    rate = config.learning_rate / max(1, config.warmup_steps)

    def begin(params: Any, fixed: Any, gradients: Any) -> tuple[Any, Any]:
        model = merge_model(config, params, fixed)
        start_from_gradients(model, gradients, rate)
        params, fixed = nnx.state(model, nnx.Param), nnx.state(model, Fixed)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(fixed)

    parts = state.params, state.fixed
    placed = jax.tree.map(lambda x: x.sharding, parts)
    params, fixed = jax.jit(begin, out_shardings=placed, donate_argnums=(0, 1))(*parts, total)
    return state._replace(params=params, fixed=fixed)


def _without_adapters(tree: Any) -> Any:
    """Returns the nested dict of a network without the arrays of its adapters."""
    if not isinstance(tree, dict):
        return tree
    if tree.keys() == {"base", "adapter"}:
        return {"base": tree["base"]}
    return {name: _without_adapters(value) for name, value in tree.items()}
