"""Adapters with a factor for each rank: ``dW = s B diag(g) A``, whose zeros are dead ranks."""

from __future__ import annotations

from typing import ClassVar

import jax
import numpy as np
from flax import nnx

from loro_jax.layers.adapters.adapter import Adapter
from loro_jax.layers.adapters.spec import AdapterSpec
from loro_jax.layers.kernels import product
from loro_jax.linalg.precision import at_least_float32
from loro_jax.lowrank import initialise

Array = jax.Array


class Gated(Adapter):
    """``dW = s B diag(g) A`` with a trained gate for each rank, s = alpha / r.

    B (out x r) is 0 at the start, A (r x in) is LoRA's and the gates g are standard normal. SoRA
    and CoDyRA train it, with soft thresholds that set gates to zero: see
    :func:`loro_jax.peers.sora` and :func:`loro_jax.peers.codyra`.

    Source: Ding et al., "Sparse Low-rank Adaptation of Pre-trained Language Models", EMNLP 2023
    (arXiv 2311.11696). The scale of CoDyRA's authors is 1, which is alpha = r here.

    Example:
        >>> import jax.numpy as jnp
        >>> adapter = Gated(8, 6, AdapterSpec(rank=2), nnx.Rngs(0))
        >>> float(jnp.abs(adapter(jnp.ones((4, 8)), None)).max())
        0.0
    """

    # Name of the gates' variable.
    gates: ClassVar[str] = "gate"

    def __init__(self, in_features: int, out_features: int, spec: AdapterSpec, rngs: nnx.Rngs):
        B, A = initialise(
            rngs.params(), out_features, in_features, spec.rank, spec.initialiser or "lora"
        )
        self.B = nnx.Param(B.astype(spec.param_dtype))
        self.A = nnx.Param(A.astype(spec.param_dtype))
        self.gate = nnx.Param(jax.random.normal(rngs.params(), (spec.rank,), spec.param_dtype))
        self.scale = spec.scale

    def __call__(self, x: Array, base: nnx.Module) -> Array:
        """Maps (..., in) to (..., out) through the rank."""
        B, A, g = (v.astype(x.dtype) for v in (self.B[...], self.A[...], self._gate()))
        return self.scale * (((x @ A.T) * g) @ B.T)

    def weight(self, W: Array) -> Array:
        """Returns s B diag(g) A."""
        return product(*self.factors())

    def factors(self) -> tuple[Array, Array]:
        """Returns s B diag(g) and A, in float32 or wider."""
        B, A, g = (
            v.astype(at_least_float32(v.dtype)) for v in (self.B[...], self.A[...], self._gate())
        )
        return self.scale * B * g[..., None, :], A

    def _gate(self) -> Array:
        return getattr(self, self.gates)[...]


def live_factors(adapter: Gated) -> tuple[np.ndarray, np.ndarray]:
    """Returns factors of an adapter's dW without the ranks whose gate is zero.

    Args:
        adapter: the adapter of one layer, not of a stack.

    Returns:
        B (out, k) and A (k, in), with ``dW = B A`` and k the number of gates that are not zero.

    Raises:
        ValueError: for the adapters of a stack of layers, whose numbers of ranks may differ.

    Example:
        >>> import jax.numpy as jnp
        >>> adapter = Gated(8, 6, AdapterSpec(rank=2), nnx.Rngs(0))
        >>> adapter.gate[...] = jnp.array([0.0, 1.5])
        >>> [factor.shape for factor in live_factors(adapter)]
        [(6, 1), (1, 8)]
    """
    g, (B, A) = np.asarray(adapter._gate()), adapter.factors()
    if g.ndim != 1:
        raise ValueError(
            f"live_factors: expected the adapter of one layer, whose gates have the shape (r,), "
            f"but they have {g.shape}."
        )
    live = np.flatnonzero(g)
    return np.asarray(B)[:, live], np.asarray(A)[live]
