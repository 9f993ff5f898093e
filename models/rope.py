"""Rotary positions: each pair of a head's entries is turned by an angle that grows with position.

A model trained on short sequences can be asked for longer ones by turning its slow pairs slower
still; checkpoints that were made so say how (``rope_scaling``).
"""

# No `from __future__ import annotations` here: the command line reads the fields' types.

import dataclasses
import math

import jax
import jax.numpy as jnp

from loro_jax.fields import at_least, check, field, one_of
from models.precision import reduction_dtype

Array = jax.Array

KINDS = ("none", "linear", "llama3")


@dataclasses.dataclass(unsafe_hash=True)
class RopeScaling:
    """How rotary frequencies are slowed down for sequences longer than those of pretraining."""

    kind: str = field(
        "none",
        one_of(KINDS),
        "none, linear (all divided by factor), or llama3 (low ones divided by factor, high ones "
        "kept, interpolated between)",
    )
    factor: float = field(1.0, at_least(1), "divisor of the frequencies")
    low_frequency: float = field(
        1.0,
        None,
        "llama3: frequencies with fewer rotations than this per original_length are low",
    )
    high_frequency: float = field(
        4.0, None, "llama3: frequencies with more rotations than this are high"
    )
    original_length: int = field(8192, at_least(1), "llama3: sequence length of pretraining")

    def validate(self) -> None:
        """Raises ValueError, naming field, value and what was expected."""
        check(self, "model.rope_scaling.")
        if not 0 < self.low_frequency < self.high_frequency:
            raise ValueError(
                "model.rope_scaling.low_frequency must be above 0 and below high_frequency = "
                f"{self.high_frequency}, but is {self.low_frequency}."
            )


def frequencies(head_size: int, theta: float, scaling: RopeScaling) -> Array:
    """Radians per position of each pair of a head's entries, shape (head_size / 2,), float32.

    Args:
        head_size: entries of a head.
        theta: base; pair i turns by ``theta^(-2 i / head_size)`` a position.
        scaling: what slows them down.

    Returns:
        Frequencies, the fastest first.

    Example:
        >>> [round(float(f), 3) for f in frequencies(4, 100.0, RopeScaling("linear", 2.0))]
        [0.5, 0.05]

    Source: Su et al., "RoFormer", arXiv 2104.09864; "llama3" as in Meta's llama-models.
    """
    half = head_size // 2
    plain = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling.kind == "none":
        return plain
    slowed = plain / scaling.factor
    if scaling.kind == "linear":
        return slowed
    turns = scaling.original_length * plain / (2 * math.pi)
    fast = (turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
    fast = jnp.clip(fast, 0.0, 1.0)
    return fast * plain + (1 - fast) * slowed


def rotary_embedding(x_BxLxHxK: Array, positions: Array, frequencies_K: Array) -> Array:
    """Turns each pair (k, k + K/2) of a head's entries by its frequency times the position.

    Args:
        x_BxLxHxK: queries or keys.
        positions: of the tokens, (L,), or (B, L) where rows differ.
        frequencies_K: from :func:`frequencies`, (K / 2,).

    Returns:
        Array like ``x_BxLxHxK``.
    """
    angles = positions[..., None].astype(jnp.float32) * frequencies_K
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    x32 = x_BxLxHxK.astype(reduction_dtype(x_BxLxHxK.dtype))
    first, second = jnp.split(x32, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BxLxHxK.dtype)
