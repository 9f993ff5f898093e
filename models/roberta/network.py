"""RoBERTa: an encoder of post-norm blocks, and a head on the first token.

Shapes: B batch, L sequence, D hidden, H heads, K head size, F intermediate, N labels.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from loro_jax.layers.dense import Dense
from models.layout import by_sequence
from models.precision import reduction_dtype
from models.roberta.config import ACTIVATIONS, RobertaConfig

Array = jax.Array


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Sets a share of the entries to zero and scales the others up; unchanged without a key.

    Args:
        x: activations, rows along the first axis.
        rate: share of the entries.
        key: a random key, or one for each row: a row's entries then don't depend on the others.

    Example:
        >>> x = jnp.ones((10, 100))
        >>> bool((dropout(x, 0.1, None) == x).all())
        True
        >>> sorted(set(dropout(x, 0.5, jax.random.key(0)).ravel().tolist()))
        [0.0, 2.0]
    """
    if key is None or rate == 0:
        return x
    draw = functools.partial(jax.random.bernoulli, p=1 - rate)
    if key.ndim:
        kept = jax.vmap(lambda own: draw(own, shape=x.shape[1:]))(key)
    else:
        kept = draw(key, shape=x.shape)
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


def _keys(key: Array, number: int) -> Array:
    """Splits a key, or the key of each row, into some along a new first axis."""
    split = functools.partial(jax.random.split, num=number)
    return jax.vmap(split, out_axes=1)(key) if key.ndim else split(key)


def _split(key: Array | None, number: int) -> list[Array] | list[None]:
    """Splits a key, or the key of each row; None stays None."""
    return [None] * number if key is None else list(_keys(key, number))


def _norm(config: RobertaConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=config.layer_norm_eps,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        use_fast_variance=False,  # E[x^2] - E[x]^2 cancels
        rngs=rngs,
    )


class Embeddings(nnx.Module):
    """Sums the embeddings of tokens, positions and token types, and normalises."""

    def __init__(self, config: RobertaConfig, rngs: nnx.Rngs):
        self.config = config

        def table(rows: int) -> nnx.Param:
            shape = (rows, config.hidden_size)
            entries = config.initializer_range * jax.random.normal(rngs.params(), shape)
            return nnx.Param(entries.astype(config.param_dtype))

        self.word = table(config.vocab_size)
        self.position = table(config.max_position_embeddings)
        self.token_type = table(config.type_vocab_size)
        self.norm = _norm(config, rngs)

    def __call__(self, ids_BxL: Array, types_BxL: Array | None, key: Array | None) -> Array:
        """Maps token ids (B, L) to (B, L, D)."""
        # Padding has the position of its own id; other tokens are counted from the one after it.
        is_token = (ids_BxL != self.config.pad_id).astype(jnp.int32)
        positions_BxL = jnp.cumsum(is_token, axis=1) * is_token + self.config.pad_id
        types = jnp.zeros_like(ids_BxL) if types_BxL is None else types_BxL
        x_BxLxD = self.word[...][ids_BxL] + self.token_type[...][types]
        x_BxLxD = (x_BxLxD + self.position[...][positions_BxL]).astype(self.config.dtype)
        return dropout(self.norm(x_BxLxD), self.config.hidden_dropout, key)


