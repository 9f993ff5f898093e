"""Next-token cross-entropy that never holds all logits of a large batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

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


def cross_entropy(
    x_NxD: Array, head_VxD: Array, targets_N: Array, mask_N: Array, chunk_size: int
) -> Array:
    """Sum of the masked cross-entropies of N tokens, computed ``chunk_size`` tokens at a time.

    The logits of one chunk exist at a time, in the forward and in the backward pass (where they
    are computed again): at 131,072 tokens and 32,000 ids all logits would take 17 GB in float32.

    Args:
        x_NxD: final hidden states, (N, D).
        head_VxD: output projection, (V, D).
        targets_N: token ids, int (N,).
        mask_N: weights, float (N,).
        chunk_size: tokens in a chunk, at least 1; N is padded to a multiple of it.

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
    N = x_NxD.shape[0]
    if chunk_size >= N:
        return _chunk_cross_entropy(x_NxD, head_VxD, targets_N, mask_N)
    padding = -N % chunk_size

    def chunked(array: Array) -> Array:
        width = [(0, padding)] + [(0, 0)] * (array.ndim - 1)
        return jnp.pad(array, width).reshape(-1, chunk_size, *array.shape[1:])

    @jax.checkpoint
    def add_chunk(total: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, None]:
        x_CxD, targets_C, mask_C = chunk
        return total + _chunk_cross_entropy(x_CxD, head_VxD, targets_C, mask_C), None

    chunks = (chunked(x_NxD), chunked(targets_N), chunked(mask_N))
    return jax.lax.scan(add_chunk, jnp.zeros([], reduction_dtype(x_NxD.dtype)), chunks)[0]


def _chunk_cross_entropy(x_CxD: Array, head_VxD: Array, targets_C: Array, mask_C: Array) -> Array:
    dtype = reduction_dtype(x_CxD.dtype)
    logits_CxV = jnp.matmul(x_CxD, head_VxD.T, preferred_element_type=dtype)
    log_partition_C = jax.nn.logsumexp(logits_CxV, axis=-1)
    target_logits_C = jnp.take_along_axis(logits_CxV, targets_C[:, None], axis=-1)[:, 0]
    return jnp.sum((log_partition_C - target_logits_C) * mask_C.astype(dtype))


def reduction_dtype(dtype: Any) -> Any:
    """The dtype to sum in: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def next_token_loss(model: Llama, batch: Batch) -> Array:
    """Sum of a batch's masked cross-entropies in nats; divide by ``batch.mask.sum()`` for the mean.

    The sum, so that micro-batches with different numbers of tokens add up to the right mean.
    """
    x_BxLxD = model.hidden_states(batch.inputs)
    return cross_entropy(
        x_BxLxD.reshape(-1, x_BxLxD.shape[-1]),
        model.head_VxD(),
        batch.targets.reshape(-1),
        batch.mask.reshape(-1),
        model.config.loss_chunk_size,
    )
