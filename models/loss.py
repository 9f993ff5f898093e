"""Next-token cross-entropy, computed in chunks so that the full logits never exist."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from models.layout import batch_ways, by_sequence
from models.precision import reduction_dtype

Array = jax.Array


class Batch(NamedTuple):
    """A batch for next-token prediction.

    The fields are JAX or NumPy arrays.

    Attributes:
        inputs: token ids, int32 (B, L).
        targets: the token that follows each input, int32 (B, L).
        mask: 1 where the target counts, 0 on padding, float32 (B, L).
    """

    inputs: Any
    targets: Any
    mask: Any


@jax.named_scope("loss")
def cross_entropy(x: Array, head_VxD: Array, targets: Array, mask: Array, chunk_size: int) -> Array:
    """Sums the masked cross-entropies of tokens, chunk by chunk.

    Only one chunk's logits exist at a time: the logits of 131,072 tokens over 32,000 ids would take
    17 GB in float32. When differentiated, each chunk's logits are turned into their gradient in the
    forward pass, so that no logits are computed twice: three products with the head, not four.

    Args:
        x: final hidden states, (..., L, D).
        head_VxD: output projection, (V, D).
        targets: token ids, int (..., L).
        mask: weights, float (..., L).
        chunk_size: tokens per chunk and device, at least 1. A chunk holds at least one position of
            every sequence, and L is padded to whole chunks.

    Returns:
        The sum over tokens of ``mask * -log softmax(x head^T)[target]`` in nats, a scalar in
        float32 (float64 for float64 inputs). Only reverse-mode gradients are defined; the gradient
        of the logits is rounded to the dtype of ``x``, that of the head is accumulated in the dtype
        of the loss.

    Example:
        >>> import jax.numpy as jnp
        >>> x, head = jnp.zeros((3, 4)), jnp.zeros((8, 4))
        >>> loss = cross_entropy(x, head, jnp.array([0, 1, 2]), jnp.array([1.0, 1.0, 0.0]), 2)
        >>> round(float(loss), 4)  # 2 log 8
        4.1589
    """
    # Chunks are cut along the sequence, so that each holds tokens of every sequence, and devices
    # that share a batch share every chunk.
    sequences = max(math.prod(targets.shape[:-1]), 1)
    # `chunk_size` is per device: sharded over n devices, a chunk has n times as many tokens.
    positions = max(chunk_size * batch_ways() // sequences, 1)
    return _cross_entropy(min(positions, targets.shape[-1]), x, head_VxD, targets, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(positions: int, x: Array, head_VxD: Array, targets: Array, mask: Array) -> Array:
    def add_chunk(total: Array, chunk: tuple[Array, ...]) -> tuple[Array, None]:
        x, targets, mask = chunk
        loss_N = _log_partition_and_loss(_logits(x, head_VxD), targets.reshape(-1))[1]
        return total + jnp.sum(loss_N * mask.reshape(-1)), None

    chunks = tuple(_chunked(array, positions, targets.ndim - 1) for array in (x, targets, mask))
    return jax.lax.scan(add_chunk, jnp.zeros([], reduction_dtype(x.dtype)), chunks)[0]


def _forward(
    positions: int, x: Array, head_VxD: Array, targets: Array, mask: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    """Computes the loss and its gradients by x, head and mask: all that the backward pass needs."""
    dtype = reduction_dtype(x.dtype)

    def add_chunk(sums: tuple[Array, Array], chunk: tuple[Array, ...]) -> Any:
        total, d_head_VxD = sums
        x, targets, mask = chunk
        targets_N, mask_N = targets.reshape(-1), mask.reshape(-1).astype(dtype)
        logits_NxV = _logits(x, head_VxD)
        log_partition_N, loss_N = _log_partition_and_loss(logits_NxV, targets_N)
        # Gradient of the logits: softmax minus one-hot target.
        # A comparison, which XLA fuses with the subtraction; a scatter would write all logits once
        # more.
        is_target_NxV = targets_N[:, None] == jnp.arange(logits_NxV.shape[1])
        d_logits_NxV = jnp.exp(logits_NxV - log_partition_N[:, None]) - is_target_NxV
        d_logits_NxV = (d_logits_NxV * mask_N[:, None]).astype(x.dtype)
        # Sharded like the logits, so that no device holds the gradient for all ids.
        d_logits_NxV = by_sequence(d_logits_NxV, split_axis=-1)
        d_x = by_sequence((d_logits_NxV @ head_VxD).reshape(x.shape))
        d_head_VxD += jnp.einsum(
            "nv,nd->vd", d_logits_NxV, x.reshape(-1, x.shape[-1]), preferred_element_type=dtype
        )
        total += jnp.sum(loss_N * mask_N)
        # The loss is linear in the mask: its gradient by the mask is each token's loss.
        return (total, d_head_VxD), (d_x, loss_N.reshape(mask.shape))

    axis, L = targets.ndim - 1, targets.shape[-1]
    # Padding has mask 0: it adds nothing to the loss or to the gradient of the head.
    chunks = tuple(_chunked(array, positions, axis) for array in (x, targets, mask))
    # The head's gradient is carried and accumulated in place; that of x is cut like x.
    zeros = (jnp.zeros([], dtype), jnp.zeros(head_VxD.shape, dtype))
    (total, d_head_VxD), by_chunk = jax.lax.scan(add_chunk, zeros, chunks)
    d_x, d_mask = (_whole(array, L, axis) for array in by_chunk)
    return total, (d_x, d_head_VxD.astype(head_VxD.dtype), d_mask.astype(mask.dtype))


def _backward(positions: int, changes: tuple[Array, Array, Array], scale: Array) -> tuple:
    # The gradients were computed for a derivative of 1, and are linear in it.
    d_x, d_head_VxD, d_mask = ((scale * change).astype(change.dtype) for change in changes)
    return d_x, d_head_VxD, None, d_mask


_cross_entropy.defvjp(_forward, _backward)


def _chunked(array: Array, positions: int, axis: int) -> Array:
    """Cuts an array into chunks along a new first axis; the last one is padded with zeros."""
    width = [(0, 0)] * array.ndim
    width[axis] = (0, -array.shape[axis] % positions)
    array = jnp.pad(array, width)
    shape = (*array.shape[:axis], -1, positions, *array.shape[axis + 1 :])
    return jnp.moveaxis(array.reshape(shape), axis, 0)


def _whole(chunks: Array, length: int, axis: int) -> Array:
    """Joins chunks and removes the padding."""
    array = jnp.moveaxis(chunks, 0, axis)
    array = array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])
    return jax.lax.slice_in_dim(array, 0, length, axis=axis)


def _logits(x: Array, head_VxD: Array) -> Array:
    """Returns the logits of a chunk, (N, V), in the reduction dtype."""
    x_NxD = by_sequence(x).reshape(-1, x.shape[-1])
    dtype = reduction_dtype(x.dtype)
    logits_NxV = jnp.matmul(x_NxD, head_VxD.T, preferred_element_type=dtype)
    return by_sequence(logits_NxV, split_axis=-1)


def _log_partition_and_loss(logits_NxV: Array, targets_N: Array) -> tuple[Array, Array]:
    log_partition_N = jax.nn.logsumexp(logits_NxV, axis=-1)
    target_logits_N = jnp.take_along_axis(logits_NxV, targets_N[:, None], axis=-1)[:, 0]
    return log_partition_N, log_partition_N - target_logits_N


class LanguageModel(Protocol):
    """The interface of a model that the loss uses, for example :class:`models.llama.Llama`.

    Attributes:
        config: its ``loss_chunk_size`` is the number of tokens whose logits exist at a time.
    """

    config: Any

    def hidden_states(self, ids: Array) -> Array:
        """Returns the final hidden states of token ids (B, L), (B, L, D)."""

    def head_VxD(self) -> Array:
        """Returns the output projection, (V, D)."""


def next_token_loss(model: LanguageModel, batch: Batch) -> Array:
    """Sums a batch's masked cross-entropies in nats; divide by ``batch.mask.sum()`` for the mean.

    A sum, so that micro-batches with different numbers of tokens add up to the correct mean.
    """
    return cross_entropy(
        model.hidden_states(batch.inputs),
        model.head_VxD(),
        batch.targets,
        batch.mask,
        model.config.loss_chunk_size,
    )
