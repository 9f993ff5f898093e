"""LLaMA with low-rank projections.

RMSNorm, rotary embeddings, causal attention and SwiGLU without biases.

Shapes: B batch, L sequence, D hidden, H heads, G heads of keys and values, K head size, F
intermediate, V vocabulary, N tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from loro_jax.layers.common import LATENT
from loro_jax.layers.dense import Dense
from loro_jax.layers.low_rank import LowRankLinear
from loro_jax.layers.packing import Shared, apply_together
from loro_jax.layers.projections import make_projection
from models.attention import causal_attention
from models.config import PRESETS, LlamaConfig, preset
from models.crossing import Crossing, Outputs, make_gates, nothing_below
from models.layout import by_sequence
from models.precision import reduction_dtype
from models.rope import frequencies, rotary_embedding

__all__ = ["MLP", "PRESETS", "Attention", "Block", "Llama", "LlamaConfig", "RMSNorm", "preset"]

Array = jax.Array


class RMSNorm(nnx.Module):
    """RMS normalisation, ``scale * x / rms(x)``, reduced in float32."""

    def __init__(self, size: int, config: LlamaConfig):
        self.scale = nnx.Param(jnp.ones(size, jnp.dtype(config.param_dtype)))
        self.eps = config.rms_norm_eps

    def __call__(self, x: Array) -> Array:
        """Normalises the last axis; keeps shape and dtype."""
        x32 = x.astype(reduction_dtype(x.dtype))
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        # Rounded before the scale is applied, as in Hugging Face's LLaMA.
        return normed.astype(x.dtype) * self.scale[...].astype(x.dtype)


class Attention(nnx.Module):
    """Causal (grouped-query) self-attention with rotary embeddings."""

    shared: Shared | None = None

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        make = functools.partial(_make_projection, config, "attn", rngs)
        self.q, self.k, self.v, self.o = make("q"), make("k"), make("v"), make("o")
        self.gates = make_gates(config, "attn")
        self.head_size = config.head_size
        self.method = config.attention
        self.rope_theta = config.rope_theta
        # A copy, for the same reason as that of the config in Llama.
        self.rope_scaling = dataclasses.replace(config.rope_scaling)

    def project(self, x_BxLxD: Array, latent: Sequence[bool] | None = None) -> list[Array]:
        """Applies q, k and v; returns latents instead of outputs where ``latent`` is True."""
        return apply_together((self.q, self.k, self.v), x_BxLxD, shared=self.shared, latent=latent)

    def heads(self, y_BxLxC: Array) -> Array:
        """Splits a projection's output into heads, (B, L, H or G, K)."""
        y_BxLxHxK = y_BxLxC.reshape(*y_BxLxC.shape[:2], -1, self.head_size)
        # Over `tensor` each device has whole heads, so that attention needs no communication.
        return by_sequence(y_BxLxHxK, split_axis=2)

    def turned_heads(self, y_BxLxC: Array, positions: Array) -> Array:
        """Splits queries or keys into heads and rotates them by position.

        Args:
            y_BxLxC: output of the q or k projection.
            positions: positions of the tokens, (L,), or (B, L) if rows differ.
        """
        frequencies_K = frequencies(self.head_size, self.rope_theta, self.rope_scaling)
        return rotary_embedding(self.heads(y_BxLxC), positions, frequencies_K)

    @jax.named_scope("attention")
    def __call__(self, x_BxLxD: Array, crossing: Crossing) -> Array:
        """Maps (B, L, D) to (B, L, D)."""
        B, L, _ = x_BxLxD.shape
        q_BxLxC, k_BxLxC, v_BxLxC = self.project(x_BxLxD)
        q_BxLxC, k_BxLxC, v_BxLxC = crossing.add(self.gates, q=q_BxLxC, k=k_BxLxC, v=v_BxLxC)
        q_BxLxHxK = self.turned_heads(q_BxLxC, jnp.arange(L))
        k_BxLxGxK = self.turned_heads(k_BxLxC, jnp.arange(L))
        v_BxLxGxK = self.heads(v_BxLxC)
        y_BxLxHxK = causal_attention(q_BxLxHxK, k_BxLxGxK, v_BxLxGxK, self.method)
        return crossing.add(self.gates, o=self.o(y_BxLxHxK.reshape(B, L, -1)))[0]


