"""The start of a SwitchLoRA run: the factors, and the spare vectors they will be swapped with.

Source: Zhou, Wang, Xu, "SwitchLoRA: Switched Low-Rank Adaptation Can Learn Full-Rank
Information", arXiv 2406.06564, and the authors' code (github.com/asfsdsf/SwitchLoRA).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Candidates(NamedTuple):
    """The spare vectors of one weight, q = min(m, n) - r a side, and how many were used.

    Attributes:
        B: spare columns, shape (..., m, q).
        A: spare rows, shape (..., q, n).
        switched: switches a side so far, int32 of shape (...); it says whose turn is next.
    """

    B: Array
    A: Array
    switched: Array


def initialise_switchlora(key: Array, m: int, n: int, r: int) -> tuple[Array, Array]:
    """Draws B (m, r) and A (r, n) with the standard deviations of SwitchLoRA.

    Uniform entries around zero with ``std(B) = sqrt(g) (r / sqrt(m n))^(1/4)`` and
    ``std(A) = sqrt(g) (r sqrt(m) / n^(3/2))^(1/4)``, where g = sqrt(1/3). With the scale s = 1/r
    that the rule presumes, s B A has the standard deviation g / sqrt(n) of a fresh dense layer,
    and a step in B moves the product as much as one in A. B is not zero: a run that shall start
    from a given W starts with W0 = W - s B A.

    Args:
        key: a JAX random key.
        m: output features.
        n: input features.
        r: the rank, between 1 and min(m, n).

    Returns:
        B and A in float32.

    Raises:
        ValueError: if the rank does not fit.

    Example:
        >>> B, A = initialise_switchlora(jax.random.key(0), 64, 32, 8)
        >>> B.shape, A.shape
        ((64, 8), (8, 32))

    Source: arXiv 2406.06564, the section on initialisation; the gain g (that of a leaky ReLU with
    slope sqrt(5)) and the uniform distribution are those of the authors' code.
    """
    _check_rank(m, n, r, "initialise_switchlora")
    return _draw(key, m, n, r, r)


def initialise_candidates(key: Array, m: int, n: int, r: int) -> Candidates:
    """Draws the spare vectors, from the distributions of B and A.

    With the r vectors in use there are min(m, n) a side, so that the products can span all of W.
    For stacked layers, map it: ``jax.vmap(lambda k: initialise_candidates(k, m, n, r))(keys)``.

    Args:
        key: a JAX random key, another than that of B and A.
        m: output features.
        n: input features.
        r: the rank, between 1 and min(m, n).

    Returns:
        Candidates in float32. In a narrower run, cast them to the dtypes of B and A.

    Raises:
        ValueError: if the rank does not fit.

    Example:
        >>> spare = initialise_candidates(jax.random.key(1), 64, 32, 8)
        >>> spare.B.shape, spare.A.shape, int(spare.switched)
        ((64, 24), (24, 32), 0)

    Source: arXiv 2406.06564, the sections on switching and on initialisation.
    """
    _check_rank(m, n, r, "initialise_candidates")
    B, A = _draw(key, m, n, r, min(m, n) - r)
    return Candidates(B, A, jnp.zeros((), jnp.int32))


def _draw(key: Array, m: int, n: int, r: int, count: int) -> tuple[Array, Array]:
    """``count`` columns for B and rows for A; r sets how large they are."""
    gain = math.sqrt(1 / 3)
    std_B = math.sqrt(gain) * (r / math.sqrt(m * n)) ** 0.25
    std_A = math.sqrt(gain) * (r * math.sqrt(m) / n**1.5) ** 0.25

    def uniform(key: Array, shape: tuple[int, int], std: float) -> Array:
        return math.sqrt(3) * std * jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)

    key_B, key_A = jax.random.split(key)
    return uniform(key_B, (m, count), std_B), uniform(key_A, (count, n), std_A)


def _check_rank(m: int, n: int, r: int, where: str) -> None:
    if not 1 <= r <= min(m, n):
        raise ValueError(
            f"{where}: the rank must be between 1 and min(m, n) = {min(m, n)}, but is {r}."
        )
