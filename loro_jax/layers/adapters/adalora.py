"""AdaLoRA's adapter: ``dW = s B diag(E) A``, a singular value decomposition in form."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from loro_jax.layers.adapters.gated import Gated
from loro_jax.layers.adapters.spec import AdapterSpec
from loro_jax.lowrank import initialise

Array = jax.Array


class AdaLora(Gated):
    """``dW = s B diag(E) A`` with E = 0 at the start, and s = alpha / (r + 1e-5).

    Entries of B (out x r) and A (r x in) are normal with a standard deviation of 0.02. A penalty
    keeps columns of B and rows of A nearly orthonormal, and the least important entries of E are
    set to zero: see :func:`loro_jax.peers.adalora`.

    Source: Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR
    2023 (arXiv 2303.10512); the scale is that of the authors' code and of PEFT.

    Example:
        >>> adapter = AdaLora(8, 6, AdapterSpec(kind="adalora", rank=2), nnx.Rngs(0))
        >>> float(jnp.abs(adapter(jnp.ones((4, 8)), None)).max())
        0.0
    """

    gates: ClassVar[str] = "E"

    def __init__(self, in_features: int, out_features: int, spec: AdapterSpec, rngs: nnx.Rngs):
        asked = spec.initialiser if spec.absorbs else None
        B, A = initialise(
            rngs.params(), out_features, in_features, spec.rank, asked or "randn_0.02"
        )
        self.B = nnx.Param(B.astype(spec.param_dtype))
        self.A = nnx.Param(A.astype(spec.param_dtype))
        self.E = nnx.Param(jnp.zeros(spec.rank, spec.param_dtype))
        self.scale = spec.alpha / (spec.rank**0.5 if spec.rank_stabilised else spec.rank + 1e-5)
