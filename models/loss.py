"""Next-token cross-entropy that never holds all logits of a large batch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from models.layout import batch_ways, by_sequence

if TYPE_CHECKING:
    from models.llama import Llama

Array = jax.Array


class Batch(NamedTuple):
    """One batch of next-token prediction.

    Its fields are JAX or NumPy arrays.

    Attributes:
        inputs: token ids, int32 (B, L).
        targets: the token that follows each input, int32 (B, L).
        mask: 1 where the target counts, 0 on padding, float32 (B, L).
    """

    inputs: Any
    targets: Any
    mask: Any


def cross_entropy(x: Array, head_VxD: Array, targets: Array, mask: Array, chunk_size: int) -> Array:
    """Sum of the masked cross-entropies of tokens, some of them computed at a time.

    The logits of one chunk exist at a time, in the forward and in the backward pass (where they
    are computed again): at 131,072 tokens and 32,000 ids all logits would take 17 GB in float32.
    Chunks are cut along the sequence, so that each holds tokens of every sequence, and devices
    that share a batch share every chunk.

    Args:
        x: final hidden states, (..., L, D).
        head_VxD: output projection, (V, D).
        targets: token ids, int (..., L).
        mask: weights, float (..., L).
        chunk_size: tokens in a chunk, at least 1; on several devices, on each of them. A chunk
            holds one position of every sequence at least, and L is padded to whole chunks.

    Returns:
        The sum over tokens of ``mask * -log softmax(x head^T)[target]`` in nats, a scalar in
        float32 (float64 for float64 inputs).

    Example:
        >>> import jax.numpy as jnp
        >>> x, head = jnp.zeros((3, 4)), jnp.zeros((8, 4))
        >>> loss = cross_entropy(x, head, jnp.array([0, 1, 2]), jnp.array([1.0, 1.0, 0.0]), 2)
        >>> round(float(loss), 4)  # 2 log 8
        4.1589
    """
    axis, L = targets.ndim - 1, targets.shape[-1]
    sequences = max(math.prod(targets.shape[:-1]), 1)
    positions = max(chunk_size * batch_ways() // sequences, 1)
    if positions >= L:
        return _chunk_cross_entropy(x, head_VxD, targets, mask)

    def chunked(array: Array) -> Array:
        width = [(0, 0)] * array.ndim
        width[axis] = (0, -L % positions)
        array = jnp.pad(array, width)
        shape = (*array.shape[:axis], -1, positions, *array.shape[axis + 1 :])
        return jnp.moveaxis(array.reshape(shape), axis, 0)

    @jax.checkpoint
    def add_chunk(total: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, None]:
        x, targets, mask = chunk
        return total + _chunk_cross_entropy(by_sequence(x), head_VxD, targets, mask), None

    chunks = (chunked(x), chunked(targets), chunked(mask))
    return jax.lax.scan(add_chunk, jnp.zeros([], reduction_dtype(x.dtype)), chunks)[0]


def _chunk_cross_entropy(x: Array, head_VxD: Array, targets: Array, mask: Array) -> Array:
    dtype = reduction_dtype(x.dtype)
    x_NxD = x.reshape(-1, x.shape[-1])
    logits_NxV = jnp.matmul(x_NxD, head_VxD.T, preferred_element_type=dtype)
    logits_NxV = by_sequence(logits_NxV, split_axis=-1)
    targets_N, mask_N = targets.reshape(-1), mask.reshape(-1)
    log_partition_N = jax.nn.logsumexp(logits_NxV, axis=-1)
    target_logits_N = jnp.take_along_axis(logits_NxV, targets_N[:, None], axis=-1)[:, 0]
    return jnp.sum((log_partition_N - target_logits_N) * mask_N.astype(dtype))


def reduction_dtype(dtype: Any) -> Any:
    """The dtype to sum in: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def next_token_loss(model: Llama, batch: Batch) -> Array:
    """Sum of a batch's masked cross-entropies in nats; divide by ``batch.mask.sum()`` for the mean.

    The sum, so that micro-batches with different numbers of tokens add up to the right mean.
    """
    return cross_entropy(
        model.hidden_states(batch.inputs),
        model.head_VxD(),
        batch.targets,
        batch.mask,
        model.config.loss_chunk_size,
    )
