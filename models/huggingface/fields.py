"""Checks for fields of a ``config.json`` that require a network other than LLaMA.

Configs in the wild carry training settings, file names, generation defaults, and fields of other
architectures at values that change nothing. Fields that don't change the network are ignored; a
field listed below is an error if its value would change it. A null field counts as absent.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from models.huggingface.errors import CheckpointError

# Switches that must be off: any true value but "none" requires another network.
_SWITCHES = frozenset(
    {
        # biases
        "attention_bias",
        "attention_out_bias",
        "bias",
        "mlp_bias",
        "qkv_bias",
        "use_bias",
        "use_qkv_bias",
        # other forms of the stored matrices
        "compression_config",
        "quantization",
        "quantization_config",
        # other attention
        "add_cross_attention",
        "alibi",
        "attention_chunk_size",
        "attention_sinks",
        "attn_logit_softcapping",
        "attn_temperature_tuning",
        "bidirectional",
        "clip_qkv",
        "cross_attention_layers",
        "is_encoder_decoder",
        "kv_lora_rank",
        "mrope_section",
        "no_rope_layer_interval",
        "q_lora_rank",
        "qk_layernorm",
        "qk_norm",
        "rope_interleave",
        "rope_interleaved",
        "rotary_interleaved",
        "use_alibi",
        "use_bidirectional_attention",
        "use_mrope",
        "use_qk_layernorm",
        "use_qk_norm",
        # other blocks
        "n_routed_experts",
        "num_experts",
        "num_local_experts",
        "parallel_attn",
        "post_norm",
        "use_parallel_residual",
        "use_post_norm",
        # other ends
        "final_logit_softcapping",
        "normalize_embedding",
        "scale_depth",
        "scale_embedding",
    }
)
# Fields with the values that change nothing; any other value requires another network.
_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    "causal": (True,),
    "is_causal": (True,),
    "use_rope": (True,),
    "embedding_multiplier": (1,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "partial_rotary_factor": (1,),
    "residual_multiplier": (1,),
    "rope_pct": (1,),
    "rotary_pct": (1,),
    "scale_emb": (1,),
    "position_embedding_type": ("rope", "rotary", "absolute"),
}


def check_fields(content: Mapping[str, Any], head_size: float, where: str) -> None:
    """Raises if a field requires another network.

    Args:
        content: content of a ``config.json``.
        head_size: size of a head.
        where: name of the file, for messages.

    Raises:
        CheckpointError: names the field.

    Example:
        >>> check_fields({"_model_name_or_path": "x", "sliding_window": None}, 64, "config.json")
        >>> check_fields({"mlp_bias": True}, 64, "config.json")
        Traceback (most recent call last):
        ...
        models.huggingface.errors.CheckpointError: config.json: mlp_bias = True is not supported; \
expected False.
    """
    for name, value in content.items():
        if value is None:
            continue
        # "none" is how some configs turn a switch off.
        if name in _SWITCHES and value and value != "none":
            _refuse(name, value, str(None if isinstance(value, dict | list) else False), where)
        if name in _VALUES:
            check_value(name, value, _VALUES[name], where)
    # Scales for which LLaMA has one value, written in three ways.
    for name, neutral in (
        ("attention_multiplier", head_size**-0.5),
        ("query_pre_attn_scalar", head_size),
        ("rotary_dim", head_size),
    ):
        value = content.get(name)
        if value is not None and not (_is_number(value) and abs(value / neutral - 1) < 1e-6):
            _refuse(name, value, f"{neutral:g}", where)
    _check_windows(content, where)


def check_value(name: str, value: Any, allowed: Sequence[Any], where: str) -> None:
    """Raises for a field with a value that requires another network.

    Args:
        name: name of the field.
        value: its value.
        allowed: the values that our network has; none: the field must be absent.
        where: name of the file, for messages.

    Raises:
        CheckpointError: names field, value and expectation.
    """
    if value not in allowed:
        _refuse(name, value, " or ".join(map(repr, allowed)) or "none", where)


def _check_windows(content: Mapping[str, Any], where: str) -> None:
    """Raises for layers with a sliding window that takes effect, or without rotary embeddings."""
    kinds = content.get("layer_types")
    if kinds is not None and (
        not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)
    ):
        _refuse("layer_types", kinds, '"full_attention" everywhere', where)
    turned = content.get("no_rope_layers")  # 1 for layers with rotary embeddings
    if turned is not None and (not isinstance(turned, list) or not all(turned)):
        _refuse("no_rope_layers", turned, "1 everywhere", where)
    window = content.get("sliding_window")
    # Without effect if switched off, or if it covers the longest sequence.
    if not window or content.get("use_sliding_window") is False:
        return
    longest = content.get("max_position_embeddings", 2048)
    if not (_is_number(window) and _is_number(longest) and window >= longest):
        _refuse("sliding_window", window, "None", where)


def _refuse(name: str, value: Any, expected: str, where: str) -> None:
    raise CheckpointError(
        f"{where}: {name} = {reprlib.repr(value)} is not supported; expected {expected}."
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def whole_number(content: Mapping[str, Any], name: str, where: str) -> int | None:
    """Reads an integer field; None if absent.

    Args:
        content: content of the config.
        name: name of the field.
        where: name of the file, for messages.

    Raises:
        CheckpointError: if the field is anything else.

    Example:
        >>> whole_number({"hidden_size": 64.0}, "hidden_size", "config.json")
        64
    """
    value = number(content, name, where, "a whole number")
    if value is not None and value != int(value):
        _refuse(name, value, "a whole number", where)
    return None if value is None else int(value)


def number(
    content: Mapping[str, Any], name: str, where: str, expected: str = "a number"
) -> float | None:
    """Reads a finite number; None if absent.

    Args:
        content: content of the config.
        name: name of the field.
        where: name of the file, for messages.
        expected: the expectation in messages.

    Raises:
        CheckpointError: if the field is anything else.
    """
    value = content.get(name)
    if value is not None and not (_is_number(value) and abs(value) < float("inf")):
        _refuse(name, value, expected, where)
    return value
