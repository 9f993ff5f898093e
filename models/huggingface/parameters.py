"""Reading the parameters of a directory in the form that a model needs."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from loro_jax.layers.projections import arrays_of_weight, holds_a_weight
from loro_jax.linalg.precision import at_least_float32
from loro_jax.lowrank import from_dense
from models.huggingface.casts import cast
from models.huggingface.configs import from_huggingface
from models.huggingface.errors import CheckpointError
from models.huggingface.files import read_json
from models.huggingface.names import (
    EMBEDDING,
    HEAD,
    NORM,
    NORMS,
    PROJECTIONS,
    layer_prefix,
    variable_name,
)
from models.huggingface.tensors import Tensors
from models.llama import Llama, LlamaConfig


class LayerError(NamedTuple):
    """Truncation error of a projection's SVD.

    Attributes:
        name: Hugging Face's name of the projection.
        shape: shape of the matrix.
        rank: rank kept.
        error: ``|W - B A| / |W|`` in the Frobenius norm; 0 for a matrix of zeros.
        zero: whether the matrix, and so both factors, are zero: a stationary point, where all
            gradients vanish.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    error: float
    zero: bool = False


def read_parameters(
    directory: str | os.PathLike[str], wanted: dict[str, Any]
) -> tuple[dict[str, Any], list[LayerError]]:
    """Reads the parameters of a directory in the form that a model needs.

    A low-rank projection stored as a matrix is factorised by its truncated SVD; an adapter
    (a matrix with factors) takes the stored matrix and keeps its own factors; kinds that hold all
    of a matrix in parts ("sst", "osft") are made of it.

    Args:
        directory: directory with ``config.json`` and safetensors.
        wanted: parameters and fixed arrays of the model, a nested dict: their shapes, dtypes and,
            for adapters, values.

    Returns:
        (arrays on the host in the structure of ``wanted``, the error of each factorised
        projection).

    Raises:
        CheckpointError: for a missing, extra or damaged tensor, a wrong shape, numbers that are
            not finite or that the wanted dtype can't hold, or projections that can't be converted
            from the stored form.
    """
    tensors, num_layers = _checked(pathlib.Path(directory), wanted)

    def read(name: str, like: Any) -> np.ndarray:
        value = tensors.read(name)
        if not jnp.issubdtype(like.dtype, jnp.floating):
            if not np.issubdtype(value.dtype, np.integer):
                raise CheckpointError(
                    f"{directory}: {name} is stored as {value.dtype}; expected whole numbers."
                )
            return value
        return cast(value, like.dtype, f"{directory}: {name}")

    # Tensor by tensor: besides the result, only one stacked projection is in memory.
    result: dict[str, Any] = {"norm": {"scale": read(NORM, wanted["norm"]["scale"])}}
    result["embedding"] = read(EMBEDDING, wanted["embedding"])
    if "head" in wanted:
        result["head"] = {"W": read(HEAD, wanted["head"]["W"])}
    blocks: dict[str, Any] = {"attention": {}, "mlp": {}}
    prefixes = [layer_prefix(layer) for layer in range(num_layers)]
    errors: list[LayerError] = []
    for (part, name), theirs in PROJECTIONS.items():
        places = wanted["blocks"][part][name]
        names = [f"{prefix}{theirs}" for prefix in prefixes]
        arrays, left_out = _projection(tensors, names, places, read)
        blocks[part][name] = arrays
        errors += left_out
    for ours, theirs in NORMS.items():
        like = wanted["blocks"][ours]["scale"]
        scales = [read(f"{prefix}{theirs}.weight", like) for prefix in prefixes]
        blocks[ours] = {"scale": np.stack(scales)}
    return result | {"blocks": blocks}, errors


def check_parameters(directory: str | os.PathLike[str], wanted: dict[str, Any]) -> None:
    """Checks a directory as :func:`read_parameters` does, without reading tensors.

    Args:
        directory: directory with ``config.json`` and safetensors.
        wanted: as in :func:`read_parameters`; shapes and dtypes suffice.

    Raises:
        CheckpointError: as :func:`read_parameters`, but for the values of tensors.
    """
    _checked(pathlib.Path(directory), wanted)


def _checked(path: pathlib.Path, wanted: dict[str, Any]) -> tuple[Tensors, int]:
    """Opens the tensors of a directory and checks them; returns them and the number of layers."""
    config = from_huggingface(read_json(path / "config.json"), str(path / "config.json"))
    tensors = Tensors(path, config.tie_embeddings)
    _check(config, tensors, path)
    varied = bool(config.ranks)
    for (part, name), theirs in PROJECTIONS.items():
        own = f"{layer_prefix(0)}{theirs}"
        stored, places = _stored(tensors, own), wanted["blocks"][part][name]
        converts = "W" in places or set(places) == {"B", "A"} or holds_a_weight(places)
        if stored == {"weight"} and converts:
            continue  # shapes follow from the config, which the caller has compared
        if stored != {variable_name(variable) for variable in places}:
            raise CheckpointError(
                f"{path}: {own} is stored as {', '.join(sorted(stored))}; expected "
                f"{', '.join(sorted(map(variable_name, places)))}, which can't be made of it."
            )
        for variable, like in sorted(places.items()):
            shape = tensors.shape(f"{own}.{variable_name(variable)}")
            if _with_rank(shape, variable, like.shape[1:], varied) != tuple(like.shape[1:]):
                raise CheckpointError(
                    f"{path}: {own}.{variable_name(variable)} has shape {shape}; expected "
                    f"{tuple(like.shape[1:])}."
                )
    return tensors, config.num_layers