class Attention(nnx.Module):
    """Self-attention in both directions, over the tokens of a mask."""

    def __init__(self, config: RobertaConfig, rngs: nnx.Rngs):
        D, spec = config.hidden_size, config.projection_spec()
        self.query = Dense(D, D, spec, rngs)
        self.key = Dense(D, D, spec, rngs)
        self.value = Dense(D, D, spec, rngs)
        self.output = Dense(D, D, spec, rngs)
        self.num_heads = config.num_heads
        self.dropout = config.attention_dropout

    @jax.named_scope("attention")
    def __call__(self, x_BxLxD: Array, mask_BxL: Array, key: Array | None) -> Array:
        """Maps (B, L, D) to (B, L, D)."""
        B, L, D = x_BxLxD.shape

        def heads(y_BxLxD: Array) -> Array:
            return by_sequence(y_BxLxD.reshape(B, L, self.num_heads, -1), split_axis=2)

        q, k, v = (heads(map_(x_BxLxD)) for map_ in (self.query, self.key, self.value))
        dtype = reduction_dtype(x_BxLxD.dtype)
        scale = (D // self.num_heads) ** -0.5
        scores_BxHxLxL = jnp.einsum("blhk,bmhk->bhlm", q, k, preferred_element_type=dtype) * scale
        # The smallest number and not -inf: a row without tokens then has no NaN.
        hidden = jnp.finfo(dtype).min
        scores_BxHxLxL = jnp.where(mask_BxL[:, None, None, :] > 0, scores_BxHxLxL, hidden)
        weights = jax.nn.softmax(scores_BxHxLxL, axis=-1).astype(x_BxLxD.dtype)
        y = jnp.einsum("bhlm,bmhk->blhk", dropout(weights, self.dropout, key), v)
        return self.output(y.reshape(B, L, D))


class MLP(nnx.Module):
    """``output(activation(intermediate(x)))``."""

    def __init__(self, config: RobertaConfig, rngs: nnx.Rngs):
        spec = config.projection_spec()
        self.intermediate = Dense(config.hidden_size, config.intermediate_size, spec, rngs)
        self.output = Dense(config.intermediate_size, config.hidden_size, spec, rngs)
        self.activation = config.hidden_act

    @jax.named_scope("mlp")
    def __call__(self, x_BxLxD: Array) -> Array:
        """Maps (B, L, D) to (B, L, D)."""
        y_BxLxF = ACTIVATIONS[self.activation](self.intermediate(x_BxLxD))
        return self.output(by_sequence(y_BxLxF, split_axis=2))


class Block(nnx.Module):
    """One layer: attention and MLP, each added to its input and normalised after that."""

    def __init__(self, config: RobertaConfig, rngs: nnx.Rngs):
        self.attention = Attention(config, rngs)
        self.attention_norm = _norm(config, rngs)
        self.mlp = MLP(config, rngs)
        self.mlp_norm = _norm(config, rngs)
        self.dropout = config.hidden_dropout

    def __call__(self, x_BxLxD: Array, mask_BxL: Array, key: Array | None) -> Array:
        """Maps (B, L, D) to (B, L, D)."""
        inner, first, second = _split(key, 3)
        y_BxLxD = dropout(self.attention(x_BxLxD, mask_BxL, inner), self.dropout, first)
        x_BxLxD = by_sequence(self.attention_norm(x_BxLxD + y_BxLxD))
        y_BxLxD = dropout(self.mlp(x_BxLxD), self.dropout, second)
        return by_sequence(self.mlp_norm(x_BxLxD + y_BxLxD))


class ClassificationHead(nnx.Module):
    """``out_proj(tanh(dense(x)))`` of the first token."""

    def __init__(self, config: RobertaConfig, rngs: nnx.Rngs):
        spec = config.projection_spec()
        self.dense = Dense(config.hidden_size, config.hidden_size, spec, rngs)
        self.out_proj = Dense(config.hidden_size, config.num_labels, spec, rngs)
        self.dropout = config.head_dropout

    def __call__(self, x_BxLxD: Array, key: Array | None = None) -> Array:
        """Maps hidden states (B, L, D) to logits (B, N)."""
        first, second = _split(key, 2)
        x_BxD = dropout(x_BxLxD[:, 0], self.dropout, first)
        return self.out_proj(dropout(jnp.tanh(self.dense(x_BxD)), self.dropout, second))


class Roberta(nnx.Module):
    """The encoder. The parameters of all blocks are stacked along a leading axis.

    Args:
        config: architecture and precision.
        rngs: NNX random streams; the ``params`` stream is used.
        pooler: whether there is a dense layer with tanh on the first token (:meth:`pooled`).

    Raises:
        ValueError: if the config is invalid.

    Example:
        >>> config = RobertaConfig(64, 32, num_layers=2, num_heads=4, intermediate_size=48)
        >>> Roberta(config, nnx.Rngs(0)).hidden_states(jnp.full((2, 5), 7)).shape
        (2, 5, 32)
    """

    def __init__(self, config: RobertaConfig, rngs: nnx.Rngs, pooler: bool = False):
        config.validate()
        self.config = dataclasses.replace(config)  # the caller may change its own
        self.embeddings = Embeddings(self.config, rngs)
        make_blocks = nnx.split_rngs(splits=config.num_layers)(
            nnx.vmap(lambda rngs: Block(self.config, rngs), in_axes=0, out_axes=0)
        )
        self.blocks = make_blocks(rngs)
        D, spec = config.hidden_size, config.projection_spec()
        self.pooler = nnx.data(Dense(D, D, spec, rngs) if pooler else None)

    def hidden_states(
        self,
        ids_BxL: Array,
        *,
        mask: Array | None = None,
        token_types: Array | None = None,
        key: Array | None = None,
    ) -> Array:
        """Returns the hidden states after the last block, (B, L, D).

        Args:
            ids_BxL: token ids, (B, L).
            mask: (B, L), 1 for tokens that are attended to, 0 for padding; None: all are.
            token_types: (B, L), below ``config.type_vocab_size``; None: zeros.
            key: a random key for dropout, or one for each row, (B,); None: no dropout.

        Raises:
            ValueError: if the sequence is longer than the model has positions for.
        """
        if ids_BxL.shape[1] > self.config.longest:
            raise ValueError(
                f"Roberta: a sequence of {ids_BxL.shape[1]} tokens is longer than the "
                f"{self.config.longest} that max_position_embeddings = "
                f"{self.config.max_position_embeddings} and pad_id = {self.config.pad_id} allow."
            )
        mask_BxL = jnp.ones_like(ids_BxL) if mask is None else mask
        first, rest = _split(key, 2)
        x_BxLxD = by_sequence(self.embeddings(ids_BxL, token_types, first))
        # lax.scan over the stacked parameters compiles a single block for any depth.
        graphdef, stacked = nnx.split(self.blocks)
        keys = None if rest is None else _keys(rest, self.config.num_layers)

        def layer(x: Array, inputs: tuple[nnx.State, Array | None]) -> tuple[Array, None]:
            params, key = inputs
            return nnx.merge(graphdef, params)(x, mask_BxL, key), None

        if self.config.remat == "full":
            layer = jax.checkpoint(layer)
        return jax.lax.scan(layer, x_BxLxD, (stacked, keys))[0]

    def pooled(self, x_BxLxD: Array) -> Array:
        """Returns ``tanh(pooler(x))`` of the first token, (B, D).

        Raises:
            ValueError: if the model has no pooler.
        """
        if self.pooler is None:
            raise ValueError("Roberta: this model has no pooler; expected pooler=True.")
        return jnp.tanh(self.pooler(x_BxLxD[:, 0]))


class RobertaClassifier(Roberta):
    """The encoder with a head for classification, or regression if there is one label.

    Example:
        >>> config = RobertaConfig(64, 32, num_layers=2, num_heads=4, intermediate_size=48)
        >>> RobertaClassifier(config, nnx.Rngs(0))(jnp.full((3, 5), 7)).shape
        (3, 2)
    """

    def __init__(self, config: RobertaConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.classifier = ClassificationHead(self.config, rngs)

    def __call__(
        self,
        ids_BxL: Array,
        *,
        mask: Array | None = None,
        token_types: Array | None = None,
        key: Array | None = None,
    ) -> Array:
        """Returns logits (B, N); arguments as in :meth:`Roberta.hidden_states`."""
        encoder, head = _split(key, 2)
        x_BxLxD = self.hidden_states(ids_BxL, mask=mask, token_types=token_types, key=encoder)
        return self.classifier(x_BxLxD, head)
