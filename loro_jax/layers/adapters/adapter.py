"""Adapters: a fixed layer, plus a trained change of its weight (W + dW)."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
from flax import nnx

from loro_jax.layers.adapters.spec import AdapterSpec
from loro_jax.layers.common import products_dtype

Array = jax.Array


class Adapter(nnx.Module):
    """A change dW (out x in) of a layer's weight: what each kind of adapter defines.

    A kind is a subclass in a file of this folder and an entry in
    :data:`loro_jax.layers.adapters.ADAPTERS`. Its trained arrays are ``nnx.Param``, all others
    :class:`~loro_jax.layers.common.Fixed`. It starts from ``dW = 0``, unless its docstring says
    otherwise.

    Args:
        in_features: n, size of the input's last axis.
        out_features: m, size of the output's last axis.
        spec: specification.
        rngs: NNX random streams; the ``params`` stream is used.
    """

    # Whether dW = s B A with trained B (m x r) and A (r x n), which LORO trains as a product.
    has_pair: ClassVar[bool] = False
    # Settings that the kind reads, besides those that all do: of its specification or of a run.
    uses: ClassVar[tuple[str, ...]] = ("alpha", "rank_stabilised", "initialiser")
    # Whether from_gradient makes a better start than the constructor.
    starts_from_gradient: ClassVar[bool] = False

    def __init__(self, in_features: int, out_features: int, spec: AdapterSpec, rngs: nnx.Rngs):
        raise NotImplementedError

    def __call__(self, x: Array, base: nnx.Module) -> Array:
        """Maps (..., in) to what is added to the output of the base, (..., out).

        Args:
            x: the layer's input, in the dtype of the products.
            base: the layer that is adapted; most kinds do not need it.
        """
        raise NotImplementedError

    def weight(self, W: Array) -> Array:
        """Returns dW, (..., out, in), in float32 or wider; W is the weight that is adapted."""
        raise NotImplementedError

    def factors(self) -> tuple[Array, Array] | None:
        """Returns (..., out, r) and (..., r, in), whose product is dW; None if there are none."""
        return None

    def from_gradient(self, G: Array, rate: float) -> None:
        """Starts from the mean gradient of the weight, (..., out, in), in place.

        Args:
            G: the gradient.
            rate: size of the first step of every entry of the weight.
        """
        raise NotImplementedError

    @staticmethod
    def flops(m: int, n: int, rank: int) -> float:
        """Returns the operations per token, forward and backward: those of two thin factors."""
        return 6.0 * rank * (m + n)


class AdaptedLinear(nnx.Module):
    """``y = base(x) + adapter(x)``: a layer that stays as it is, and its adapter.

    Other code may read the base's options, such as ``out_features``, from this layer.

    Args:
        base: a layer that maps (..., in) to (..., out).
        adapter: its adapter.
    """

    # For the packing of projections: the output depends on x not only through one thin matrix.
    through_rank = False
    linear = True

    def __init__(self, base: nnx.Module, adapter: Adapter):
        self.base = base
        self.adapter = adapter

    def __call__(self, x: Array, out_sharding: Any = None) -> Array:
        """Maps (..., in) to (..., out)."""
        options = {} if out_sharding is None else {"out_sharding": out_sharding}
        y = self.base(x, **options)
        # In the dtype that the base multiplies in: an adapter in float32 does not widen it.
        x = x.astype(products_dtype(getattr(self.base, "dtype", None), x, y))
        change = self.adapter(x, self.base).astype(y.dtype)
        if out_sharding is not None:
            change = jax.sharding.reshard(change, out_sharding)
        return y + change

    def weight(self) -> Array:
        """Returns the merged weight W + dW, (..., out, in), in float32 or wider."""
        W = weight_of(self.base)
        dW = self.adapter.weight(W)
        return W.astype(dW.dtype) + dW

    def __getattr__(self, name: str) -> Any:
        """Returns an option of the base."""
        base = vars(self).get("base")
        if base is None or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(base, name)


def weight_of(layer: Any) -> Array:
    """Returns the weight of a layer, (..., out, in), leading axes for a stack of layers.

    Args:
        layer: an ``nnx.Linear`` or a projection of :mod:`loro_jax.layers`.
    """
    return layer.kernel[...].mT if isinstance(layer, nnx.Linear) else layer.weight()