def _stored(tensors: Tensors, projection: str) -> set[str]:
    """Returns the names of a projection's stored variables."""
    prefix = f"{projection}."
    return {name.removeprefix(prefix) for name in tensors.names if name.startswith(prefix)}


def _projection(
    tensors: Tensors,
    names: Sequence[str],
    places: dict[str, Any],
    read: Callable[[str, Any], np.ndarray],
) -> tuple[dict[str, np.ndarray], list[LayerError]]:
    """Reads one projection of all layers, stacked, in the form that the model needs."""

    def stacked(variable: str) -> np.ndarray:
        like = places[variable]
        found = [read(f"{name}.{variable_name(variable)}", like) for name in names]
        if variable in ("B", "A"):
            found = [_padded(value, like.shape[1:]) for value in found]
        return np.stack(found)

    # Stored in the form that is needed: nothing is converted. (All layers are alike: _check.)
    if _stored(tensors, names[0]) == {variable_name(variable) for variable in places}:
        return {variable: stacked(variable) for variable in places}, []
    # An adapter around the stored matrix; its factors stay as they were initialised.
    if "W" in places:
        fresh = {variable: np.asarray(value) for variable, value in places.items()}
        return fresh | {"W": stacked("W")}, []
    rank = places["B"].shape[-1]
    matrices = [read(f"{name}.weight", places["B"]) for name in names]
    if holds_a_weight(places):
        return _in_parts(matrices, rank, places), []
    pairs = [_factorise(W, rank, name) for W, name in zip(matrices, names, strict=True)]
    both = {variable: np.stack([factors[variable] for factors, _ in pairs]) for variable in places}
    return both, [error for _, error in pairs]


def _in_parts(
    matrices: Sequence[np.ndarray], rank: int, places: dict[str, Any]
) -> dict[str, np.ndarray]:
    """Makes the parts of stacked matrices, all of which they hold."""
    stack = jnp.asarray(np.stack(matrices), at_least_float32(matrices[0].dtype))
    parts = arrays_of_weight(places, stack, rank)
    return {name: np.asarray(parts[name], like.dtype) for name, like in places.items()}


def _padded(value: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Pads a factor by zeros to the rank of the other layers, which leaves the product as it is."""
    missing = [(0, size - own) for size, own in zip(shape, value.shape, strict=True)]
    return np.pad(value, missing) if any(map(any, missing)) else value


def _factorise(W: np.ndarray, rank: int, name: str) -> tuple[dict[str, np.ndarray], LayerError]:
    """Computes balanced factors of a matrix, and their truncation error."""
    # Factorised and compared in float32 or wider; only the results are rounded.
    full = jnp.asarray(W, at_least_float32(W.dtype))
    B, A = from_dense(full, rank)
    size = float(jnp.linalg.norm(full))
    error = float(jnp.linalg.norm(full - B @ A)) / size if size else 0.0
    factors = {"B": np.asarray(B, W.dtype), "A": np.asarray(A, W.dtype)}
    return factors, LayerError(name, W.shape, rank, error, zero=not W.any())


def _with_rank(
    shape: tuple[int, ...], variable: str, expected: Sequence[int], varied: bool
) -> tuple[int, ...]:
    """Returns the shape of a stored tensor, with the expected rank if a smaller one is allowed."""
    axis = {"B": 1, "A": 0}.get(variable)
    if not varied or axis is None or len(shape) != 2 or not 0 < shape[axis] <= expected[axis]:
        return shape
    return (shape[0], expected[1]) if axis else (expected[0], shape[1])


def _expected(config: LlamaConfig) -> Iterator[tuple[str, Any]]:
    """Yields names, shapes and dtypes of the tensors that a config needs."""
    model = nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0)))
    state = nnx.to_pure_dict(nnx.state(model))
    yield EMBEDDING, state["embedding"]
    yield NORM, state["norm"]["scale"]
    if "head" in state:
        yield HEAD, state["head"]["W"]
    for layer in range(config.num_layers):
        for theirs, value in _layer(state["blocks"], layer):
            yield theirs, jax.ShapeDtypeStruct(value.shape[1:], value.dtype)


def _layer(blocks: Any, layer: int) -> Iterator[tuple[str, Any]]:
    """Yields Hugging Face's names of a layer's tensors with our stacked arrays."""
    prefix = layer_prefix(layer)
    for (part, name), theirs in PROJECTIONS.items():
        for variable, value in blocks[part][name].items():
            yield f"{prefix}{theirs}.{variable_name(variable)}", value
    for ours, theirs in NORMS.items():
        yield f"{prefix}{theirs}.weight", blocks[ours]["scale"]


def _check(config: LlamaConfig, tensors: Tensors, path: pathlib.Path) -> None:
    expected = dict(_expected(config))
    found = tensors.names
    for what, names in (
        ("missing", expected.keys() - found),
        ("not expected", found - set(expected)),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckpointError(f"{path}: {min(names)} is {what}{more}.")
    for name, like in expected.items():
        shape = _with_rank(tensors.shape(name), name[-1], like.shape, bool(config.ranks))
        if shape != tuple(like.shape):
            raise CheckpointError(
                f"{path}: {name} has shape {tensors.shape(name)}; config.json requires "
                f"{tuple(like.shape)}."
            )
        if name.endswith(".B") and config.ranks:
            other = tensors.shape(f"{name[:-1]}A")
            if tensors.shape(name)[1] != other[0]:
                raise CheckpointError(
                    f"{path}: {name} has shape {tensors.shape(name)}, but its A has shape {other}; "
                    "expected one rank."
                )
    # Indices of sparse entries and counters are whole numbers.
    floating = (n for n, like in expected.items() if jnp.issubdtype(like.dtype, jnp.floating))
    tensors.check_floating(floating)
