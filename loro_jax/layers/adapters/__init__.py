"""Adapters for any Flax NNX network: layers that stay as they are, plus a trained change.

:func:`adapt` adds them, :func:`merge_adapters` makes plain layers of the result. One kind a file;
the table is :data:`ADAPTERS`.
"""

from loro_jax.layers.adapters.adapt import absorb, adapt, merge_adapters
from loro_jax.layers.adapters.adapter import AdaptedLinear, Adapter
from loro_jax.layers.adapters.freezing import freeze, unfreeze
from loro_jax.layers.adapters.gated import live_factors
from loro_jax.layers.adapters.gradient_start import probed, start_from_gradients
from loro_jax.layers.adapters.spec import AdapterSpec
from loro_jax.layers.adapters.table import ADAPTERS

__all__ = [
    "ADAPTERS",
    "AdaptedLinear",
    "Adapter",
    "AdapterSpec",
    "absorb",
    "adapt",
    "freeze",
    "live_factors",
    "merge_adapters",
    "probed",
    "start_from_gradients",
    "unfreeze",
]
