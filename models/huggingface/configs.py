"""Conversion between Hugging Face's ``config.json`` and :class:`models.llama.LlamaConfig`."""

from __future__ import annotations

import dataclasses
import reprlib
from typing import Any

from models.huggingface.errors import CheckpointError
from models.huggingface.fields import check_fields, number, whole_number
from models.huggingface.frame import check_type, known_fields, validated
from models.huggingface.rotary import read_rotary, write_rotary
from models.llama import LlamaConfig

MERGED, FACTORED = "llama", "loro_llama"

# Our field names by Hugging Face's, for fields with the same value.
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
_FRACTIONS = ("rms_norm_eps", "initializer_range")
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# Defaults of transformers that differ from ours.
_THEIR_DEFAULTS = {"max_position_embeddings": 2048}
# Architectures that identify a LLaMA if model_type is missing.
_NAMES = (["LlamaForCausalLM"], ["LLaMAForCausalLM"])
# Additional fields of a factored directory.
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
# Added later; missing ones have their defaults.
_OPTIONAL_FIELDS = ("scaffold_scale", "scaffold_block", "lost_gamma", "lost_channels", "ranks")


def to_huggingface(config: LlamaConfig, dtype: str, factored: bool) -> dict[str, Any]:
    """Converts a config to Hugging Face's format.

    Args:
        config: config of a model.
        dtype: dtype of the stored tensors.
        factored: whether factors are stored, instead of merged projections.

    Returns:
        The content of a ``config.json``.

    Example:
        >>> to_huggingface(LlamaConfig(num_layers=2), "float32", factored=False)["model_type"]
        'llama'
    """
    ours = dataclasses.asdict(config) | {
        # Written even where they are the default: other programs may have others.
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
        **write_rotary(config),
    }
    if factored:
        content["loro"] = {name: ours[name] for name in _FACTORED_FIELDS + _OPTIONAL_FIELDS}
    return content


def from_huggingface(content: dict[str, Any], where: str) -> LlamaConfig:
    """Converts a config from Hugging Face's format: dense, or as a factored directory says.

    Args:
        content: content of a ``config.json``.
        where: name of the file, for messages.

    Returns:
        The config, in float32 whatever the dtype of the stored tensors.

    Raises:
        CheckpointError: for a field that is missing or not supported by our network.

    Example:
        >>> theirs = to_huggingface(LlamaConfig(num_layers=2), "float32", factored=False)
        >>> from_huggingface(theirs, "config.json").num_layers
        2
    """
    full = _THEIR_DEFAULTS | known_fields(content)
    kind = full.get("model_type")
    if kind is None and full.get("architectures") in _NAMES:
        kind = MERGED
    check_type(kind, (MERGED, FACTORED), where)
    fields = _fields(full, where)
    head = fields.get("head_dim") or fields["hidden_size"] / max(fields["num_heads"], 1)
    check_fields(full, max(head, 1), where)
    # Our config leaves these two None in the usual case.
    if fields.get("num_kv_heads") == fields["num_heads"]:
        del fields["num_kv_heads"]
    if fields.get("head_dim", 0) * fields["num_heads"] == fields["hidden_size"]:
        del fields["head_dim"]
    theta, scaling = read_rotary(full, fields["max_sequence_length"], where)
    # A plain LLaMA is dense.
    factored: dict[str, Any] = {"scope": "none"}
    if kind == FACTORED:
        factored = content.get("loro") or {}
        if not isinstance(factored, dict):
            raise CheckpointError(f"{where}: loro = {reprlib.repr(factored)} is not a JSON object.")
        wrong = [name for name in _FACTORED_FIELDS if name not in factored]
        if wrong:
            raise CheckpointError(f"{where}: loro.{wrong[0]} is missing.")
    known = _FACTORED_FIELDS + _OPTIONAL_FIELDS
    config = LlamaConfig(
        **fields,
        **{name: value for name, value in factored.items() if name in known},
        rope_theta=theta,
        rope_scaling=scaling,
    )
    return validated(config, where)


def _fields(full: dict[str, Any], where: str) -> dict[str, Any]:
    """Reads the fields that have the same value in both formats."""
    fields: dict[str, Any] = {}
    for theirs, ours in _SAME.items():
        if theirs == "tie_word_embeddings":
            value: Any = full.get(theirs)
            if value is not None and not isinstance(value, bool):
                raise CheckpointError(f"{where}: {theirs} = {value!r}; expected true or false.")
        else:
            value = (number if theirs in _FRACTIONS else whole_number)(full, theirs, where)
        if value is not None:
            fields[ours] = value
        elif theirs in _REQUIRED:
            raise CheckpointError(f"{where}: {theirs} is missing; expected a whole number.")
    return fields
