"""Writing a model's adapters in PEFT's format."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from loro_jax.layers.adapters import AdaptedLinear, Adapter
from loro_jax.layers.adapters.adapt import shape_of
from loro_jax.layers.adapters.bone import Bone
from loro_jax.layers.adapters.lora import Lora
from loro_jax.layers.adapters.miss import Miss
from loro_jax.layers.adapters.randlora import RandLora, bases
from models.huggingface.adapter_configs import CONFIG, LORA, MISS, RANDLORA
from models.huggingface.adapter_reading import BASES, PREFIX, TENSORS
from models.huggingface.casts import cast
from models.huggingface.errors import CheckpointError
from models.huggingface.files import DTYPES, check_dtype, new_directory
from models.huggingface.names import PROJECTIONS, layer_prefix
from models.llama import Llama

Tensors = Iterator[tuple[str, Any]]


def write_adapter(
    model: Llama,
    out: str | os.PathLike[str],
    *,
    base: str | None = None,
    dtype: str = "float32",
    start: Llama | None = None,
) -> int:
    """Writes the adapters of a model in PEFT's format.

    LoRA, RandLoRA and MiSS (with Bone's variant BAT) are written as what they are; other kinds
    whose dW is a product of two factors as LoRA.

    Args:
        model: a model with adapters, from :func:`loro_jax.layers.adapters.adapt`.
        out: a directory that does not exist yet.
        base: name or path of the model without adapters, which the directory then names.
        dtype: dtype of the tensors: "float32", "bfloat16" or "float16".
        start: the model before training, if what its adapters added then was subtracted from the
            weights of the base: it is subtracted from the adapters, which makes LoRA of twice the
            rank.

    Returns:
        Total bytes of the tensors.

    Raises:
        CheckpointError: if the model has no adapters, more is trained than they are, PEFT has no
            such adapters, or ``out`` exists or can't be written.
    """
    check_dtype(dtype)
    adapters = _adapters(model)
    first = next(iter(adapters.values()))
    if start is not None:
        content, tensors = _as_lora(adapters, _adapters(start))
    else:
        content, tensors = _FORMS.get(type(first), _as_lora)(adapters)
    content |= {
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "target_modules": [PROJECTIONS[place].rpartition(".")[2] for place in adapters],
        "task_type": "CAUSAL_LM",
    }
    return write_files(out, content, tensors, dtype)


def write_files(
    out: str | os.PathLike[str], content: dict[str, Any], tensors: Tensors, dtype: str
) -> int:
    """Writes the two files of an adapter.

    Args:
        out: a directory that does not exist yet.
        content: content of the config.
        tensors: names and values.
        dtype: dtype of the tensors.

    Returns:
        Total bytes of the tensors.

    Raises:
        CheckpointError: if ``out`` exists or can't be written, or a number does not fit the dtype.
    """
    stored = {name: _on_host(value, dtype, name) for name, value in tensors}
    with new_directory(out) as directory:
        save_file(stored, directory / TENSORS, metadata={"format": "pt"})
        (directory / TENSORS).chmod(0o644)  # safetensors makes it readable by the owner only
        (directory / CONFIG).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    return sum(value.nbytes for value in stored.values())


_Adapters = dict[tuple[str, str], Adapter]


def _adapters(model: Llama) -> _Adapters:
    """Returns the adapters of a model by our module and attribute, stacked over the layers."""
    found: _Adapters = {}
    for part, name in PROJECTIONS:
        layer = getattr(getattr(model.blocks, part), name)
        if isinstance(layer, AdaptedLinear):
            found[part, name] = layer.adapter
            if isinstance(layer.adapter, Bone):
                _check_blocks(name, layer, layer.adapter.b.shape[-1])
    if not found:
        raise CheckpointError("the model has no adapters; expected one that was trained with them.")
    for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if "adapter" not in path:
            name = "/".join(map(str, path))
            raise CheckpointError(
                f"{name} was trained, too, which is not part of an adapter; expected the whole "
                "model to be exported."
            )
    return found


def _check_blocks(name: str, layer: AdaptedLinear, rank: int) -> None:
    *_, m, n = shape_of(layer.base)
    if m % rank or n % rank:
        raise CheckpointError(
            f"{name!r}, {n} inputs to {m} outputs, has no whole blocks of {rank} x {rank}, which "
            "PEFT needs; expected the whole model to be exported."
        )


def _on_host(value: Any, dtype: str, name: str) -> np.ndarray:
    return np.ascontiguousarray(cast(np.asarray(value), DTYPES[dtype], name))


def _named(adapters: _Adapters, variables: dict[str, dict[tuple[str, str], Any]]) -> Tensors:
    """Yields tensors by PEFT's names, from arrays stacked over the layers."""
    for place in adapters:
        for name, arrays in variables.items():
            for layer, value in enumerate(np.asarray(arrays[place])):
                yield f"{PREFIX}{layer_prefix(layer)}{PROJECTIONS[place]}.{name}", value


def _of_lora(adapters: _Adapters) -> tuple[dict[str, Any], Tensors]:
    A = {place: adapter.A[...] for place, adapter in _each(adapters, Lora)}
    B = {place: adapter.B[...] for place, adapter in _each(adapters, Lora)}
    _, first = next(_each(adapters, Lora))
    rank = first.A.shape[-2]
    content = lora_content(rank, first.scale * rank)
    return content, _named(adapters, {"lora_A.weight": A, "lora_B.weight": B})


def _as_lora(adapters: _Adapters, start: _Adapters | None = None) -> tuple[dict[str, Any], Tensors]:
    """Returns the content of other kinds with two factors, whose scale is a part of B."""
    A, B = {}, {}
    for place, adapter in adapters.items():
        B[place], A[place] = factors_of(adapter, None if start is None else start[place])
    rank = next(iter(A.values())).shape[-2]
    content = lora_content(rank, rank)
    return content, _named(adapters, {"lora_A.weight": A, "lora_B.weight": B})


def factors_of(adapter: Adapter, start: Adapter | None = None) -> tuple[Any, Any]:
    """Returns B and A of an adapter whose dW is their product; the scale is a part of B.

    Args:
        adapter: the adapter.
        start: the adapter as it was when its dW was subtracted from the weights of the base; the
            product leaves that out, at twice the rank.

    Raises:
        CheckpointError: if it is none.
    """
    factors = adapter.factors()
    if factors is None:
        raise CheckpointError(
            f"adapters of class {type(adapter).__name__} have no counterpart in PEFT; expected the "
            "whole model to be exported."
        )
    if start is None:
        return factors
    (B, A), (B_0, A_0) = factors, factors_of(start)
    return jnp.concatenate([B, -B_0], axis=-1), jnp.concatenate([A, A_0], axis=-2)


def lora_content(rank: int, alpha: float) -> dict[str, Any]:
    """Returns the fields of a config that are LoRA's own."""
    return {
        "peft_type": LORA,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": 0.0,
        "use_rslora": False,
        "init_lora_weights": True,
        "fan_in_fan_out": False,
    }


def _of_miss(adapters: _Adapters) -> tuple[dict[str, Any], Tensors]:
    b = {place: adapter.b[...] for place, adapter in _each(adapters, Miss)}
    return _miss_content(next(iter(b.values())).shape[-2], True), _named(
        adapters, {"miss_block": b}
    )


def _of_bone(adapters: _Adapters) -> tuple[dict[str, Any], Tensors]:
    b = {place: adapter.b[...] for place, adapter in _each(adapters, Bone)}
    return _miss_content(next(iter(b.values())).shape[-1], "bat"), _named(
        adapters, {"miss_block": b}
    )


def _miss_content(rank: int, variant: bool | str) -> dict[str, Any]:
    return {"peft_type": MISS, "r": rank, "miss_dropout": 0.0, "init_weights": variant}


def _of_randlora(adapters: _Adapters) -> tuple[dict[str, Any], Tensors]:
    found = dict(_each(adapters, RandLora))
    first = next(iter(found.values()))
    rank = first.l.shape[-2]
    # PEFT's scale has no root of the number of bases: it becomes a part of lambda.
    alpha = _plain(first.scale * math.sqrt(first.l.shape[-1]) * rank)
    l = {p: adapter.l[...] * (adapter.scale * rank / alpha) for p, adapter in found.items()}  # noqa: E741
    g = {place: adapter.g[...] for place, adapter in found.items()}
    # One pair of bases for all, of which each projection takes the part of its size.
    m, n = (max(sizes) for sizes in zip(*(a.shape for a in found.values()), strict=True))
    B, A = bases(first.seed[...].reshape(-1)[0], m, n, rank)
    content = {
        "peft_type": RANDLORA,
        "r": rank,
        "randlora_alpha": alpha,
        "randlora_dropout": 0.0,
        "save_projection": True,
        "init_weights": True,
        "fan_in_fan_out": False,
    }

    def tensors() -> Tensors:
        yield from _named(adapters, {"randlora_lambda": l, "randlora_gamma": g})
        yield BASES[0], A[:, None, :]
        yield BASES[1], B.reshape(B.shape[0], -1, rank)

    return content, tensors()


_FORMS: dict[type, Any] = {Lora: _of_lora, Miss: _of_miss, Bone: _of_bone, RandLora: _of_randlora}


def _each(adapters: _Adapters, kind: type) -> Iterator[tuple[tuple[str, str], Any]]:
    assert all(isinstance(adapter, kind) for adapter in adapters.values())  # by one adapt()
    yield from adapters.items()


def _plain(number: float) -> float | int:
    """Returns a whole number as an int, as PEFT writes it, and without rounding errors."""
    rounded = round(number, 6)
    return int(rounded) if rounded == int(rounded) else number
