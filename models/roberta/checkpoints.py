"""Reading and writing directories in Hugging Face's format.

``config.json`` with ``model.safetensors`` (or several files and their index): of a bare encoder,
with or without the prefix ``roberta.``; of pretraining, whose ``lm_head`` is ignored; or of a
classifier.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.huggingface.casts import cast, cast_all
from models.huggingface.companions import TokenIds
from models.huggingface.errors import CheckpointError
from models.huggingface.files import check_dtype, new_directory, write_tensors
from models.huggingface.frame import read_directory
from models.huggingface.tensors import StoredTensors
from models.roberta.config import RobertaConfig, from_huggingface, to_huggingface
from models.roberta.names import (
    IGNORED,
    NORMS,
    PREFIX,
    PROJECTIONS,
    layer_prefix,
    leaves,
    stored_name,
)
from models.roberta.network import Roberta, RobertaClassifier

SHARD_BYTES = 5_000_000_000
Model = TypeVar("Model", bound=Roberta)

# Names that the first checkpoints have for the weights of norms.
_OLD = {".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias"}


class RobertaTensors(StoredTensors):
    """The tensors of a directory, by the names of a model with a head."""

    def _rename(self) -> None:
        for name in list(self._files):
            new = name
            for old, now in _OLD.items():
                new = new.replace(old, now)
            # Files of a bare encoder have no prefix.
            if not new.startswith((PREFIX, "classifier.", "lm_head.")):
                new = f"{PREFIX}{new}"
            self._files[new] = self._files.pop(name)


def read_config(directory: str | os.PathLike[str], *, dtype: str | None = None) -> RobertaConfig:
    """Reads the config of the RoBERTa in a directory.

    Args:
        directory: directory with ``config.json`` and safetensors.
        dtype: dtype of parameters and products; None: as stored.

    Returns:
        The config.

    Raises:
        CheckpointError: if it is missing, not that of a RoBERTa that we can represent, or if the
            dtype is unknown.
    """

    def stored(path: pathlib.Path, config: RobertaConfig) -> str:
        return RobertaTensors(path).dtype()

    return read_directory(directory, from_huggingface, stored, dtype)


def read_roberta(directory: str | os.PathLike[str], *, dtype: str | None = None) -> Roberta:
    """Reads the encoder of a directory, with its pooler if one is stored.

    Args:
        directory: directory with ``config.json`` and safetensors.
        dtype: dtype of parameters and products; None: as stored.

    Returns:
        The encoder.

    Raises:
        CheckpointError: if the directory holds no RoBERTa, or a tensor is missing, not expected,
            damaged or of a wrong shape.
    """
    path = pathlib.Path(directory)
    config = read_config(path, dtype=dtype)
    tensors = RobertaTensors(path)
    pooler = "roberta.pooler.dense.weight" in tensors.names
    model = nnx.eval_shape(lambda: Roberta(config, nnx.Rngs(0), pooler=pooler))
    return _filled(model, tensors, path, fresh=())


def read_classifier(
    directory: str | os.PathLike[str],
    *,
    num_labels: int | None = None,
    dtype: str | None = None,
    seed: int = 0,
) -> tuple[RobertaClassifier, list[str]]:
    """Reads a classifier; a directory without a head gets a new one.

    Args:
        directory: directory with ``config.json`` and safetensors.
        num_labels: outputs of the head; None: as in the directory.
        dtype: dtype of parameters and products; None: as stored.
        seed: seed of a new head.

    Returns:
        (the model, lines to show: whether the head is new).

    Raises:
        CheckpointError: as :func:`read_roberta`, and for a stored head with another number of
            labels.

    Example:
        >>> import tempfile
        >>> config = RobertaConfig(64, 32, num_layers=2, num_heads=4, intermediate_size=48)
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     _ = write_roberta(Roberta(config, nnx.Rngs(0)), f"{parent}/encoder")
        ...     model, notes = read_classifier(f"{parent}/encoder", num_labels=3)
        >>> model(jnp.full((1, 4), 7)).shape, len(notes)
        ((1, 3), 1)
    """
    path = pathlib.Path(directory)
    config = read_config(path, dtype=dtype)
    if num_labels is not None:
        config = dataclasses.replace(config, num_labels=num_labels)
    tensors = RobertaTensors(path)
    model = nnx.eval_shape(lambda: RobertaClassifier(config, nnx.Rngs(seed)))
    fresh = _fresh(tensors)
    filled = _filled(model, tensors, path, fresh)
    if not fresh:
        return filled, []
    # Drawn as a whole model's would be: the head of a seed does not depend on the directory.
    filled.classifier = RobertaClassifier(config, nnx.Rngs(seed)).classifier
    note = f"{path} has no head: a new one with {config.num_labels} output(s), from seed {seed}"
    return filled, [note]


def check_classifier(directory: str | os.PathLike[str], num_labels: int) -> None:
    """Checks a directory as :func:`read_classifier` does, without reading tensors.

    Args:
        directory: directory with ``config.json`` and safetensors.
        num_labels: outputs of the head.

    Raises:
        CheckpointError: as :func:`read_classifier`, but for the values of tensors.
    """
    path = pathlib.Path(directory)
    config = dataclasses.replace(read_config(path), num_labels=num_labels)
    tensors = RobertaTensors(path)
    model = nnx.eval_shape(lambda: RobertaClassifier(config, nnx.Rngs(0)))
    _check(_expected(nnx.to_pure_dict(nnx.state(model)), config, _fresh(tensors)), tensors, path)


def _fresh(tensors: RobertaTensors) -> tuple[str, ...]:
    """Returns the prefix of what a classifier's directory may lack: the head."""
    stored = any(name.startswith("classifier.") for name in tensors.names)
    return () if stored else ("classifier.",)


