"""Low-rank layers for Flax Linen: modules, checkpoints turned into pairs and back, and their calls.

In a module that you write, :class:`LowRankDense` takes the place of ``nn.Dense``. For any other,
:func:`factorise_params` replaces kernels by pairs in its parameters, and within
:func:`low_rank_calls` Flax's layers compute by them.
"""

from loro_jax.layers.linen.calls import low_rank_calls
from loro_jax.layers.linen.layouts import kernel_layouts
from loro_jax.layers.linen.modules import LowRankDense, LowRankDenseGeneral
from loro_jax.layers.linen.params import factorise_params, merge_params, summary_params

__all__ = [
    "LowRankDense",
    "LowRankDenseGeneral",
    "factorise_params",
    "kernel_layouts",
    "low_rank_calls",
    "merge_params",
    "summary_params",
]
