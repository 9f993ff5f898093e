"""Their ``config.json`` and our :class:`models.llama.LlamaConfig`."""

from __future__ import annotations

import dataclasses
from typing import Any

from models.huggingface.errors import CheckpointError
from models.llama import LlamaConfig
from models.rope import RopeScaling

MERGED, FACTORED = "llama", "loro_llama"

# Fields of ours by theirs, where the value is the same.
_SAME = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_sequence_length",
    "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "initializer_range",
}
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# What transformers takes where a file is silent and our default differs.
_THEIR_DEFAULTS = {"max_position_embeddings": 2048}
# Fields that a factored directory has on top.
_FACTORED_FIELDS = (
    "scope",
    "rank",
    "attn_rank",
    "mlp_rank",
    "projection",
    "alpha",
    "density",
    "initialiser",
)
# Theirs with the only value that means our network.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "quantization_config": None,
    "sliding_window": None,
    "layer_types": None,
    "is_decoder": False,
    "add_cross_attention": False,
    "partial_rotary_factor": 1.0,
}
# Theirs that do not change what the network computes.
_WITHOUT_EFFECT = {
    "architectures",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "unk_token_id",
    "chunk_size_feed_forward",
    "id2label",
    "label2id",
    "model_type",
    "_name_or_path",
    "name_or_path",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "use_cache",
    "tokenizer_class",
}
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters")


def to_huggingface(config: LlamaConfig, dtype: str, factored: bool) -> dict[str, Any]:
    """Our config as theirs.

    Args:
        config: a model's.
        dtype: of the stored tensors.
        factored: whether the projections are stored as they are, or merged.

    Returns:
        The content of a ``config.json``.

    Example:
        >>> to_huggingface(LlamaConfig(num_layers=2), "float32", factored=False)["model_type"]
        'llama'
    """
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    scaling = config.rope_scaling
    if scaling.kind != "none":
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        rope |= {
            "low_freq_factor": scaling.low_frequency,
            "high_freq_factor": scaling.high_frequency,
            "original_max_position_embeddings": scaling.original_length,
        }
    ours = dataclasses.asdict(config) | {
        "num_kv_heads": config.kv_heads,
        "head_dim": config.head_size,
    }
    content = {
        "architectures": ["LoroLlamaForCausalLM" if factored else "LlamaForCausalLM"],
        "model_type": FACTORED if factored else MERGED,
        "torch_dtype": dtype,
        **{theirs: ours[name] for theirs, name in _SAME.items()},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        # Where programs of the past look, and where those of today do.
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling.kind == "none" else _without(rope, "rope_theta"),
        "rope_parameters": rope,
    }
    if factored:
        content["loro"] = {name: ours[name] for name in _FACTORED_FIELDS}
    return content


def from_huggingface(content: dict[str, Any], where: str) -> LlamaConfig:
    """Their config as ours: dense, or as a factored directory says.

    Args:
        content: of a ``config.json``.
        where: the file, for messages.

    Returns:
        The config, in float32; what is stored in another dtype is for the caller to say.

    Raises:
        CheckpointError: for a field that is missing, or that asks for what our network does not do.

    Example:
        >>> theirs = to_huggingface(LlamaConfig(num_layers=2), "float32", factored=False)
        >>> from_huggingface(theirs, "config.json").num_layers
        2
    """
    kind = content.get("model_type")
    if kind not in (MERGED, FACTORED):
        raise CheckpointError(
            f'{where}: model_type = {kind!r}; expected "{MERGED}" or "{FACTORED}".'
        )
    missing = [name for name in _REQUIRED if not isinstance(content.get(name), int)]
    if missing:
        raise CheckpointError(f"{where}: {missing[0]} is missing; expected a whole number.")
    known = {*_SAME, *_FIXED, *_WITHOUT_EFFECT, *_ROPE}
    known |= {"loro"} if kind == FACTORED else set()
    # A field that says "none" or "no" asks for nothing.
    unknown = [name for name, value in content.items() if name not in known and value]
    if unknown:
        raise CheckpointError(f"{where}: {unknown[0]} = {content[unknown[0]]!r} is not supported.")
    for name, expected in _FIXED.items():
        if content.get(name, expected) != expected:
            raise CheckpointError(
                f"{where}: {name} = {content[name]!r} is not supported; expected {expected!r}."
            )
    full = _THEIR_DEFAULTS | {name: value for name, value in content.items() if value is not None}
    fields: dict[str, Any] = {
        ours: full[theirs] for theirs, ours in _SAME.items() if theirs in full
    }
    # What is the usual case is not said in ours.
    heads = fields["num_heads"]
    if fields.get("num_kv_heads") == heads:
        del fields["num_kv_heads"]
    if fields.get("head_dim", 0) * heads == fields["hidden_size"]:
        del fields["head_dim"]
    theta, scaling = _rope(full, fields.get("max_sequence_length", 2048), where)
    factored: dict[str, Any] = {"scope": "none"}
    if kind == FACTORED:
        factored = content.get("loro") or {}
        wrong = [name for name in _FACTORED_FIELDS if name not in factored]
        if wrong:
            raise CheckpointError(f"{where}: loro.{wrong[0]} is missing.")
    config = LlamaConfig(
        **fields,
        **{name: value for name, value in factored.items() if name in _FACTORED_FIELDS},
        rope_theta=theta,
        rope_scaling=scaling,
    )
    try:
        config.validate()
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{where}: {error}") from None
    return config


def _rope(content: dict[str, Any], length: int, where: str) -> tuple[float, RopeScaling]:
    """Base of the rotary frequencies and their scaling, from either place."""
    found = content.get("rope_parameters") or content.get("rope_scaling") or {}
    theta = float(found.get("rope_theta", content.get("rope_theta", 10000.0)))
    kind = found.get("rope_type", found.get("type", "default"))
    if kind == "default":
        return theta, RopeScaling()
    known = {"rope_theta", "rope_type", "type", "factor"}
    if kind == "linear":
        scaling = RopeScaling("linear", float(found.get("factor", 1.0)))
    elif kind == "llama3":
        known |= {"low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
        scaling = RopeScaling(
            "llama3",
            float(found.get("factor", 1.0)),
            float(found.get("low_freq_factor", 1.0)),
            float(found.get("high_freq_factor", 4.0)),
            int(found.get("original_max_position_embeddings", length)),
        )
    else:
        raise CheckpointError(
            f"{where}: rope_type = {kind!r} is not supported; expected default, linear or llama3."
        )
    unknown = set(found) - known
    if unknown:
        raise CheckpointError(f"{where}: {min(unknown)} of the rope scaling is not supported.")
    return theta, scaling


def _without(content: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != name}
