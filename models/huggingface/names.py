"""Hugging Face's names of our parameters."""

from __future__ import annotations

# Hugging Face's names of projections by our module and attribute.
PROJECTIONS = {
    ("attention", "q"): "self_attn.q_proj",
    ("attention", "k"): "self_attn.k_proj",
    ("attention", "v"): "self_attn.v_proj",
    ("attention", "o"): "self_attn.o_proj",
    ("mlp", "gate"): "mlp.gate_proj",
    ("mlp", "up"): "mlp.up_proj",
    ("mlp", "down"): "mlp.down_proj",
}
NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"


def layer_prefix(layer: int) -> str:
    """Returns the prefix of the names of a layer's tensors.

    Example:
        >>> layer_prefix(3)
        'model.layers.3.'
    """
    return f"model.layers.{layer}."


def variable_name(variable: str) -> str:
    """Returns Hugging Face's name of a projection's variable.

    Example:
        >>> variable_name("W"), variable_name("B")
        ('weight', 'B')
    """
    return "weight" if variable == "W" else variable
