"""What decoding keeps of the past: keys and values, or the latents that they are made of.

A projection of rank r passes r entries of a token to its second factor. Where a head count times
head size, G K, is larger, keeping these takes less memory, and less to read in each step:

* full: keys, turned by their positions, and values: 2 G K entries a token and layer;
* values: keys and the latents of values, G K + r. A query's weights sum latents, and the second
  factor maps the sums: values are never made, but each head sums r entries in place of K;
* latent: latents of both, 2 r. Keys are made again from theirs in every step, for each must be
  turned by its position before it meets a query: r G K multiplications a token of the past. It is
  for memory, not for speed.

Shapes: as in :mod:`models.llama`; T slots of the cache, N layers, M = L H / G queries of a head of
keys.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from loro_jax.layers.packing import as_low_rank
from loro_jax.layers.projections import PROJECTIONS
from models.llama import Attention, LlamaConfig
from models.precision import reduction_dtype

Array = jax.Array

CACHES = ("full", "values", "latent")


class Cache(NamedTuple):
    """The past of all layers.

    Attributes:
        keys: turned by their positions, (N, B, G, T, K): each head's lie together, as its products
            with a query read them; or latents, (N, B, T, r).
        values: likewise.
    """

    keys: Array
    values: Array

    @property
    def slots(self) -> int:
        """T, the number of tokens it has room for."""
        return self.keys.shape[-2]

    @property
    def latent(self) -> tuple[bool, bool]:
        """Of keys and of values: whether latents are kept."""
        return _latent(self.keys), _latent(self.values)


def empty_cache(config: LlamaConfig, batch_size: int, length: int, kind: str = "full") -> Cache:
    """A cache of zeros.

    Args:
        config: the model's.
        batch_size: B.
        length: T.
        kind: what is kept, one of :data:`CACHES`.

    Returns:
        The cache, in the dtype of the activations.

    Raises:
        ValueError: for another kind, or if latents are to be kept where projections have none.

    Example:
        >>> config = LlamaConfig(hidden_size=32, num_layers=2, num_heads=4, rank=8)
        >>> cache = empty_cache(config, batch_size=3, length=5, kind="values")
        >>> cache.keys.shape, cache.values.shape
        ((2, 3, 4, 5, 8), (2, 3, 5, 8))
    """
    if kind not in CACHES:
        raise ValueError(f"cache must be one of {', '.join(CACHES)}, but is {kind!r}.")
    rank = config.group_rank("attn")
    if kind != "full" and (rank is None or not PROJECTIONS[config.projection].through_rank):
        found = "are dense" if rank is None else f"are of kind {config.projection!r}"
        raise ValueError(
            f"cache={kind} keeps what passes through the rank of the projections of keys and "
            f"values, but these {found}; expected cache=full."
        )
    heads = (config.num_layers, batch_size, config.kv_heads, length, config.head_size)
    latents = (config.num_layers, batch_size, length, rank)
    zeros = functools.partial(jnp.zeros, dtype=jnp.dtype(config.dtype))
    return Cache(
        keys=zeros(latents if kind == "latent" else heads),
        values=zeros(heads if kind == "full" else latents),
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
    """The cache with a layer's new tokens in it.

    Args:
        attention: of the layer.
        k_BxLxC: outputs of its projection of keys, or latents if the cache keeps these.
        v_BxLxC: likewise of values.
        positions_BxL: of the tokens.
        cache: the cache before.
        layer: the layer's number.
        slot: where the first of the tokens goes.

    Returns:
        The new cache; compiled with the old one donated, it is written in place.
    """
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
    """Softmax attention of queries to the slots that they see; weights in float32.

    Args:
        attention: of the layer.
        q_BxLxHxK: queries, turned.
        cache: with the tokens of the queries in it.
        layer: the layer's number.
        positions_BxT: of the slots.
        seen_BxLxT: which slots a query sees.

    Returns:
        Array like ``q_BxLxHxK``.
    """
    B, L, H, K = q_BxLxHxK.shape
    keys, values = cache.keys[layer], cache.values[layer]
    if _latent(cache.keys):
        k_BxTxC = as_low_rank(attention.k).up(keys)
        k_BxGxTxK = attention.turned_heads(k_BxTxC, positions_BxT).swapaxes(1, 2)
    else:
        k_BxGxTxK = keys
    G = k_BxGxTxK.shape[1]
    dtype = reduction_dtype(q_BxLxHxK.dtype)
    q_BxGxKxM = q_BxLxHxK.reshape(B, L, G, -1, K).transpose(0, 2, 4, 1, 3).reshape(B, G, K, -1)
    # Keys on the left: on the right, XLA's CPU backend would write a transposed copy of them.
    scores_BxGxTxM = _wide_product(k_BxGxTxK, q_BxGxKxM, dtype)
    scores_BxGxMxT = scores_BxGxTxM.mT * K**-0.5
    seen_Bx1xMxT = jnp.repeat(seen_BxLxT, H // G, axis=1)[:, None]
    scores_BxGxMxT = jnp.where(seen_Bx1xMxT, scores_BxGxMxT, jnp.finfo(dtype).min)
    weights_BxGxMxT = jax.nn.softmax(scores_BxGxMxT).astype(values.dtype)
    if _latent(cache.values):
        # One set of latents for all heads: sum them by every head's weights, then map the sums.
        sums_BxQxR = weights_BxGxMxT.reshape(B, -1, cache.slots) @ values
        B_GxKxR = as_low_rank(attention.v).B[...].astype(q_BxLxHxK.dtype).reshape(G, K, -1)
        sums_BxGxMxR = sums_BxQxR.reshape(B, G, -1, sums_BxQxR.shape[-1])
        y_BxGxMxK = jnp.einsum("bgmr,gkr->bgmk", sums_BxGxMxR, B_GxKxR)
    else:
        y_BxGxMxK = weights_BxGxMxT @ values
    y_BxLxGxRxK = y_BxGxMxK.reshape(B, G, L, -1, K).transpose(0, 2, 1, 3, 4)
    return y_BxLxGxRxK.reshape(B, L, H, K)


def _wide_product(a: Array, b: Array, dtype: Any) -> Array:
    """The matrix product ``a @ b``, summed and returned in a dtype that may be wider than theirs.

    XLA's CPU backend has no product of two bfloat16 arrays with a float32 result in all layouts
    ("DotThunk ... BF16 x BF16 = F32"); there, operands are widened before, which changes no value.
    """
    if a.dtype == dtype:
        return a @ b
    return jax.lax.platform_dependent(
        a,
        b,
        cpu=lambda a, b: a.astype(dtype) @ b.astype(dtype),
        default=lambda a, b: jnp.matmul(a, b, preferred_element_type=dtype),
    )


def _latent(half: Array) -> bool:
    """Whether this half of a cache holds latents; heads have an axis more."""
    return half.ndim == 4


def _written(past: Array, new: Array, layer: Array, slot: Array | int) -> Array:
    """A half of the cache with a layer's new tokens, (B, [G,] L, K or r), in it."""
    start = (layer, *(0,) * (past.ndim - 3), slot, 0)
    return jax.lax.dynamic_update_slice(past, new[None].astype(past.dtype), start)
