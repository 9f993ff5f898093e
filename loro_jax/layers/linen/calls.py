"""Calls of Flax's layers by pairs, for a module that can't be edited."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
from flax import errors
from flax.core import meta

from loro_jax.layers.linen.kinds import KINDS, NORMALISING, input_and_equation, through_rank
from loro_jax.layers.selection import joined

_CALLER = "low_rank_calls"


@contextlib.contextmanager
def low_rank_calls() -> Iterator[None]:
    """Makes Flax's layers compute by a pair wherever the parameters hold B and A, and no kernel.

    Within it, ``nn.Dense``, ``nn.DenseGeneral``, ``nn.Einsum`` and ``nn.Conv`` multiply by A, then
    by B, also within ``nn.scan``, ``nn.vmap`` and ``nn.remat``; other layers, and those that still
    have their kernel, are as always. A function under ``jax.jit`` needs it while it is traced. It
    is also a decorator: ``apply = low_rank_calls()(model.apply)``.

    Raises:
        ValueError: in the call of the network, if the parameters hold a pair in a layer of another
            class, or one that does not fit.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from loro_jax.layers.linen import factorise_params
        >>> model, x = nn.Dense(6), jnp.ones((2, 4))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> pairs = factorise_params(params, 4, init="svd")
        >>> with low_rank_calls():
        ...     y = model.apply({"params": pairs}, x)
        >>> bool(jnp.allclose(y, model.apply({"params": params}, x), atol=1e-5))
        True
    """
    with nn.intercept_methods(functools.partial(_call, [])):
        yield


def _call(
    normalising: list[nn.Module],
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    """Calls a method of a module, within the given ones that normalise kernels."""
    module = context.module
    if isinstance(module, NORMALISING):
        normalising.append(module)
        try:
            return next_fun(*args, **kwargs)
        finally:
            normalising.pop()
    if module.scope is None or not _holds_pair(module):
        return next_fun(*args, **kwargs)
    kind = next((kind for kind in KINDS if kind.is_called(context)), None)
    if kind is None:
        return _call_other(next_fun, args, kwargs, module)
    if normalising:
        raise ValueError(
            f"{_CALLER}: {joined(module.path)!r}: {type(normalising[-1]).__name__} normalises a "
            f"kernel, but finds a pair; leave it out: where='!{joined(module.path)}'."
        )
    x, equation = input_and_equation(module, args, kwargs)
    B, A, bias = (
        meta.unbox(module.get_variable("params", name, None)) for name in ("B", "A", "bias")
    )
    try:
        return through_rank(kind, module, (B, A), bias, x, equation)
    except ValueError as error:
        raise ValueError(f"{_CALLER}: {joined(module.path)!r}: {error}.") from error


def _holds_pair(module: nn.Module) -> bool:
    held = [name for name in ("B", "A", "kernel") if module.has_variable("params", name)]
    return held == ["B", "A"]


def _call_other(
    next_fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], module: nn.Module
) -> Any:
    """Calls a method of a layer of another class, which may have a pair of its own."""
    try:
        return next_fun(*args, **kwargs)
    except errors.ScopeParamNotFoundError as error:
        if '"kernel"' not in str(error):
            raise
        path = joined(module.path)
        raise ValueError(
            f"{_CALLER}: the parameters of {path!r} hold a pair in place of the kernel, but a "
            f"{type(module).__name__} computes by no pair; expected a Dense, DenseGeneral, Einsum "
            f"or Conv: leave it out of the factorisation, where='!{path}'."
        ) from error
