"""MiSS: ``dW`` repeats one thin matrix along the inputs (Kang 2024, arXiv 2409.15371).

The method's earlier name is Bone; PEFT calls it MiSS.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from loro_jax.layers.adapters.adapter import Adapter
from loro_jax.layers.adapters.spec import AdapterSpec
from loro_jax.linalg.precision import at_least_float32

Array = jax.Array


class Miss(Adapter):
    """``dW = [b^T b^T ... b^T]`` with one trained b (r x out), zero at first.

    The input is cut into shards of r numbers, which are added: ``y = W x + b^T (x_1 + x_2 + ...)``.
    The last shard is filled up with zeros if r does not divide the inputs. There is no scale:
    ``alpha`` is not used.

    Example:
        >>> adapter = Miss(8, 6, AdapterSpec(kind="miss", rank=3), nnx.Rngs(0))
        >>> adapter.b.shape, float(jnp.abs(adapter(jnp.ones((4, 8)), None)).max())
        ((3, 6), 0.0)
    """

    uses = ()

    def __init__(self, in_features: int, out_features: int, spec: AdapterSpec, rngs: nnx.Rngs):
        self.b = nnx.Param(jnp.zeros((spec.rank, out_features), spec.param_dtype))

    def __call__(self, x: Array, base: nnx.Module) -> Array:
        """Maps (..., in) to (..., out) by the sum of the shards."""
        b = self.b[...].astype(x.dtype)
        r, n = b.shape[0], x.shape[-1]
        filled = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -n % r)])
        return jnp.sum(filled.reshape(*x.shape[:-1], -1, r), axis=-2) @ b

    def weight(self, W: Array) -> Array:
        """Returns b^T repeated along the inputs."""
        return repeated(self.b[...], W.shape[-1])

    @staticmethod
    def flops(m: int, n: int, rank: int) -> float:
        """Returns the operations per token: one thin factor, and the sum of the shards."""
        return 6.0 * rank * m + 2.0 * n


def repeated(b: Array, n: int) -> Array:
    """Returns b^T, repeated to n columns, in float32 or wider.

    Args:
        b: (..., r, m).
        n: number of columns.

    Example:
        >>> repeated(jnp.array([[1.0], [2.0]]), 5).tolist()
        [[1.0, 2.0, 1.0, 2.0, 1.0]]
    """
    columns = jnp.arange(n) % b.shape[-2]
    return b.mT.astype(at_least_float32(b.dtype))[..., columns]