class MLP(nnx.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    shared: Shared | None = None

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        make = functools.partial(_make_projection, config, "mlp", rngs)
        self.gate, self.up, self.down = make("gate"), make("up"), make("down")
        self.gates = make_gates(config, "mlp")

    @jax.named_scope("mlp")
    def __call__(self, x_BxLxD: Array, crossing: Crossing) -> Array:
        """Maps (B, L, D) to (B, L, D)."""
        gate_BxLxF, up_BxLxF = apply_together((self.gate, self.up), x_BxLxD, shared=self.shared)
        gate_BxLxF, up_BxLxF = crossing.add(self.gates, gate=gate_BxLxF, up=up_BxLxF)
        y_BxLxF = jax.nn.silu(gate_BxLxF) * up_BxLxF
        # Over `tensor` each device computes its part of the width: gate and up are sharded by
        # outputs, down by inputs.
        y_BxLxD = self.down(by_sequence(y_BxLxF, split_axis=2))
        return crossing.add(self.gates, down=y_BxLxD)[0]


def _make_projection(
    config: LlamaConfig, group: str, rngs: nnx.Rngs, name: str
) -> Dense | LowRankLinear:
    out_features, in_features = config.shapes(group)[name]
    return make_projection(in_features, out_features, config.projection_spec(group, name), rngs)


class Block(nnx.Module):
    """One layer: attention and MLP, each after a norm and added to the residual stream."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.hidden_size, config)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config)
        self.mlp = MLP(config, rngs)

    def __call__(self, x_BxLxD: Array, below: Outputs) -> tuple[Array, Outputs]:
        """Maps (B, L, D) to (B, L, D); also takes and returns what crosses layers."""
        crossing = Crossing(below)
        x_BxLxD = by_sequence(x_BxLxD + self.attention(self.attention_norm(x_BxLxD), crossing))
        x_BxLxD = by_sequence(x_BxLxD + self.mlp(self.mlp_norm(x_BxLxD), crossing))
        return x_BxLxD, crossing.above


class Llama(nnx.Module):
    """LLaMA language model. The parameters of all blocks are stacked along a leading axis.

    Args:
        config: architecture and precision.
        rngs: NNX random streams; the ``params`` stream is used.

    Raises:
        ValueError: if the config is invalid.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2,
        ...                      num_heads=4, rank=8)
        >>> model = Llama(config, nnx.Rngs(0))
        >>> model(jnp.zeros((2, 5), jnp.int32)).shape
        (2, 5, 64)
    """

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        config.validate()
        # A copy: the module's static structure must not change when the caller's config does.
        self.config = dataclasses.replace(
            config, rope_scaling=dataclasses.replace(config.rope_scaling)
        )
        dtype = jnp.dtype(config.param_dtype)
        shape = (config.vocab_size, config.hidden_size)
        embedding = config.initializer_range * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.embedding = nnx.Param(embedding.astype(dtype))
        # A key for each layer, and one traced block: initialisation, too, compiles the same for any
        # depth.
        make_block = nnx.split_rngs(splits=config.num_layers)(
            nnx.vmap(lambda rngs: Block(config, rngs), in_axes=0, out_axes=0)
        )
        self.blocks = make_block(rngs)
        self.norm = RMSNorm(config.hidden_size, config)
        if not config.tie_embeddings:
            # The head stays dense in all models of the paper.
            head = dataclasses.replace(config.projection_spec("attn"), rank=None)
            self.head = Dense(config.hidden_size, config.vocab_size, head, rngs)

    def head_VxD(self) -> Array:
        """Returns the output projection, in the dtype of the activations."""
        stored = self.embedding if self.config.tie_embeddings else self.head.W
        return stored[...].astype(jnp.dtype(self.config.dtype))

    def hidden_states(self, tokens_BxL: Array) -> Array:
        """Returns the hidden states, (B, L, D), after the last norm and before the head.

        Raises:
            ValueError: if the sequence is longer than ``config.max_sequence_length``.
        """
        return self.through_layers(tokens_BxL)[0]

    def through_layers(
        self,
        tokens_BxL: Array,
        observe: Callable[[Array, Any], Any] | None = None,
        beside: Any = None,
    ) -> tuple[Array, Any]:
        """Returns the hidden states, and what a function says of each layer's output.

        Args:
            tokens_BxL: token ids.
            observe: (output of a layer (B, L, D), its part of ``beside``) -> arrays; None: nothing.
            beside: arrays for ``observe``, with layers as the first axis.

        Returns:
            (the hidden states, (B, L, D), after the last norm; what ``observe`` returned, with
            layers as a new first axis).

        Raises:
            ValueError: if the sequence is longer than ``config.max_sequence_length``.
        """
        if tokens_BxL.shape[1] > self.config.max_sequence_length:
            raise ValueError(
                f"Llama: a sequence of {tokens_BxL.shape[1]} tokens is longer than the model's "
                f"max_sequence_length = {self.config.max_sequence_length}."
            )
        x_BxLxD = self.embedding[...][tokens_BxL].astype(jnp.dtype(self.config.dtype))
        x_BxLxD = by_sequence(x_BxLxD)
        # lax.scan over the stacked parameters compiles a single block for any depth.
        graphdef, stacked = nnx.split(self.blocks)

        def layer(
            carry: tuple[Array, Outputs], parts: tuple[nnx.State, Any]
        ) -> tuple[tuple[Array, Outputs], Any]:
            params, other = parts
            carry = nnx.merge(graphdef, params)(*carry)
            return carry, None if observe is None else observe(carry[0], other)

        carry = (x_BxLxD, nothing_below(self.config, x_BxLxD))
        (x_BxLxD, _), seen = jax.lax.scan(
            _remat(layer, self.config.remat), carry, (stacked, beside), unroll=self.config.unroll
        )
        return self.norm(x_BxLxD), seen

    def __call__(self, tokens_BxL: Array) -> Array:
        """Returns logits (B, L, V), float32, for token ids (B, L)."""
        x_BxLxD = self.hidden_states(tokens_BxL)
        dtype = reduction_dtype(x_BxLxD.dtype)
        return jnp.matmul(x_BxLxD, self.head_VxD().T, preferred_element_type=dtype)


def _remat(layer: Callable, policy: str) -> Callable:
    if policy == "none":
        return layer
    if policy == "full":
        return jax.checkpoint(layer)
    policies = jax.checkpoint_policies
    if policy == "rank":
        return jax.checkpoint(layer, policy=policies.save_only_these_names(LATENT))
    # Products with weights are saved; attention's scores, which have batch axes, are recomputed.
    return jax.checkpoint(layer, policy=policies.dots_with_no_batch_dims_saveable)
