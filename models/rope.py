"""Rotary embeddings: each pair of a head's entries is rotated by an angle proportional to position.

A model trained on short sequences can be extended to longer ones by lowering its low frequencies
further; checkpoints extended in this way say how (``rope_scaling``).
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
    """Scaling of rotary frequencies for sequences longer than those of pretraining."""

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
        """Raises ValueError for an invalid field; it names field, value and expectation."""
        check(self, "model.rope_scaling.")
        if not 0 < self.low_frequency < self.high_frequency:
            raise ValueError(
                "model.rope_scaling.low_frequency must be above 0 and below high_frequency = "
                f"{self.high_frequency}, but is {self.low_frequency}."
            )


def frequencies(head_size: int, theta: float, scaling: RopeScaling) -> Array:
    """Returns the rotary frequencies in radians per position, (head_size / 2,), float32.

    Args:
        head_size: K, the size of a head.
        theta: base; pair i rotates by ``theta^(-2 i / head_size)`` per position.
        scaling: scaling for longer sequences.

    Returns:
        Frequencies, the highest first.

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
    # llama3: by rotations per original_length, from slowed (low) to unchanged (high frequencies).
    turns = scaling.original_length * plain / (2 * math.pi)
    fast = (turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
    fast = jnp.clip(fast, 0.0, 1.0)
    return fast * plain + (1 - fast) * slowed


def rotary_embedding(x_BxLxHxK: Array, positions: Array, frequencies_K: Array) -> Array:
    """Rotates each pair (k, k + K/2) of a head's entries by its frequency times the position.

    Args:
        x_BxLxHxK: queries or keys.
        positions: positions of the tokens, (L,), or (B, L) if rows differ.
        frequencies_K: from :func:`frequencies`, (K / 2,).

    Returns:
        Array like ``x_BxLxHxK``.
    """
    # In float32 whatever the activations have: bfloat16 holds whole numbers only up to 256.
    angles = positions[..., None].astype(jnp.float32) * frequencies_K
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    x32 = x_BxLxHxK.astype(reduction_dtype(x_BxLxHxK.dtype))
    # Pairs of halves, as in Hugging Face's format; Meta's pairs neighbours.
    first, second = jnp.split(x32, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BxLxHxK.dtype)
