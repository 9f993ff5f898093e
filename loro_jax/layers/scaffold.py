"""A fixed cheap matrix S of full rank beside the factors: ``y = S x + B A x``.

Source: LottaLoRA (arXiv 2604.08749) trains low-rank factors beside frozen random matrices and comes
close to full training, and of the methods compared here :mod:`~loro_jax.layers.lora`, whose fixed
matrix is never trained, is among the best. A random matrix would cost a dense layer's memory and
operations; structure makes S cheap:

``S = c D1 diag(T_1, ..., T_g) P D2``: random signs D2, a shuffle P, a cosine transform T_i in each
of g groups, random signs D1.

* Stored, and never trained: the m + n signs, those of D1 times c. T_i is computed where needed.
* Operations per token: 2 m n / g forward and as many backward, where there is a gradient of the
  input alone; the factors' 6 r (m + n) are added to both.
* P deals the inputs out to the groups in turn, so that each group gets entries of all heads and of
  all groups of the layers below. Unlike a random permutation it moves no single entries of
  activations, which is slow: it is a transposition.
* The groups are as equal as possible: where g divides m and n, there is one T for all; elsewhere
  the first ones have one output or input more.
* T_i has orthonormal rows or orthonormal columns, whichever are fewer, and c gives S the Frobenius
  norm of a dense matrix as it is initialised, times ``scaffold_scale``: S has full rank and equal
  singular values.

``S + B A`` is one matrix: a trained projection merges into a dense one. With an activation between
the factors, ``y = S x + B silu(A x)``, it does not.

Shapes: N rows of activations, D inputs, F outputs, G groups, J inputs of a group.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from loro_jax.layers.cola import ColaLinear
from loro_jax.layers.common import Fixed, ProjectionSpec, by_rows, products_dtype
from loro_jax.layers.low_rank import LowRankLinear
from loro_jax.linalg.cosine import cosine_transform
from loro_jax.linalg.precision import at_least_float32

Array = jax.Array


class Groups(NamedTuple):
    """Groups of one size, those from ``start`` to ``end``, with numbers of outputs and inputs."""

    start: int
    end: int
    outputs: int
    inputs: int


def groups(m: int, n: int, block: int) -> list[Groups]:
    """Returns the groups of an (m, n) scaffold, those of one size together.

    Args:
        m: outputs.
        n: inputs.
        block: lower bound on the smaller side of a group; 0: one group.

    Example:
        >>> groups(344, 128, 32)
        [Groups(start=0, end=4, outputs=86, inputs=32)]
        >>> for of_one_size in groups(5461, 2048, 32):
        ...     print(of_one_size)
        Groups(start=0, end=21, outputs=86, inputs=32)
        Groups(start=21, end=64, outputs=85, inputs=32)
    """
    g = max(1, min(m, n) // block) if block else 1
    # The first m mod g groups have one output more, the first n mod g one input more.
    ends = sorted({m % g, n % g, g} - {0})
    return [
        Groups(start, end, m // g + (end <= m % g), n // g + (end <= n % g))
        for start, end in itertools.pairwise([0, *ends])
    ]


class ScaffoldLinear(LowRankLinear):
    """``y = S x + B A x`` with S fixed.

    Example:
        >>> spec = ProjectionSpec(kind="scaffold", rank=2)
        >>> projection = ScaffoldLinear(96, 64, spec, nnx.Rngs(0))
        >>> projection(jnp.ones((5, 96))).shape
        (5, 64)
        >>> sum(leaf.size for leaf in jax.tree.leaves(nnx.state(projection, Fixed)))
        160
    """

    through_rank = False

    def __init__(self, in_features: int, out_features: int, spec: ProjectionSpec, rngs: nnx.Rngs):
        super().__init__(in_features, out_features, spec, rngs)
        m, n = out_features, in_features
        # The transform has min(m, n) singular values of 1, a dense weight m n entries of this size.
        size = spec.scaffold_scale * spec.initializer_range * math.sqrt(max(m, n))
        signs_out = jax.random.rademacher(rngs.params(), (m,), jnp.float32)
        self.signs_out = Fixed((size * signs_out).astype(spec.param_dtype))
        self.signs_in = Fixed(jax.random.rademacher(rngs.params(), (n,)).astype(spec.param_dtype))
        self.block = spec.scaffold_block

    @by_rows
    def __call__(self, x: Array) -> Array:
        """Maps (..., in) to (..., out)."""
        x = x.astype(products_dtype(self.dtype, x, self.A[...]))
        return self.fixed(x) + self.up(self.down(x))

    def fixed(self, x_NxD: Array, precision: jax.lax.Precision | None = None) -> Array:
        """Maps (N, in) by S to (N, out), in the dtype of the input.

        Args:
            x_NxD: the input.
            precision: of the products with T; None: the default.
        """
        m, n = self.signs_out.shape[-1], self.signs_in.shape[-1]
        of_each_size = groups(m, n, self.block)
        g, most = of_each_size[-1].end, of_each_size[0].inputs
        signed_NxD = x_NxD * self.signs_in[...].astype(x_NxD.dtype)
        # Groups with an input less get a zero, which is left out below.
        padded_NxD = jnp.pad(signed_NxD, ((0, 0), (0, g * most - n)))
        dealt_NxGxJ = padded_NxD.reshape(-1, most, g).swapaxes(1, 2)

        def transformed(of: Groups) -> Array:
            T = cosine_transform(of.outputs, of.inputs).astype(x_NxD.dtype)
            part_NxGxJ = dealt_NxGxJ[:, of.start : of.end, : of.inputs]
            y_NxGxK = jnp.matmul(part_NxGxJ, T.T, precision=precision)
            return y_NxGxK.reshape(len(x_NxD), -1)

        y_NxF = jnp.concatenate([transformed(of) for of in of_each_size], axis=-1)
        return y_NxF * self.signs_out[...].astype(x_NxD.dtype)

    @staticmethod
    def flops(m: int, n: int, spec: ProjectionSpec, tokens: float) -> float:
        """Returns the operations per token, forward and backward, without a gradient of S."""
        of_each_size = groups(m, n, spec.scaffold_block)
        entries = sum((of.end - of.start) * of.outputs * of.inputs for of in of_each_size)
        return 4.0 * entries + LowRankLinear.flops(m, n, spec, tokens)

    def weight(self) -> Array:
        """Returns the weight S + B A, (out, in), in float32 or wider."""
        identity = jnp.eye(self.signs_in.shape[-1], dtype=at_least_float32(self.B[...].dtype))
        return self.fixed(identity, jax.lax.Precision.HIGHEST).T + self.product()


class ScaffoldColaLinear(ScaffoldLinear, ColaLinear):
    """``y = S x + B silu(A x)``: the activation of :class:`ColaLinear` beside a fixed S.

    Example:
        >>> spec = ProjectionSpec(kind="scaffold_cola", rank=2)
        >>> projection = ScaffoldColaLinear(96, 64, spec, nnx.Rngs(0))
        >>> x = jnp.ones((5, 96))
        >>> factors = jax.nn.silu(x @ projection.A[...].T) @ projection.B[...].T
        >>> bool(jnp.allclose(projection(x), projection.fixed(x) + factors, atol=1e-6))
        True
    """

    def weight(self) -> Array:
        """Raises TypeError: no matrix computes the same function."""
        return ColaLinear.weight(self)
