"""Causal attention over whole sequences: in blocks of queries, or by cuDNN on an NVIDIA GPU.

A query never sees later keys, so half of the score matrix is not needed. Each block of queries is
multiplied only with the keys up to the end of the block: with n blocks, (n + 1) / 2n of the score
matrix is computed, stored and normalised.

Shapes: as in :mod:`models.llama`; R query heads per key head, Q queries in a block, T keys.
"""

from __future__ import annotations

import math
import re
from typing import Literal

import jax
import jax.numpy as jnp

from models.layout import target_device
from models.precision import reduction_dtype

Array = jax.Array

# How attention is computed: in blocks of queries; as one full score matrix by XLA; by cuDNN's
# kernel, which never stores the scores; or "auto": by cuDNN where supported, in blocks elsewhere.
ATTENTION = ("auto", "blocks", "whole", "cudnn")

# Smaller blocks make products too narrow to be fast; each block is compiled separately, so their
# number is limited too.
_SMALLEST_BLOCK = 128
_MOST_BLOCKS = 16


def causal_attention(
    q_BxLxHxK: Array, k_BxLxGxK: Array, v_BxLxGxK: Array, method: str = "auto"
) -> Array:
    """Computes softmax attention of each position to itself and to earlier positions.

    Args:
        q_BxLxHxK: queries.
        k_BxLxGxK: keys; key head g serves query heads g H / G to (g + 1) H / G - 1.
        v_BxLxGxK: values.
        method: one of :data:`ATTENTION`. "cudnn" needs an NVIDIA GPU and 16-bit floats; "auto" is
            "cudnn" where it runs, "blocks" elsewhere.

    Returns:
        ``softmax(q k^T / sqrt(K)) v``, (B, L, H, K), in the dtype of the queries; reductions are in
        float32 or wider.

    Raises:
        ValueError: if ``method`` is "cudnn" and JAX does not run on a GPU.

    Example:
        >>> import jax
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 300, 4, 8))
        >>> whole = causal_attention(q, k, v, "whole")
        >>> bool(jnp.allclose(causal_attention(q, k, v), whole, atol=1e-5))
        True
    """
    if method == "auto":
        method = fastest_method(q_BxLxHxK.dtype, q_BxLxHxK.shape[-1])
    if method == "blocks":
        return _in_blocks(q_BxLxHxK, k_BxLxGxK, v_BxLxGxK)
    if method == "cudnn" and target_device().platform != "gpu":
        raise ValueError(
            "model.attention = 'cudnn' needs an NVIDIA GPU, but JAX runs on "
            f"{target_device().platform}; expected 'auto', 'blocks' or 'whole'."
        )
    implementation: Literal["cudnn", "xla"] = "cudnn" if method == "cudnn" else "xla"
    return jax.nn.dot_product_attention(
        q_BxLxHxK, k_BxLxGxK, v_BxLxGxK, is_causal=True, implementation=implementation
    )


def fastest_method(dtype: jax.typing.DTypeLike, head_size: int) -> str:
    """Returns "cudnn" if the device that is compiled for runs it, else "blocks".

    Args:
        dtype: dtype of queries, keys and values.
        head_size: K, the size of a head.

    Returns:
        "cudnn" on NVIDIA GPUs of compute capability 8.0 or higher, for 16-bit floats and a head
        size that is a multiple of 8 and at most 128 (256 from capability 9.0); else "blocks".

    Example:
        >>> fastest_method(jnp.float32, 64)
        'blocks'
    """
    if dtype not in (jnp.bfloat16, jnp.float16) or head_size % 8:
        return "blocks"
    capability = _compute_capability()
    largest_head = 256 if capability >= (9, 0) else 128
    return "cudnn" if capability >= (8, 0) and head_size <= largest_head else "blocks"


def _compute_capability() -> tuple[int, ...]:
    """Returns the device's compute capability, (9, 0) on an H100; () without NVIDIA GPU."""
    # AMD's GPUs have names such as "gfx90a" there, other devices nothing.
    found = re.fullmatch(r"(\d+)\.(\d+)", getattr(target_device(), "compute_capability", ""))
    return tuple(map(int, found.groups())) if found else ()


def _in_blocks(q_BxLxHxK: Array, k_BxLxGxK: Array, v_BxLxGxK: Array) -> Array:
    L, head_size = q_BxLxHxK.shape[1], q_BxLxHxK.shape[3]
    # Heads before positions, so that the entries of each head are contiguous in memory.
    k_BxGxLxK, v_BxGxLxK = (jnp.swapaxes(heads, 1, 2) for heads in (k_BxLxGxK, v_BxLxGxK))
    # Scaling the queries touches L K entries per head; scaling the scores would touch L^2.
    q_BxHxLxK = jnp.swapaxes(q_BxLxHxK, 1, 2) * jnp.asarray(head_size**-0.5, q_BxLxHxK.dtype)
    # The smallest multiple of the smallest block that makes at most `_MOST_BLOCKS` of them.
    size = _SMALLEST_BLOCK * math.ceil(L / (_SMALLEST_BLOCK * _MOST_BLOCKS))
    blocks = [
        _block(
            q_BxHxLxK[:, :, start : start + size],
            k_BxGxLxK[:, :, : start + size],
            v_BxGxLxK[:, :, : start + size],
        )
        for start in range(0, L, size)
    ]
    return jnp.swapaxes(jnp.concatenate(blocks, axis=2), 1, 2)


def _block(q_BxHxQxK: Array, k_BxGxTxK: Array, v_BxGxTxK: Array) -> Array:
    """Computes attention of the last Q of T positions to all T; queries are already scaled."""
    groups, keys, queries = k_BxGxTxK.shape[1], k_BxGxTxK.shape[2], q_BxHxQxK.shape[2]
    dtype = reduction_dtype(q_BxHxQxK.dtype)
    # Grouped queries share their keys by an axis of the product; keys are not repeated.
    if q_BxHxQxK.shape[1] != groups:
        grouped = (q_BxHxQxK.shape[0], groups, -1, *q_BxHxQxK.shape[2:])
        q, scores, mix = q_BxHxQxK.reshape(grouped), "bgrqk,bgtk->bgrqt", "bgrqt,bgtk->bgrqk"
    else:
        q, scores, mix = q_BxHxQxK, "bgqk,bgtk->bgqt", "bgqt,bgtk->bgqk"
    score = jnp.einsum(scores, q, k_BxGxTxK, preferred_element_type=dtype)
    # The queries are the last of the keys' positions; only this block's own square is cut.
    seen_QxT = jnp.arange(keys - queries, keys)[:, None] >= jnp.arange(keys)
    score = jnp.where(seen_QxT, score, jnp.finfo(dtype).min)
    # Softmax does not depend on what is subtracted, so no gradient flows through it.
    highest = jax.lax.stop_gradient(jnp.max(score, axis=-1, keepdims=True))
    weight = jnp.exp(score - highest)
    # Normalise after the product: K entries per query instead of T.
    total = jnp.sum(weight, axis=-1, keepdims=True)
    y = jnp.einsum(mix, weight.astype(v_BxGxTxK.dtype), v_BxGxTxK, preferred_element_type=dtype)
    return (y / total).astype(q_BxHxQxK.dtype).reshape(q_BxHxQxK.shape)
