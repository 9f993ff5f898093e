"""LoRA: ``dW = s B A`` with B = 0 at the start (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import jax
from flax import nnx

from loro_jax.layers.adapters.adapter import Adapter
from loro_jax.layers.adapters.spec import AdapterSpec
from loro_jax.layers.kernels import product
from loro_jax.linalg.precision import at_least_float32
from loro_jax.lowrank import initialise

Array = jax.Array


class Lora(Adapter):
    """``dW = s B A`` with B (out x r), A (r x in) and s = alpha / r (rsLoRA: alpha / sqrt(r)).

    As in the authors' code and PEFT, A is drawn uniformly as Kaiming does with a gain of
    ``1 / sqrt(3)``, within ``1 / sqrt(in)``. The product is of rank r, so that LORO trains it as
    that: ``W + s B A`` is the form in which the paper fine-tunes (section 5.3).

    Example:
        >>> import jax.numpy as jnp
        >>> adapter = Lora(8, 6, AdapterSpec(rank=2), nnx.Rngs(0))
        >>> float(jnp.abs(adapter(jnp.ones((4, 8)), None)).max())
        0.0
    """

    has_pair = True

    def __init__(self, in_features: int, out_features: int, spec: AdapterSpec, rngs: nnx.Rngs):
        B, A = initialise(
            rngs.params(), out_features, in_features, spec.rank, spec.initialiser or "lora"
        )
        self.B = nnx.Param(B.astype(spec.param_dtype))
        self.A = nnx.Param(A.astype(spec.param_dtype))
        self.scale = spec.scale

    def __call__(self, x: Array, base: nnx.Module) -> Array:
        """Maps (..., in) to (..., out) through the rank."""
        B, A = self.B[...].astype(x.dtype), self.A[...].astype(x.dtype)
        return self.scale * ((x @ A.T) @ B.T)

    def weight(self, W: Array) -> Array:
        """Returns s B A."""
        return self.scale * product(self.B[...], self.A[...])

    def factors(self) -> tuple[Array, Array]:
        """Returns s B and A, in float32 or wider."""
        B, A = (v[...].astype(at_least_float32(v[...].dtype)) for v in (self.B, self.A))
        return self.scale * B, A
