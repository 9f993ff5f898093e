"""Low-rank modules for Linen, with the fields of the modules of Flax whose place they take."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import dtypes
from flax.linen.linear import default_kernel_init

from loro_jax.layers.initial import initial_factors
from loro_jax.layers.kernels import Layout
from loro_jax.layers.linen.kinds import DENSE, GENERAL, Kind, through_rank
from loro_jax.layers.linen.tree import boxed_pair, value_of
from loro_jax.layers.selection import joined, resolve_rank

Array = jax.Array


class LowRankDense(nn.Module):
    """``nn.Dense`` with a pair as its kernel, ``y = (x A^T) B^T + bias``.

    Parameters: "B" (features, r), "A" (r, inputs), "bias". They are those that
    :func:`factorise_params` makes of the parameters of ``nn.Dense``, and :func:`merge_params`
    turns them back.

    Attributes:
        features: number of outputs.
        rank: r, or a share of the smaller side as a float.
        use_bias: whether a bias is added.
        dtype: dtype of the computation; None: that of input and parameters.
        param_dtype: dtype of the parameters.
        precision: precision of the products, see ``jax.lax.Precision``.
        kernel_init: draws the dense kernel that the factors start from: they take its size, for
            initialisers that have one, and the names of its axes. Only ``init`` draws it.
        bias_init: initialiser of the bias.
        initialiser: "svd": the kernel's best approximation; or a name known to
            :func:`loro_jax.initialise`.
        promote_dtype: as in ``nn.Dense``, for each of the two products.
        dot_general: as in ``nn.Dense``.
        dot_general_cls: as in ``nn.Dense``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = LowRankDense(6, rank=2)
        >>> variables = layer.init(jax.random.key(0), jnp.ones((3, 4)))
        >>> jax.tree.map(jnp.shape, variables)
        {'params': {'A': (2, 4), 'B': (6, 2), 'bias': (6,)}}
    """

    features: int
    rank: int | float
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Callable[..., Any] = default_kernel_init
    bias_init: Callable[..., Any] = nn.initializers.zeros_init()
    initialiser: str = "auto"
    promote_dtype: Callable[..., Any] = dtypes.promote_dtype
    dot_general: Any = None
    dot_general_cls: Any = None

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Maps (..., inputs) to (..., features)."""
        return _through_rank(self, DENSE, inputs)


class LowRankDenseGeneral(nn.Module):
    """``nn.DenseGeneral`` with a pair as its kernel.

    Parameters: "B" (batch, m, r) and "A" (batch, r, n), where m outputs are the product of the
    features and n inputs that of the axes, and "bias" (batch, features).

    Attributes:
        features: number or numbers of outputs.
        rank: r, or a share of the smaller of m and n as a float.
        axis: axis or axes of the input that are multiplied by.
        batch_dims: leading axes of the input, for each entry of which there is a kernel.
        use_bias: whether a bias is added.
        dtype: dtype of the computation; None: that of input and parameters.
        param_dtype: dtype of the parameters.
        precision: precision of the products, see ``jax.lax.Precision``.
        kernel_init: as in :class:`LowRankDense`.
        bias_init: initialiser of the bias.
        initialiser: as in :class:`LowRankDense`.
        promote_dtype: as in ``nn.DenseGeneral``, for each of the two products.
        dot_general: as in ``nn.DenseGeneral``.
        dot_general_cls: as in ``nn.DenseGeneral``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = LowRankDenseGeneral((2, 3), rank=0.5, axis=(-2, -1))
        >>> variables = layer.init(jax.random.key(0), jnp.ones((5, 4, 2)))
        >>> jax.tree.map(jnp.shape, variables)
        {'params': {'A': (3, 8), 'B': (6, 3), 'bias': (2, 3)}}
    """

    features: int | Sequence[int]
    rank: int | float
    axis: int | Sequence[int] = -1
    batch_dims: Sequence[int] = ()
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Callable[..., Any] = default_kernel_init
    bias_init: Callable[..., Any] = nn.initializers.zeros_init()
    initialiser: str = "auto"
    promote_dtype: Callable[..., Any] = dtypes.promote_dtype
    dot_general: Any = None
    dot_general_cls: Any = None

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Maps the axes of the input to the features, which become its last axes."""
        return _through_rank(self, GENERAL, inputs)


def _through_rank(module: Any, kind: Kind, x: Array) -> Array:
    """Returns the output of a module, whose parameters are drawn if there are none."""
    layout = kind.layout(module, x, "")
    factors = _factors(module, layout)
    bias = None
    if module.use_bias:
        shape = (*layout.sizes("b"), *layout.sizes("o"))
        bias = module.param("bias", _flat(module.bias_init), shape, module.param_dtype)
    return through_rank(kind, module, factors, bias, x)


def _factors(module: Any, layout: Layout) -> tuple[Array, Array]:
    """Returns B and A."""
    rank = _rank(module, layout)
    m, n = layout.matrix_shape
    batch = layout.sizes("b")
    drawn: tuple[Any, Any] | None = None
    # Both factors come from one kernel, and so from one key.
    if module.is_mutable_collection("params") and not module.has_variable("params", "B"):
        drawn = _drawn(module, layout, rank, module.make_rng("params"))

    def factor(name: str, shape: tuple[int, ...]) -> Array:
        # Where there are parameters, Flax compares their shapes with those of the initialiser.
        value = drawn["BA".index(name)] if drawn else jax.ShapeDtypeStruct(shape, jnp.float32)
        return module.param(name, lambda key: value)

    return factor("B", (*batch, m, rank)), factor("A", (*batch, rank, n))


def _drawn(module: Any, layout: Layout, rank: int, key: Array) -> tuple[Any, Any]:
    """Returns the factors that the module starts from, boxed as its kernel would be."""
    key_kernel, key_factors = jax.random.split(key)
    flat = (math.prod(layout.sizes("b")) * layout.matrix_shape[1], layout.matrix_shape[0])
    # Flax draws kernels as matrices, of which the initialisers know the sides.
    kernel = _reshaped(module.kernel_init(key_kernel, flat, module.param_dtype), layout.shape)
    W = layout.matrix(value_of(kernel))
    B, A = initial_factors(W, rank, module.initialiser, key_factors)
    return boxed_pair(kernel, layout, B, A)


def _flat(init: Callable[..., Any]) -> Callable[..., Any]:
    """Makes an initialiser draw one axis, as Flax does for biases, and reshapes it."""
    return lambda key, shape, dtype: _reshaped(init(key, (math.prod(shape),), dtype), shape)


def _reshaped(drawn: Any, shape: tuple[int, ...]) -> Any:
    """Returns a parameter in another shape, in its box if it has one."""
    value = value_of(drawn).reshape(shape)
    return value if value_of(drawn) is drawn else drawn.replace_boxed(value)


def _rank(module: Any, layout: Layout) -> int:
    name, path = type(module).__name__, joined(module.path)
    smaller = min(layout.matrix_shape)
    m, n = layout.matrix_shape
    if hasattr(module.rank, "__index__") and not 1 <= module.rank <= smaller:
        raise ValueError(
            f"{name}: the rank of {path!r}, {n} inputs to {m} outputs, must be between 1 and "
            f"{smaller}, but is {module.rank}."
        )
    rank = resolve_rank(module.rank, path, layout.matrix_shape, name)
    assert rank is not None  # only a function returns None
    return rank