def _filled(
    model: Model, tensors: RobertaTensors, path: pathlib.Path, fresh: tuple[str, ...]
) -> Model:
    """Returns an abstract model with its arrays read; those with a prefix of ``fresh`` are not."""
    graphdef, state = nnx.split(model)
    wanted = nnx.to_pure_dict(state)
    layers = model.config.num_layers
    _check(_expected(wanted, model.config, fresh), tensors, path)

    def read(at: tuple[str, ...], like: Any) -> Any:
        if fresh and stored_name(at).startswith(fresh):
            return jnp.zeros(like.shape, like.dtype)

        def one(layer: int = 0) -> np.ndarray:
            name = stored_name(at, layer)
            return cast(tensors.read(name), like.dtype, f"{path}: {name}")

        # Tensor by tensor: besides the result, only one stack is in memory twice.
        return jnp.asarray(np.stack([one(i) for i in range(layers)]) if _in_blocks(at) else one())

    state.replace_by_pure_dict(_mapped(read, wanted))
    return nnx.merge(graphdef, state)


def _mapped(read: Any, tree: dict[str, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        name: _mapped(read, value, (*path, name))
        if isinstance(value, dict)
        else read((*path, name), value)
        for name, value in tree.items()
    }


def _in_blocks(path: tuple[str, ...]) -> bool:
    return path[0] == "blocks"


def _expected(
    wanted: dict[str, Any], config: RobertaConfig, fresh: tuple[str, ...]
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors that a directory must have, by name."""
    shapes = _shapes(wanted, config.num_layers)
    return {name: shape for name, shape in shapes if not (fresh and name.startswith(fresh))}


def _shapes(wanted: dict[str, Any], layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields names and shapes of the tensors that a model needs."""
    for path, like in leaves(wanted):
        if not _in_blocks(path):
            yield stored_name(path), tuple(like.shape)
            continue
        for layer in range(layers):
            yield stored_name(path, layer), tuple(like.shape[1:])


def _check(
    expected: Mapping[str, tuple[int, ...]], tensors: RobertaTensors, path: pathlib.Path
) -> None:
    """Raises CheckpointError for tensors that are missing, too many, or of a wrong shape."""
    found = {name for name in tensors.names if name in expected or not name.startswith(IGNORED)}
    # An encoder is read from a classifier's directory, too.
    if not any(name.startswith("classifier.") for name in expected):
        found = {name for name in found if not name.startswith("classifier.")}
    for what, names in (
        ("missing", expected.keys() - found),
        ("not expected", found - set(expected)),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckpointError(f"{path}: {min(names)} is {what}{more}.")
    for name, shape in expected.items():
        if tensors.shape(name) != shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tensors.shape(name)}; expected {shape}."
            )
    tensors.check_floating(expected)


def write_roberta(
    model: Roberta,
    out: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    labels: tuple[str, ...] | None = None,
    files: Mapping[str, bytes] | None = None,
    token_ids: TokenIds | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Writes an encoder or a classifier; projections with factors are merged.

    Args:
        model: the model.
        out: a directory that does not exist yet.
        dtype: dtype of the tensors: "float32", "bfloat16" or "float16".
        labels: names of the labels; None: ``LABEL_0``, ...
        files: contents of additional files by name, such as the tokenizer's.
        token_ids: ``bos_token_id`` and ``eos_token_id``, for ``config.json``.
        shard_bytes: upper bound on a file's size.

    Returns:
        Total bytes of the tensors.

    Raises:
        CheckpointError: if ``out`` exists or can't be written, the dtype is unknown, the number of
            labels is wrong, or a tensor holds numbers that are not finite or that the dtype can't
            hold.
    """
    check_dtype(dtype)
    head = isinstance(model, RobertaClassifier)
    if labels is not None and (not head or len(labels) != model.config.num_labels):
        outputs = model.config.num_labels if head else "no"
        raise CheckpointError(f"{len(labels)} labels for a model of {outputs} outputs.")
    content = to_huggingface(model.config, dtype, labels, head) | dict(token_ids or {})
    with new_directory(out) as directory:
        total = write_tensors(directory, cast_all(_tensors(model), dtype), shard_bytes)
        (directory / "config.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        for name, data in (files or {}).items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(data)
    return total


def _tensors(model: Roberta) -> Iterator[tuple[str, jax.Array]]:
    """Yields all tensors by their names, in the order of the computation."""
    yield from _plain(("embeddings",), model.embeddings)
    # Merged layer by layer: the dense matrices of only one layer exist at a time.
    graphdef, stacked = nnx.split(model.blocks)
    for layer in range(model.config.num_layers):
        block = nnx.merge(graphdef, jax.tree.map(lambda x, layer=layer: x[layer], stacked))
        prefix = layer_prefix(layer)
        for path, theirs in PROJECTIONS.items():
            projection = getattr(getattr(block, path[0]), path[1])
            yield f"{prefix}{theirs}.weight", projection.weight()
            yield f"{prefix}{theirs}.bias", projection.bias[...]
        for path, theirs in NORMS.items():
            norm = getattr(block, path[0])
            yield f"{prefix}{theirs}.weight", norm.scale[...]
            yield f"{prefix}{theirs}.bias", norm.bias[...]
    if model.pooler is not None:
        yield from _dense("roberta.pooler.dense", model.pooler)
    if isinstance(model, RobertaClassifier):
        for name in ("dense", "out_proj"):
            yield from _dense(f"classifier.{name}", getattr(model.classifier, name))


def _plain(path: tuple[str, ...], module: nnx.Module) -> Iterator[tuple[str, jax.Array]]:
    for below, value in leaves(nnx.to_pure_dict(nnx.state(module))):
        yield stored_name((*path, *below)), value


def _dense(name: str, projection: Any) -> Iterator[tuple[str, jax.Array]]:
    yield f"{name}.weight", projection.weight()
    yield f"{name}.bias", projection.bias[...]
