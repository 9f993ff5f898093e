"""Projections for use in any model, one kind per file; and networks of anyone made low-rank.

``factorise``, ``merge`` and ``summary`` of this package are those of :mod:`loro_jax.layers.nnx`;
:mod:`loro_jax.layers.equinox` and :mod:`loro_jax.layers.linen` have theirs. A framework is imported
only when its module is.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loro_jax.layers.nnx import factorise, merge, summary

__all__ = ["factorise", "merge", "summary"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from loro_jax.layers import nnx

        return getattr(nnx, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
