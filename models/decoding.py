"""Generates text token by token with a key-value cache.

Prompts of different lengths are padded on the left, so that all rows write to the same slot of the
cache; the positions of a row count from its first token. Low-rank projections stay factorised.

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

from loro_jax.layers.packing import Shared, can_share
from models.cache import Cache, attend, empty_cache, remember
from models.crossing import Crossing, Outputs, nothing_below
from models.llama import Llama
from models.precision import reduction_dtype
from models.sampling import GREEDY, Sampling, next_tokens

Array = jax.Array

# Prompts are padded to a multiple of this, so that similar lengths share a compiled program.
_PROMPT_MULTIPLE = 32


def for_decoding(model: Llama) -> Llama:
    """Concatenates the projections that share an input into one matrix, which is faster to read.

    Args:
        model: the model; left unchanged.

    Returns:
        The same model for :func:`extend`, and only for it: q, k, v, gate and up no longer have
        ``A`` (or ``W``). All other parameters are shared with ``model``. Kinds of projections that
        add to their product, such as "lora", are not concatenated.

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
    """Appends tokens to the cache and returns the logits of the next token.

    Args:
        model: the model.
        tokens_BxL: token ids.
        cache: cache of the previous tokens.
        slot: slot of the first token, the same in all rows.
        padding_B: slots of each row before its first token.

    Returns:
        (logits after the last token (B, V), float32, and the cache with these tokens).

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
    # Padding gets position 0. No token attends to it; what padded queries compute (they see
    # nothing) is never used.
    positions_BxT = jnp.maximum(slots_T - padding_B[:, None], 0)
    positions_BxL = jnp.maximum(slots_L - padding_B[:, None], 0)
    seen_BxLxT = (slots_T <= slots_L[:, None]) & (slots_T >= padding_B[:, None, None])
    x_BxLxD = model.embedding[...][tokens_BxL].astype(jnp.dtype(model.config.dtype))
    graphdef, stacked = nnx.split(model.blocks)

    def layer(carry: tuple[Array, Cache, Outputs], inputs: tuple[Array, nnx.State]) -> Any:
        # As a carry the cache is written in place; as a scan output it would be copied every time.
        x_BxLxD, cache, below = carry
        number, params = inputs
        block, crossing = nnx.merge(graphdef, params), Crossing(below)
        attention, h_BxLxD = block.attention, block.attention_norm(x_BxLxD)
        q_BxLxC, k_BxLxC, v_BxLxC = attention.project(h_BxLxD, (False, *cache.latent))
        q_BxLxC, k_BxLxC, v_BxLxC = crossing.add(attention.gates, q=q_BxLxC, k=k_BxLxC, v=v_BxLxC)
        cache = remember(attention, k_BxLxC, v_BxLxC, positions_BxL, cache, number, slot)
        q_BxLxHxK = attention.turned_heads(q_BxLxC, positions_BxL)
        y_BxLxHxK = attend(attention, q_BxLxHxK, cache, number, positions_BxT, seen_BxLxT)
        y_BxLxD = attention.o(y_BxLxHxK.reshape(*x_BxLxD.shape[:2], -1))
        x_BxLxD = x_BxLxD + crossing.add(attention.gates, o=y_BxLxD)[0]
        x_BxLxD = x_BxLxD + block.mlp(block.mlp_norm(x_BxLxD), crossing)
        return (x_BxLxD, cache, crossing.above), None

    layers = (jnp.arange(model.config.num_layers), stacked)
    carry = (x_BxLxD, cache, nothing_below(model.config, x_BxLxD))
    (x_BxLxD, cache, _), _ = jax.lax.scan(layer, carry, layers)
    # Padding is on the left, so the last slot holds the last token of every row.
    last_BxD = model.norm(x_BxLxD[:, -1])
    dtype = reduction_dtype(last_BxD.dtype)
    return jnp.matmul(last_BxD, model.head_VxD().T, preferred_element_type=dtype), cache


# The sampling is static: greedy decoding compiles no sort.
@functools.partial(jax.jit, static_argnums=(0, 8), donate_argnums=3)
def _step(
    graphdef: Any,
    state: Any,
    tokens_BxL: Array,
    cache: Cache,
    slot: Array,
    padding_B: Array,
    vocab_size: Array,
    key: Array,
    sampling: Sampling,
) -> tuple[Array, Cache]:
    """Reads tokens and draws the next one of each row, (B, 1), among ids below ``vocab_size``."""
    model = nnx.merge(graphdef, state)
    logits_BxV, cache = extend(model, tokens_BxL, cache, slot, padding_B)
    # Ids beyond the tokenizer's have no text.
    logits_BxV = jnp.where(jnp.arange(logits_BxV.shape[-1]) < vocab_size, logits_BxV, -jnp.inf)
    return next_tokens(logits_BxV, sampling, key)[:, None], cache


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    sampling: Sampling = GREEDY,
    *,
    eos_id: int | Sequence[int] | None = None,
    seed: int = 0,
    cache: str = "full",
    vocab_size: int | None = None,
) -> Iterator[np.ndarray]:
    """Continues prompts; yields the next token of every row.

    Args:
        model: the model.
        prompts: token ids, at least one per prompt.
        max_new_tokens: upper bound on the tokens added, for all prompts or for each.
        sampling: how tokens are drawn; greedy by default.
        eos_id: id or ids that end a text. A row that has ended repeats its last token; when all
            have ended, the iteration stops. None: no such id.
        seed: seed of the draws.
        cache: what is cached, one of :data:`models.cache.CACHES`.
        vocab_size: draw only ids below it, for models whose vocabulary is padded beyond their
            tokenizer's. None: draw any id.

    Yields:
        Token ids, int32 (B,).

    Raises:
        ValueError: for an empty prompt, an id outside the vocabulary, more tokens than the model
            takes, an invalid sampling or seed, or a cache that the model does not support.

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
    check_prompts(prompts, config.vocab_size, config.max_sequence_length)
    limits_B = _limits(prompts, max_new_tokens, config.max_sequence_length)
    check_seed(seed)
    ends: Any = [] if eos_id is None else np.atleast_1d(np.asarray(eos_id, np.int64))
    slots = -(-max(map(len, prompts)) // _PROMPT_MULTIPLE) * _PROMPT_MULTIPLE
    padding_B = np.array([slots - len(prompt) for prompt in prompts], np.int32)
    tokens_BxL = np.zeros((len(prompts), slots), np.int32)
    for row, prompt in zip(tokens_BxL, prompts, strict=True):
        row[slots - len(prompt) :] = prompt
    # Slots for all tokens from the start: two programs suffice, for the prompt and for one token.
    past = empty_cache(config, len(prompts), slots + int(limits_B.max()), cache)
    graphdef, state = nnx.split(for_decoding(model))
    keys = jax.random.split(jax.random.key(seed), int(limits_B.max()))
    drawable = jnp.asarray(min(vocab_size or config.vocab_size, config.vocab_size), jnp.int32)
    tokens: Any = jnp.asarray(tokens_BxL)
    settled = _Settled(limits_B, ends)
    slot = 0
    waiting: Array | None = None
    for key in keys:
        # An array is traced: a Python number would compile a program for each step.
        where = jnp.asarray(slot, jnp.int32)
        slot += tokens.shape[1]
        tokens, past = _step(
            graphdef, state, tokens, past, where, padding_B, drawable, key, sampling
        )
        # Fetch the previous step's tokens while the device works on this step.
        if waiting is not None:
            yield settled.tokens(waiting)
            if settled.ended_B.all():
                return
        waiting = tokens
    assert waiting is not None  # there was at least one step
    yield settled.tokens(waiting)


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int, longest: int) -> None:
    """Raises ValueError for prompts that a model can't continue.

    Args:
        prompts: token ids.
        vocab_size: vocabulary size of the model.
        longest: ``max_sequence_length`` of the model.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("generate: expected prompts of at least one token each.")
    for number, prompt in enumerate(prompts, 1):
        name = "the prompt" if len(prompts) == 1 else f"prompt {number} of {len(prompts)}"
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ValueError(
                f"generate: ids of {name} must be between 0 and {vocab_size - 1}, but one is "
                f"{min(prompt) if min(prompt) < 0 else max(prompt)}."
            )
        if len(prompt) >= longest:
            raise ValueError(
                f"generate: {name} has {len(prompt)} tokens; expected at most {longest - 1}, so "
                f"that one more fits the model's max_sequence_length = {longest}."
            )


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed that does not fit into 32 bits."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be between 0 and {2**32 - 1}, but is {seed}.")


def _limits(
    prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int], longest: int
) -> np.ndarray:
    """Checks and returns the limit of new tokens per row, (B,)."""
    if isinstance(max_new_tokens, int):
        max_new_tokens = [max_new_tokens] * len(prompts)
    for prompt, limit in zip(prompts, max_new_tokens, strict=True):
        room = longest - len(prompt)
        if not 1 <= limit <= room:
            room = min(room, *(longest - len(other) for other in prompts))
            raise ValueError(
                f"generate: max_new_tokens must be between 1 and {room} (the model's "
                f"max_sequence_length = {longest} less the longest prompt's {longest - room}), but "
                f"is {limit}."
            )
    return np.array(max_new_tokens)


class _Settled:
    """Drawn tokens on the host: which rows have ended, and with which token."""

    def __init__(self, limits_B: np.ndarray, ends: Any):
        self._limits_B, self._ends = limits_B, ends
        self._step = 0
        self._last_B = np.zeros(len(limits_B), np.int32)
        self.ended_B = np.zeros(len(limits_B), bool)

    def tokens(self, tokens_Bx1: Array) -> np.ndarray:
        """Returns a step's tokens, int32 (B,); rows that have ended repeat their last token."""
        drawn_B = np.asarray(tokens_Bx1)[:, 0]
        self._last_B = np.where(self.ended_B, self._last_B, drawn_B).astype(np.int32)
        self._step += 1
        # After the tokens of this step are chosen: the ending token itself is still returned.
        self.ended_B |= np.isin(self._last_B, self._ends) | (self._step >= self._limits_B)
        return self._last_B
