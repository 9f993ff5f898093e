"""Writing the adapters of a classifier, with its head, in PEFT's format."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from flax import nnx

from loro_jax.layers.adapters import AdaptedLinear, Adapter
from loro_jax.layers.adapters.lora import Lora
from models.huggingface.adapter_reading import PREFIX
from models.huggingface.adapter_writing import Tensors, factors_of, lora_content, write_files
from models.huggingface.errors import CheckpointError
from models.huggingface.files import check_dtype
from models.roberta.names import PROJECTIONS, layer_prefix
from models.roberta.network import RobertaClassifier

_Adapters = dict[tuple[str, ...], Adapter]


def write_classifier_adapter(
    model: RobertaClassifier,
    out: str | os.PathLike[str],
    *,
    base: str | None = None,
    dtype: str = "float32",
    start: RobertaClassifier | None = None,
) -> int:
    """Writes the adapters of a classifier as LoRA, and its head, in PEFT's format.

    The base is read by others with the head's number of labels: ``num_labels`` of transformers.

    Args:
        model: a classifier with adapters whose dW is a product of two factors.
        out: a directory that does not exist yet.
        base: name or path of the model without adapters, which the directory then names.
        dtype: dtype of the tensors: "float32", "bfloat16" or "float16".
        start: the model before training, if what its adapters added then was subtracted from the
            weights of the base, as in :func:`models.huggingface.adapter_writing.write_adapter`.

    Returns:
        Total bytes of the tensors.

    Raises:
        CheckpointError: if the model has no such adapters, more is trained than they and the head,
            or ``out`` exists or can't be written.
    """
    check_dtype(dtype)
    adapters = _adapters(model)
    first = next(iter(adapters.values()))
    if start is None and isinstance(first, Lora):
        # As PEFT's own: the scale is alpha's.
        factors = {path: (one.B[...], one.A[...]) for path, one in _of_lora(adapters).items()}
        alpha: float | None = first.scale * first.A.shape[-2]
    else:
        before = {} if start is None else _adapters(start)
        factors = {path: factors_of(one, before.get(path)) for path, one in adapters.items()}
        alpha = None
    rank = next(iter(factors.values()))[1].shape[-2]
    content = lora_content(rank, rank if alpha is None else alpha) | {
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "target_modules": _targets(adapters),
        "modules_to_save": ["classifier"],
        "task_type": "SEQ_CLS",
    }
    return write_files(out, content, _tensors(model, factors), dtype)


def _adapters(model: RobertaClassifier) -> _Adapters:
    """Returns the adapters by our path in a block, stacked over the layers."""
    layers = {path: getattr(getattr(model.blocks, path[0]), path[1]) for path in PROJECTIONS}
    found: _Adapters = {
        path: layer.adapter for path, layer in layers.items() if isinstance(layer, AdaptedLinear)
    }
    if not found:
        raise CheckpointError("the model has no adapters; expected one that was trained with them.")
    for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if "adapter" not in path and path[0] != "classifier":
            name = "/".join(map(str, path))
            raise CheckpointError(
                f"{name} was trained, too, which is part of neither adapters nor head; expected "
                "the whole model to be exported."
            )
    return found


def _of_lora(adapters: _Adapters) -> dict[tuple[str, ...], Any]:
    assert all(isinstance(adapter, Lora) for adapter in adapters.values())  # by one adapt()
    return dict(adapters)


def _targets(adapters: _Adapters) -> list[str] | str:
    """Returns PEFT's names of the projections with adapters, which are ends of modules' names."""
    names = [PROJECTIONS[path] for path in adapters]
    # "output.dense" is the end of attention's output, too.
    if "output.dense" in names and "attention.output.dense" not in names:
        return rf"roberta\.encoder\.layer\.\d+\.({'|'.join(names)})".replace(".dense", r"\.dense")
    return names


def _tensors(model: RobertaClassifier, factors: dict[tuple[str, ...], tuple[Any, Any]]) -> Tensors:
    for path, (B, A) in factors.items():
        for name, stacked in (("lora_A", A), ("lora_B", B)):
            for layer, value in enumerate(np.asarray(stacked)):
                yield f"{PREFIX}{layer_prefix(layer)}{PROJECTIONS[path]}.{name}.weight", value
    for name in ("dense", "out_proj"):
        projection = getattr(model.classifier, name)
        yield f"{PREFIX}classifier.{name}.weight", projection.weight()
        yield f"{PREFIX}classifier.{name}.bias", projection.bias[...]
