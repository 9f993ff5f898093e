"""Key-value cache for decoding: keys and values, or the latents they are computed from.

A projection of rank r passes r entries per token to its second factor. Where r is smaller than the
number of heads times their size, G K, caching these latents takes less memory, and less memory is
read in each step:

* full: rotated keys, and values: 2 G K entries per token and layer;
* values: rotated keys, and latents of the values: G K + r entries. Attention weights sum the
  latents, and the second factor maps the sums. Values are never computed, but each head sums r
  entries instead of K;
* latent: latents of both: 2 r entries. Keys are recomputed from them in every step, because each
  must be rotated by its position before it is multiplied with a query: r G K multiplications per
  cached token. It saves memory, not time.

Shapes: as in :mod:`models.llama`; T slots of the cache, N layers, M = L H / G queries per key head.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from loro_jax.layers.packing import as_low_rank
from loro_jax.layers.projections import PROJECTIONS
from models.config import LlamaConfig
from models.crossing import crosses
from models.llama import Attention
from models.precision import reduction_dtype

Array = jax.Array

CACHES = ("full", "values", "latent")


class Cache(NamedTuple):
    """Key-value cache of all layers.

    Attributes:
        keys: rotated keys, (N, B, G, T, K), contiguous per head, as the products with queries read
            them; or latents, (N, B, T, r).
        values: values, (N, B, G, T, K), or latents, (N, B, T, r).
    """

    keys: Array
    values: Array

    @property
    def slots(self) -> int:
        """T, the capacity in tokens."""
        return self.keys.shape[-2]

    @property
    def latent(self) -> tuple[bool, bool]:
        """Whether latents are cached, for keys and for values."""
        return _latent(self.keys), _latent(self.values)


def empty_cache(config: LlamaConfig, batch_size: int, length: int, kind: str = "full") -> Cache:
    """Creates a cache of zeros.

    Args:
        config: config of the model.
        batch_size: B.
        length: T.
        kind: what is cached, one of :data:`CACHES`.

    Returns:
        The cache, in the dtype of the activations.

    Raises:
        ValueError: for an unknown kind, or for latents that do not determine keys and values.

    Example:
        >>> config = LlamaConfig(hidden_size=32, num_layers=2, num_heads=4, rank=8)
        >>> cache = empty_cache(config, batch_size=3, length=5, kind="values")
        >>> cache.keys.shape, cache.values.shape
        ((2, 3, 4, 5, 8), (2, 3, 5, 8))
    """
    if kind not in CACHES:
        raise ValueError(f"cache must be one of {', '.join(CACHES)}, but is {kind!r}.")
    ranks = [config.projection_rank(name) for name in ("k", "v")]
    rank = None if None in ranks else ranks[0]
    # Of a kind that adds other terms, the latent does not determine the output.
    if kind != "full" and (rank is None or not PROJECTIONS[config.projection].through_rank):
        found = "are dense" if rank is None else f"are of kind {config.projection!r}"
        raise ValueError(
            f"cache={kind} keeps the latents of the key and value projections, "
            f"but these {found}; expected cache=full."
        )
    if kind != "full" and crosses(config, "attn"):
        raise ValueError(
            f"cache={kind} keeps the latents of the key and value projections, but with "
            f"model.cross_layer = {config.cross_layer} these do not determine keys and values; "
            "expected cache=full."
        )
    heads = (config.num_layers, batch_size, config.kv_heads, length, config.head_size)
    k_latents, v_latents = ((config.num_layers, batch_size, length, rank) for rank in ranks)
    zeros = functools.partial(jnp.zeros, dtype=jnp.dtype(config.dtype))
    return Cache(
        keys=zeros(k_latents if kind == "latent" else heads),
        values=zeros(heads if kind == "full" else v_latents),
    )


def remember(
    attention: Attention,
    k_BxLxC: Array,
    v_BxLxC: Array,
    positions_BxL: Array,
    cache: Cache,
    layer: Array,
    slot: Array | int,
) -> Cache:
    """Writes the keys and values of new tokens of one layer into the cache.

    Args:
        attention: attention module of the layer.
        k_BxLxC: outputs of its key projection, or their latents if the cache keeps latents.
        v_BxLxC: outputs of its value projection, or their latents.
        positions_BxL: positions of the tokens.
        cache: the cache to write to.
        layer: index of the layer.
        slot: slot of the first token.

    Returns:
        The new cache; written in place if compiled with ``cache`` donated.
    """
    # A position never changes: keys are rotated once, when they are written.
    if not _latent(cache.keys):
        k_BxLxC = attention.turned_heads(k_BxLxC, positions_BxL).swapaxes(1, 2)
    if not _latent(cache.values):
        v_BxLxC = attention.heads(v_BxLxC).swapaxes(1, 2)
    halves = zip(cache, (k_BxLxC, v_BxLxC), strict=True)
    return Cache(*(_written(past, new, layer, slot) for past, new in halves))


def attend(
    attention: Attention,
    q_BxLxHxK: Array,
    cache: Cache,
    layer: Array,
    positions_BxT: Array,
    seen_BxLxT: Array,
) -> Array:
    """Computes softmax attention of queries to cached tokens; weights in float32.

    Args:
        attention: attention module of the layer.
        q_BxLxHxK: rotated queries.
        cache: cache that already holds the tokens of the queries.
        layer: index of the layer.
        positions_BxT: positions of the slots.
        seen_BxLxT: which slots each query attends to.

    Returns:
        Array like ``q_BxLxHxK``.
    """
    B, L, H, K = q_BxLxHxK.shape
    keys, values = cache.keys[layer], cache.values[layer]
    if _latent(cache.keys):
        # Rotation acts on keys, not on latents: recompute the keys of all slots.
        k_BxTxC = as_low_rank(attention.k).up(keys)
        k_BxGxTxK = attention.turned_heads(k_BxTxC, positions_BxT).swapaxes(1, 2)
    else:
        k_BxGxTxK = keys
    G = k_BxGxTxK.shape[1]
    dtype = reduction_dtype(q_BxLxHxK.dtype)
    # M merges the positions with the query heads of a key head: one product per key head.
    q_BxGxKxM = q_BxLxHxK.reshape(B, L, G, -1, K).transpose(0, 2, 4, 1, 3).reshape(B, G, K, -1)
    # Keys on the left: on the right, XLA's CPU backend would copy and transpose them.
    scores_BxGxTxM = _wide_product(k_BxGxTxK, q_BxGxKxM, dtype)
    scores_BxGxMxT = scores_BxGxTxM.mT * K**-0.5
    # Each row of the mask once for each query head of a key head, in M's order: positions first.
    seen_Bx1xMxT = jnp.repeat(seen_BxLxT, H // G, axis=1)[:, None]
    scores_BxGxMxT = jnp.where(seen_Bx1xMxT, scores_BxGxMxT, jnp.finfo(dtype).min)
    weights_BxGxMxT = jax.nn.softmax(scores_BxGxMxT).astype(values.dtype)
    if _latent(cache.values):
        # All heads share one set of latents: sum them with each head's weights, then map the sums.
        sums_BxQxR = weights_BxGxMxT.reshape(B, -1, cache.slots) @ values
        # Rows of B are the outputs of the value projection: K for each key head.
        B_GxKxR = as_low_rank(attention.v).B[...].astype(q_BxLxHxK.dtype).reshape(G, K, -1)
        sums_BxGxMxR = sums_BxQxR.reshape(B, G, -1, sums_BxQxR.shape[-1])
        y_BxGxMxK = jnp.einsum("bgmr,gkr->bgmk", sums_BxGxMxR, B_GxKxR)
    else:
        y_BxGxMxK = weights_BxGxMxT @ values
    y_BxLxGxRxK = y_BxGxMxK.reshape(B, G, L, -1, K).transpose(0, 2, 1, 3, 4)
    return y_BxLxGxRxK.reshape(B, L, H, K)


def _wide_product(a: Array, b: Array, dtype: Any) -> Array:
    """Returns ``a @ b``, accumulated and returned in ``dtype``, which may be wider."""
    if a.dtype == dtype:
        return a @ b
    # XLA's CPU backend lacks products of two bfloat16 arrays with a float32 result in some layouts
    # ("DotThunk ... BF16 x BF16 = F32"); there, operands are cast first, which is exact.
    return jax.lax.platform_dependent(
        a,
        b,
        cpu=lambda a, b: a.astype(dtype) @ b.astype(dtype),
        default=lambda a, b: jnp.matmul(a, b, preferred_element_type=dtype),
    )


def _latent(half: Array) -> bool:
    """Returns whether this half of a cache holds latents; heads have one more axis."""
    return half.ndim == 4


def _written(past: Array, new: Array, layer: Array, slot: Array | int) -> Array:
    """Writes a layer's new tokens, (B, [G,] L, K or r), into a half of the cache."""
    # Layers first and slots second to last, with or without an axis of heads.
    start = (layer, *(0,) * (past.ndim - 3), slot, 0)
    return jax.lax.dynamic_update_slice(past, new[None].astype(past.dtype), start)
