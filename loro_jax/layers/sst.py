"""SST's projection: ``y = x (U diag(S) V^T)^T``, of which S and some singular vectors are trained.

B holds the trained columns of U, and A the trained rows of V^T; their gradients are the enhanced
ones of the method, not those of the chain rule. See :mod:`loro_jax.peers.sst`, which training calls
between its steps.

As in SLTrain, W exists only during a product, and the backward pass forms it again.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from loro_jax.layers.common import Fixed, ProjectionSpec, by_rows, products_dtype, with_bias
from loro_jax.layers.dense import Dense
from loro_jax.layers.low_rank import LowRankLinear
from loro_jax.peers.sst import Spectral, decompose

Array = jax.Array


@jax.custom_vjp
def spectral_product(x: Array, state: Spectral) -> Array:
    """Returns ``y = x W^T``; the gradients of active vectors leave out their singular values.

    Args:
        x: inputs, (..., n).
        state: the weight, a single matrix.

    Returns:
        Outputs, (..., m). With G the gradient of W, that of S_i is ``u_i^T G v_i``, that of a
        column u_i in B ``G v_i``, and that of a row v_i in A ``u_i^T G``.

    Example:
        >>> state = decompose(jax.random.key(0), jnp.diag(jnp.array([3.0, 2.0])), 2)
        >>> spectral_product(jnp.array([1.0, 1.0]), state).round(5).tolist()
        [3.0, 2.0]
        >>> of = jax.grad(lambda B: jnp.sum(spectral_product(jnp.ones(2), state._replace(B=B))))
        >>> jnp.abs(of(state.B)).round(5).tolist()  # all of W has the gradient 1
        [[1.0, 1.0], [1.0, 1.0]]
    """
    return x @ _weight(state).T


def _weight(state: Spectral) -> Array:
    U, Vt = state.vectors
    return (U * state.S) @ Vt


def _forward(x: Array, state: Spectral) -> tuple[Array, tuple[Array, Spectral]]:
    return spectral_product(x, state), (x, state)


def _backward(saved: tuple[Array, Spectral], dy: Array) -> tuple[Array, Spectral]:
    x, state = saved
    U, Vt = state.vectors
    # W again, from its parts: saved in the forward pass it would take a dense model's memory.
    dx = dy @ ((U * state.S) @ Vt)
    G = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    # Columns G v_i for all i: their products with u_i are the gradients of S, and those of active
    # places the enhanced gradients of B.
    G_v = G @ Vt.T
    gradient = Spectral(
        None,  # type: ignore[arg-type]  # fixed arrays have no gradient
        jnp.sum(U * G_v, axis=0),
        None,  # type: ignore[arg-type]
        G_v[:, state.active],
        state.B.T @ G,
        None,  # type: ignore[arg-type]
    )
    return dx, gradient


spectral_product.defvjp(_forward, _backward)


class SstLinear(LowRankLinear):
    """``y = x (U diag(S) V^T)^T``; S and the r active vectors of each side are trained.

    Example:
        >>> projection = SstLinear(64, 48, ProjectionSpec(kind="sst", rank=4), nnx.Rngs(0))
        >>> projection(jnp.ones((5, 64))).shape
        (5, 48)
        >>> projection.U.shape, projection.S.shape, projection.B.shape, projection.A.shape
        ((48, 48), (48,), (48, 4), (4, 64))
    """

    through_rank = False

    def __init__(self, in_features: int, out_features: int, spec: ProjectionSpec, rngs: nnx.Rngs):
        # For its checks and attributes; the factors that it draws, cheaply, are replaced below.
        factors = dataclasses.replace(spec, initialiser="auto")
        super().__init__(in_features, out_features, factors, rngs)
        assert spec.rank is not None  # make_projection chose this class by it
        # Dense's own draw, in float32: the parts are rounded, not W.
        whole = dataclasses.replace(spec, param_dtype=jnp.float32, use_bias=False)
        W = Dense(in_features, out_features, whole, rngs).W[...]
        parts = decompose(rngs.params(), W, spec.rank)
        self.B[...] = parts.B.astype(spec.param_dtype)
        self.A[...] = parts.A.astype(spec.param_dtype)
        self.S = nnx.Param(parts.S.astype(spec.param_dtype))
        self.U = Fixed(parts.U.astype(spec.param_dtype))
        self.Vt = Fixed(parts.Vt.astype(spec.param_dtype))
        self.active = Fixed(parts.active)

    @by_rows
    def __call__(self, x: Array) -> Array:
        """Maps (..., in) to (..., out); W exists only during the product."""
        state = self.parts()
        x = x.astype(products_dtype(self.dtype, x, state.B))
        return with_bias(spectral_product(x, state.astype(x.dtype)), self.bias)

    def parts(self) -> Spectral:
        """Returns the arrays as the rules of the method take them, as they are stored."""
        vectors = (self.U[...], self.S[...], self.Vt[...])
        return Spectral(*vectors, self.B[...], self.A[...], self.active[...])

    @staticmethod
    def flops(m: int, n: int, spec: ProjectionSpec, tokens: float) -> float:
        """Returns the operations per token: W is formed twice, and all ``G v_i`` once."""
        assert spec.rank is not None  # make_projection chose this class by it
        return 6.0 * m * n + 2.0 * m * n * (3 * min(m, n) + spec.rank) / tokens

    def weight(self) -> Array:
        """Returns the weight, (out, in), in float32 or wider."""
        return self.parts().weight()
