"""The network of a run: a LLaMA, with adapters if the config asks for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from loro_jax.layers.adapters import AdapterSpec, adapt, merge_adapters
from models.llama import Llama

if TYPE_CHECKING:
    from loro_jax.training.config import Config


def make_network(config: Config) -> Llama:
    """Makes the network of a run, with new weights."""
    model = Llama(config.model_config, nnx.Rngs(config.seed))
    if not config.has_adapters:
        return model
    # Another stream than that of the network's weights.
    key = jax.random.fold_in(jax.random.key(config.seed), 2)
    return adapt(
        model,
        adapter_spec(config),
        where=[f"blocks/*/{name}" for name in config.adapter.names],
        trained=config.adapter.also,
        key=key,
        in_place=True,
    )


def adapter_spec(config: Config) -> AdapterSpec:
    """Returns the specification of a run's adapters."""
    adapter = config.adapter
    return AdapterSpec(
        kind=config.adapter_kind,
        rank=adapter.rank,
        alpha=adapter.alpha,
        rank_stabilised=adapter.rank_stabilised,
        initialiser=adapter.initialiser,
        density=adapter.density,
        # A 16-bit network may have adapters with small steps.
        param_dtype=jnp.promote_types(config.model.param_dtype, jnp.float32),
        seed=config.seed,
    )


def without_adapters(model: Llama) -> Llama:
    """Returns a network with its adapters merged into its weights; the same one without any."""
    return merge_adapters(model, in_place=True)


def base_of(tree: Any) -> Any:
    """Returns the nested dict of a network's arrays as that of the network without adapters."""
    if not isinstance(tree, dict):
        return tree
    if tree.keys() == {"base", "adapter"}:
        return tree["base"]
    return {name: base_of(value) for name, value in tree.items()}


def with_base(tree: Any, base: Any) -> Any:
    """Returns a nested dict with the arrays outside of adapters replaced.

    Args:
        tree: arrays of a network.
        base: arrays of the network without adapters, as :func:`base_of` returns them.

    Example:
        >>> tree = {"q": {"base": {"W": 1}, "adapter": {"B": 2}}, "norm": 3}
        >>> with_base(tree, {"q": {"W": 4}, "norm": 5})
        {'q': {'base': {'W': 4}, 'adapter': {'B': 2}}, 'norm': 5}
    """
    if not isinstance(tree, dict):
        return base
    if tree.keys() == {"base", "adapter"}:
        return {"base": base, "adapter": tree["adapter"]}
    return {name: with_base(value, base[name]) for name, value in tree.items()}
