"""SwitchLoRA: LoRA with spare vectors, and with the scale ``1 / r``.

Training switches vectors of B and A with the spare vectors; see :mod:`loro_jax.peers.switchlora`.
"""

from __future__ import annotations

from flax import nnx

from loro_jax.layers.common import Fixed, ProjectionSpec
from loro_jax.layers.lora import LoraLinear
from loro_jax.peers.switchlora import (
    initialise_candidates,
    initialise_switchlora,
    nothing_frozen,
)


class SwitchLoraLinear(LoraLinear):
    """:class:`LoraLinear` with spare vectors and the state of their switches."""

    def __init__(self, in_features: int, out_features: int, spec: ProjectionSpec, rngs: nnx.Rngs):
        super().__init__(in_features, out_features, spec, rngs)
        shape = (out_features, in_features, self.A.shape[-2])
        # Replaces LoRA's factors; here B is not zero at first.
        B, A = initialise_switchlora(rngs.params(), *shape)
        self.B[...] = B.astype(spec.param_dtype)
        self.A[...] = A.astype(spec.param_dtype)
        spare = initialise_candidates(rngs.params(), *shape)
        self.spare_B = Fixed(spare.B.astype(spec.param_dtype))
        self.spare_A = Fixed(spare.A.astype(spec.param_dtype))
        self.switched = Fixed(spare.switched)
        frozen_B, frozen_A = nothing_frozen(B)
        self.frozen_B, self.frozen_A = Fixed(frozen_B), Fixed(frozen_A)
        # The initial standard deviations assume this scale, not LoRA's alpha / r.
        self.scale = 1 / self.A.shape[-2]
