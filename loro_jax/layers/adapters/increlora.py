"""IncreLoRA's adapter: AdaLoRA's form, of which a part is open, and a score of its importance."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from loro_jax.layers.adapters.adalora import AdaLora
from loro_jax.layers.adapters.spec import AdapterSpec
from loro_jax.peers.increlora import SCORE_UNIT

Array = jax.Array


class IncreLora(AdaLora):
    """``dW = s B diag(E) A``, of which :func:`loro_jax.peers.increlora` opens one rank at first.

    ``rank`` is the most ranks that a layer can have. E of those that are not open yet is 0, or 1e-5
    for the ones in reserve. As in AdaLoRA, E = 0 at the start. The scale s = alpha / (r + 1e-5)
    does not change as ranks open; in the authors' code r is the present number, so that each new
    rank shrinks the contribution of the old ones.

    Layers grow by the score ``sum |dW o G| / sqrt(m n)``, where G (m x n) is the gradient of dW. It
    can't be computed from the gradients of B, E and A. Therefore it is computed where G is, in the
    backward pass, and handed over as the gradient of a parameter ``score`` that the output does not
    depend on, times 2^-40, which leaves the norm of all gradients as it is. With micro-batches
    the scores of their gradients are added.

    The layer multiplies by dW as one matrix, as the authors' does, and so costs as many operations
    as a dense layer.

    Source: Zhang et al., "IncreLoRA: Incremental Parameter Allocation Method for Parameter-
    Efficient Fine-tuning", 2023 (arXiv 2308.12043), and the authors' code.

    Example:
        >>> adapter = IncreLora(8, 6, AdapterSpec(kind="increlora", rank=2), nnx.Rngs(0))
        >>> float(jnp.abs(adapter(jnp.ones((4, 8)), None)).max())
        0.0
    """

    def __init__(self, in_features: int, out_features: int, spec: AdapterSpec, rngs: nnx.Rngs):
        super().__init__(in_features, out_features, spec, rngs)
        self.score = nnx.Param(jnp.zeros((), spec.param_dtype))

    def __call__(self, x: Array, base: nnx.Module) -> Array:
        """Maps (..., in) to (..., out) by dW."""
        dW = (self.scale * (self.B[...] * self.E[...]) @ self.A[...]).astype(x.dtype)
        return x @ _scored(dW, self.score[...]).T

    @staticmethod
    def flops(m: int, n: int, rank: int) -> float:
        """Returns the operations per token, forward and backward: those of a dense layer."""
        return 6.0 * m * n


@jax.custom_vjp
def _scored(dW: Array, score: Array) -> Array:
    """Returns dW; the score of its gradient becomes the gradient of ``score``."""
    return dW


def _forward(dW: Array, score: Array) -> tuple[Array, tuple[Array, Array]]:
    return dW, (dW, score)


def _backward(kept: tuple[Array, Array], G: Array) -> tuple[Array, Array]:
    dW, score = kept
    total = jnp.sum(jnp.abs(dW.astype(score.dtype) * G.astype(score.dtype)))
    return G, SCORE_UNIT * total / dW.size**0.5


_scored.defvjp(_forward, _backward)
