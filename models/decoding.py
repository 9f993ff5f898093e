"""Text from a model, one token at a time, with the keys and values of the past kept.

Prompts of different lengths are padded on the left, so that all rows write to the same slot of the
cache; a row's positions count from its first token. Projections stay what they are: a low-rank one
multiplies by its factors when decoding, too.

Shapes: as in :mod:`models.llama`; T slots of the cache, N layers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.cache import Cache, attend, empty_cache, remember
from models.linear import Shared, can_share
from models.llama import Llama
from models.loss import reduction_dtype
from models.sampling import GREEDY, Sampling, next_tokens

Array = jax.Array

# Prompts are padded to a multiple, so that those of similar lengths share a compiled program.
_PROMPT_MULTIPLE = 32


def for_decoding(model: Llama) -> Llama:
    """A model whose projections of one input are read as one matrix, which is faster.

    Args:
        model: the model; it stays as it is.

    Returns:
        The same model for :func:`extend`; parameters that were not put together are shared. It has
        no A's of q, k, v, gate and up of its own (nor their W's), so nothing else can be done with
        it. Kinds of projections that add to their product, as "lora", stay apart.

    Example:
        >>> from models import LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2,
        ...                      num_heads=4, rank=8)
        >>> for_decoding(Llama(config, nnx.Rngs(0))).blocks.attention.shared.matrix.shape
        (2, 24, 32)
    """
    together = nnx.merge(*nnx.split(model))
    attention, mlp = together.blocks.attention, together.blocks.mlp
    if can_share([attention.q, mlp.gate]):
        attention.shared = Shared([attention.q, attention.k, attention.v])
        mlp.shared = Shared([mlp.gate, mlp.up])
    return together


def extend(
    model: Llama, tokens_BxL: Array, cache: Cache, slot: Array | int, padding_B: Array
) -> tuple[Array, Cache]:
    """Reads tokens behind those in the cache.

    Args:
        model: the model.
        tokens_BxL: token ids.
        cache: of the tokens before.
        slot: where the first of the tokens goes, the same in all rows.
        padding_B: slots of each row before its first token.

    Returns:
        (logits behind the last token (B, V), float32, and the cache with these tokens).

    Example:
        >>> from models import LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2,
        ...                      num_heads=4, rank=8)
        >>> model, tokens = Llama(config, nnx.Rngs(0)), jnp.array([[5, 6, 7]])
        >>> logits, _ = extend(model, tokens, empty_cache(config, 1, 4), 0, jnp.array([0]))
        >>> bool(jnp.allclose(logits, model(tokens)[:, -1], atol=1e-5))
        True
    """
    slots_L = slot + jnp.arange(tokens_BxL.shape[1])
    slots_T = jnp.arange(cache.slots)
    positions_BxT = jnp.maximum(slots_T - padding_B[:, None], 0)
    positions_BxL = jnp.maximum(slots_L - padding_B[:, None], 0)
    seen_BxLxT = (slots_T <= slots_L[:, None]) & (slots_T >= padding_B[:, None, None])
    x_BxLxD = model.embedding[...][tokens_BxL].astype(jnp.dtype(model.config.dtype))
    graphdef, stacked = nnx.split(model.blocks)

    def layer(carry: tuple[Array, Cache], inputs: tuple[Array, nnx.State]) -> Any:
        # The cache is carried, and written in place; as an output it would be copied every time.
        x_BxLxD, cache = carry
        number, params = inputs
        block = nnx.merge(graphdef, params)
        attention, h_BxLxD = block.attention, block.attention_norm(x_BxLxD)
        q_BxLxC, k_BxLxC, v_BxLxC = attention.project(h_BxLxD, (False, *cache.latent))
        cache = remember(attention, k_BxLxC, v_BxLxC, positions_BxL, cache, number, slot)
        q_BxLxHxK = attention.turned_heads(q_BxLxC, positions_BxL)
        y_BxLxHxK = attend(attention, q_BxLxHxK, cache, number, positions_BxT, seen_BxLxT)
        x_BxLxD = x_BxLxD + attention.o(y_BxLxHxK.reshape(*x_BxLxD.shape[:2], -1))
        return (x_BxLxD + block.mlp(block.mlp_norm(x_BxLxD)), cache), None

    layers = (jnp.arange(model.config.num_layers), stacked)
    (x_BxLxD, cache), _ = jax.lax.scan(layer, (x_BxLxD, cache), layers)
    last_BxD = model.norm(x_BxLxD[:, -1])
    dtype = reduction_dtype(last_BxD.dtype)
    return jnp.matmul(last_BxD, model.head_VxD().T, preferred_element_type=dtype), cache


@functools.partial(jax.jit, static_argnums=(0, 7), donate_argnums=3)
def _step(
    graphdef: Any,
    state: Any,
    tokens_BxL: Array,
    cache: Cache,
    slot: Array,
    padding_B: Array,
    key: Array,
    sampling: Sampling,
) -> tuple[Array, Cache]:
    """Reads tokens and draws the next of each row, (B, 1)."""
    model = nnx.merge(graphdef, state)
    logits_BxV, cache = extend(model, tokens_BxL, cache, slot, padding_B)
    return next_tokens(logits_BxV, sampling, key)[:, None], cache


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    *,
    eos_id: int | None = None,
    seed: int = 0,
    cache: str = "full",
) -> Iterator[np.ndarray]:
    """Continues prompts; yields the next token of every row.

    Args:
        model: the model.
        prompts: token ids, at least one each.
        max_new_tokens: tokens to add at most.
        sampling: how they are drawn; the likeliest by default.
        eos_id: the id that ends a text; a row behind it goes on with it, and all rows there end
            the iteration. None: there is none.
        seed: of the draws.
        cache: what is kept of the past, one of :data:`models.cache.CACHES`.

    Yields:
        Token ids, int32 (B,).

    Raises:
        ValueError: for an empty prompt, an id outside the vocabulary, more tokens than the model
            takes, a bad sampling, or a cache that the model can't have.

    Example:
        >>> from models import LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2,
        ...                      num_heads=4, rank=8)
        >>> model = Llama(config, nnx.Rngs(0))
        >>> np.stack(list(generate(model, [[5, 6, 7], [8]], max_new_tokens=4)), axis=1).shape
        (2, 4)
    """
    sampling.validate()
    config = model.config
    longest = max((len(prompt) for prompt in prompts), default=0)
    if not prompts or not all(prompts):
        raise ValueError("generate: expected prompts of at least one token each.")
    if max_new_tokens < 1 or longest + max_new_tokens > config.max_sequence_length:
        raise ValueError(
            f"generate: max_new_tokens must be between 1 and {config.max_sequence_length - longest}"
            f" (the model's max_sequence_length = {config.max_sequence_length} less the longest "
            f"prompt's {longest}), but is {max_new_tokens}."
        )
    for prompt in prompts:
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise ValueError(
                f"generate: ids must be between 0 and {config.vocab_size - 1}, but one is "
                f"{min(prompt) if min(prompt) < 0 else max(prompt)}."
            )
    slots = -(-longest // _PROMPT_MULTIPLE) * _PROMPT_MULTIPLE
    padding_B = np.array([slots - len(prompt) for prompt in prompts], np.int32)
    tokens_BxL = np.zeros((len(prompts), slots), np.int32)
    for row, prompt in zip(tokens_BxL, prompts, strict=True):
        row[slots - len(prompt) :] = prompt
    past = empty_cache(config, len(prompts), slots + max_new_tokens, cache)
    graphdef, state = nnx.split(for_decoding(model))
    keys = jax.random.split(jax.random.key(seed), max_new_tokens)
    tokens: Any = jnp.asarray(tokens_BxL)
    ended_B = np.zeros(len(prompts), bool)
    slot = 0
    waiting: Array | None = None
    for key in keys:
        where = jnp.asarray(slot, jnp.int32)
        slot += tokens.shape[1]
        tokens, past = _step(graphdef, state, tokens, past, where, padding_B, key, sampling)
        # The tokens of the step before, now that the device has this one to work on.
        if waiting is not None:
            yield _settle(waiting, ended_B, eos_id)
            if ended_B.all():
                return
        waiting = tokens
    assert waiting is not None  # there was at least one step
    yield _settle(waiting, ended_B, eos_id)


def _settle(tokens_Bx1: Array, ended_B: np.ndarray, eos_id: int | None) -> np.ndarray:
    """Tokens on the host, the end-of-text id where a row has ended; notes rows that end here."""
    tokens_B = np.asarray(tokens_Bx1)[:, 0]
    if eos_id is not None:
        tokens_B = np.where(ended_B, eos_id, tokens_B).astype(np.int32)
        ended_B |= tokens_B == eos_id
    return tokens_B
