"""Rotary embeddings in a ``config.json``, in the formats before and since transformers 5.

Base and scaling are in ``rope_parameters``, or (before transformers 5) the base in ``rope_theta``
and the scaling in ``rope_scaling``. If both are present, precedence is that of transformers 5:
``rope_scaling`` over ``rope_parameters``, and a base inside the chosen one over ``rope_theta``.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from models.huggingface.errors import CheckpointError
from models.huggingface.fields import number, whole_number
from models.llama import LlamaConfig
from models.rope import RopeScaling


def write_rotary(config: LlamaConfig) -> dict[str, Any]:
    """Returns the fields for rotary embeddings, in both formats.

    Args:
        config: config of a model.

    Returns:
        ``rope_theta``, ``rope_scaling`` and ``rope_parameters``.

    Example:
        >>> write_rotary(LlamaConfig())["rope_parameters"]
        {'rope_theta': 10000.0, 'rope_type': 'default'}
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
    return {
        "rope_theta": config.rope_theta,
        # Contains the base too, because transformers 5 prefers this field to rope_parameters.
        "rope_scaling": None if scaling.kind == "none" else rope,
        "rope_parameters": rope,
    }


def read_rotary(content: Mapping[str, Any], length: int, where: str) -> tuple[float, RopeScaling]:
    """Reads the base and the scaling of the rotary frequencies.

    Args:
        content: content of a ``config.json``.
        length: longest sequence that the model accepts.
        where: name of the file, for messages.

    Returns:
        (base, scaling).

    Raises:
        CheckpointError: for an unsupported kind of scaling, or a missing or invalid number.

    Example:
        >>> scaling = {"type": "linear", "factor": 2.0}
        >>> read_rotary({"rope_theta": 5e5, "rope_scaling": scaling}, 2048, "config.json")[0]
        500000.0
    """
    # Ends at the first that is not empty; `found` and `place` are used below.
    for place in ("rope_scaling", "rope_parameters"):
        found = content.get(place)
        if found is not None and not isinstance(found, dict):
            raise CheckpointError(f"{where}: {place} = {reprlib.repr(found)} is not a JSON object.")
        if found:
            break
    found = {name: value for name, value in (found or {}).items() if value is not None}
    inside = f"{where}: {place}"
    for name, value in found.items():
        # Parameters per kind of layer, or sections for images (multimodal rotary embeddings).
        if isinstance(value, dict) or name == "mrope_section":
            raise CheckpointError(f"{inside}.{name} = {reprlib.repr(value)} is not supported.")
    if found.get("partial_rotary_factor", 1) != 1:
        raise CheckpointError(
            f"{inside}.partial_rotary_factor = {found['partial_rotary_factor']!r} is not supported;"
            " expected 1."
        )
    base = number(found, "rope_theta", inside) or number(content, "rope_theta", where)
    base = 10000.0 if base is None else float(base)
    if base <= 0:
        raise CheckpointError(f"{where}: rope_theta = {base!r}; expected a number above 0.")
    return base, _scaling(found, content, length, (where, inside))


def _scaling(
    found: dict[str, Any], content: Mapping[str, Any], length: int, where: tuple[str, str]
) -> RopeScaling:
    kind = found.get("rope_type", found.get("type", "default"))
    if kind == "default":
        return RopeScaling()  # all other fields are ignored, as in transformers
    if kind not in ("linear", "llama3"):
        raise CheckpointError(
            f"{where[1]}: rope_type = {kind!r} is not supported; expected default, linear or "
            "llama3."
        )
    needed = ("factor",) if kind == "linear" else ("factor", "low_freq_factor", "high_freq_factor")
    values: list[float] = []
    for name in needed:
        value = number(found, name, where[1])
        if value is None:
            raise CheckpointError(f"{where[1]}.{name} is missing.")
        values.append(float(value))
    if kind == "linear":
        return RopeScaling("linear", values[0])
    factor, low, high = values
    # The format has it inside the scaling; transformers 5 prefers the outer field if present.
    name = "original_max_position_embeddings"
    original = whole_number(content, name, where[0]) or whole_number(found, name, where[1])
    return RopeScaling("llama3", factor, low, high, original or length)
