"""Reading adapters in PEFT's format: as changes of a model's weights, or as adapters to train on.

A directory holds ``adapter_config.json`` and ``adapter_model.safetensors``, whose tensors are named
by the projection that they change:

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight     (r x in)
"""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from loro_jax.layers.adapters.bone import mixed
from loro_jax.layers.adapters.miss import repeated
from loro_jax.layers.adapters.randlora import bases_of, scaled
from models.config import LlamaConfig
from models.huggingface.adapter_configs import (
    ADALORA,
    CONFIG,
    LORA,
    MISS,
    RANDLORA,
    PeftConfig,
    place_of,
    read_adapter_config,
)
from models.huggingface.casts import cast
from models.huggingface.errors import CheckpointError
from models.huggingface.names import PROJECTIONS
from models.huggingface.tensors import StoredTensors
from models.llama import Llama

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# RandLoRA's bases, which the file may repeat for each projection.
BASES = ("base_model.randlora_A", "base_model.randlora_B")

# Names of a projection's tensors by PEFT's form.
_VARIABLES = {
    LORA: ("lora_A.weight", "lora_B.weight"),
    ADALORA: ("lora_A", "lora_B", "lora_E"),
    RANDLORA: ("randlora_lambda", "randlora_gamma"),
    MISS: ("miss_block",),
}

_Place = tuple[str, str]


class AdapterTensors(StoredTensors):
    """The tensors of an adapter."""

    file = TENSORS


class StoredAdapter(NamedTuple):
    """An adapter in PEFT's format, checked against its base.

    Attributes:
        config: its config.
        modules: its tensors in float32, by projection and by PEFT's names of them.
        bases: RandLoRA's A and B; empty for others.
    """

    config: PeftConfig
    modules: dict[str, dict[str, np.ndarray]]
    bases: tuple[np.ndarray, ...]

    def change(self, module: str, W: np.ndarray) -> np.ndarray:
        """Returns dW of a projection in float32.

        Args:
            module: Hugging Face's name of it.
            W: its weight, (out, in).
        """
        own, config = self.modules[module], self.config
        if config.form == LORA:
            scale = config.scale_of(module)
            return scale * (own["lora_B.weight"] @ own["lora_A.weight"])
        if config.form == ADALORA:
            # PEFT divides by the rank of the start, plus a little.
            scale = (config.alpha if config.alpha > 0 else config.rank) / (config.rank + 1e-5)
            return scale * (own["lora_B"] @ (own["lora_E"] * own["lora_A"]))
        if config.form == RANDLORA:
            return self._change_of_randlora(own, *W.shape)
        b = jnp.asarray(own["miss_block"])
        if b.ndim == 3:
            return np.asarray(mixed(b, jnp.asarray(W, jnp.float32)))
        # A block of fewer outputs is repeated.
        return np.asarray(repeated(jnp.tile(b, (1, W.shape[0] // b.shape[1])), W.shape[1]))

    def _change_of_randlora(self, own: dict[str, np.ndarray], m: int, n: int) -> np.ndarray:
        short, long = sorted((m, n))
        l, g = own["randlora_lambda"], own["randlora_gamma"]  # noqa: E741
        A, B = self.bases
        rows = np.asarray(scaled(jnp.asarray(l), jnp.asarray(g), jnp.asarray(A[:, 0, :short])))
        product = B[:long, : g.shape[0]].reshape(long, -1) @ rows
        return self.config.alpha / self.config.rank * (product if n <= m else product.T)


def read_adapter(directory: str | os.PathLike[str], config: LlamaConfig) -> StoredAdapter:
    """Reads an adapter in PEFT's format for a base.

    Args:
        directory: directory with ``adapter_config.json`` and ``adapter_model.safetensors``.
        config: config of the base.

    Returns:
        The adapter.

    Raises:
        CheckpointError: if it is missing, damaged, of a form that is not read, or of another base.
    """
    path = pathlib.Path(directory)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory.")
    peft = read_adapter_config(path)
    if not (path / TENSORS).is_file():
        others = sorted(file.name for file in path.glob("adapter_model*"))
        beside = f", not {others[0]}" if others else ""
        raise CheckpointError(f"{path} holds no adapter: expected {TENSORS}{beside}.")
    tensors = AdapterTensors(path)
    expected = {
        module: {f"{PREFIX}{module}.{variable}": variable for variable in _VARIABLES[peft.form]}
        for module in peft.modules(config)
    }
    _check_names(path, peft, tensors, {name for names in expected.values() for name in names})

    def read(name: str) -> np.ndarray:
        return cast(tensors.read(name), np.float32, f"{path / TENSORS}: {name}")

    bases = tuple(map(read, BASES)) if peft.form == RANDLORA else ()
    modules = {}
    for module, names in expected.items():
        layer_shape = _shape(config, module)
        found = {variable: tensors.shape(name) for name, variable in names.items()}
        for variable, shape in _shapes(peft, module, found, layer_shape).items():
            if found[variable] != shape:
                raise CheckpointError(
                    f"{path / TENSORS}: {PREFIX}{module}.{variable} has shape {found[variable]}; "
                    f"expected {shape} for this base."
                )
        modules[module] = {variable: read(name) for name, variable in names.items()}
        if bases:
            _check_bases(path, bases, module, peft.rank, layer_shape)
    return StoredAdapter(peft, modules, bases)


def _check_names(
    path: pathlib.Path, peft: PeftConfig, tensors: StoredTensors, expected: set[str]
) -> None:
    """Raises CheckpointError for tensors that are missing or unexpected."""
    stored = tensors.names
    if peft.form == RANDLORA:
        expected = expected | set(BASES)
        # Copies of the bases beside the other tensors of a projection.
        stored = {
            name
            for name in stored
            if name in BASES or not name.endswith((".randlora_A", ".randlora_B"))
        }
    missing, extra = sorted(expected - stored), sorted(stored - expected)
    if missing:
        hint = " (written with save_projection = False)" if missing[0] in BASES else ""
        raise CheckpointError(f"{path / TENSORS}: {missing[0]} is missing{hint}.")
    if extra:
        raise CheckpointError(
            f"{path / TENSORS} holds {extra[0]}; expected tensors of the base's projections that "
            f"{CONFIG} names."
        )
    tensors.check_floating(expected)


def _shape(config: LlamaConfig, module: str) -> tuple[int, int]:
    """Returns outputs and inputs of a projection."""
    _, (part, name) = place_of(module)
    return config.shapes("attn" if part == "attention" else "mlp")[name]


def _shapes(
    peft: PeftConfig, module: str, found: dict[str, tuple[int, ...]], layer: tuple[int, int]
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes that the tensors of a projection must have."""
    m, n = layer
    if peft.form == LORA:
        r = peft.rank_of(module)
        return {"lora_A.weight": (r, n), "lora_B.weight": (m, r)}
    if peft.form == ADALORA:
        # Pruned ranks are left out of the file.
        r = found["lora_E"][0] if found["lora_E"] else 0
        return {"lora_A": (r, n), "lora_B": (m, r), "lora_E": (r, 1)}
    r = peft.rank
    if peft.form == RANDLORA:
        k = bases_of(min(m, n), r)
        return {"randlora_lambda": (r, k), "randlora_gamma": (k, min(m, n))}
    variant = peft.content.get("init_weights", True)
    if variant == "bat":
        return {"miss_block": (m // r, r, r)}
    if variant == "mini":
        mini = peft.content.get("mini_r", 1)
        if not isinstance(mini, int) or mini < 1 or m % mini:
            raise CheckpointError(
                f"{peft.path}: mini_r = {mini!r}; expected a divisor of the {m} outputs of "
                f"{module}."
            )
        return {"miss_block": (r, mini)}
    return {"miss_block": (r, m)}


def _check_bases(
    path: pathlib.Path,
    bases: tuple[np.ndarray, ...],
    module: str,
    rank: int,
    layer: tuple[int, int],
) -> None:
    """Raises CheckpointError if RandLoRA's bases are too small for a projection."""
    short, long = sorted(layer)
    least = ((rank, 1, short), (long, bases_of(short, rank), rank))
    for name, array, shape in zip(BASES, bases, least, strict=True):
        fits = array.ndim == 3 and all(a >= b for a, b in zip(array.shape, shape, strict=True))
        if not fits or array.shape[0 if name == BASES[0] else 2] != rank:
            raise CheckpointError(
                f"{path / TENSORS}: {name} has shape {array.shape}; expected at least {shape} for "
                f"{module}."
            )


def merge_stored_adapter(model: Llama, directory: str | os.PathLike[str]) -> PeftConfig:
    """Adds the change of an adapter in PEFT's format to a model's weights, in place.

    Args:
        model: the base, with dense projections.
        directory: the adapter.

    Returns:
        The adapter's config.

    Raises:
        CheckpointError: as :func:`read_adapter`, or if a projection is factored.
    """
    stored = read_adapter(directory, model.config)
    changed: dict[_Place, dict[int, str]] = {}
    for module in stored.modules:
        layer, place = place_of(module)
        changed.setdefault(place, {})[layer] = module
    for (part, name), modules in changed.items():
        projection: Any = getattr(getattr(model.blocks, part), name)
        if not hasattr(projection, "W") or hasattr(projection, "B"):
            raise CheckpointError(
                f"{directory}: the base's {PROJECTIONS[part, name]} is not one matrix; expected a "
                "base with dense projections, as python -m loro_jax export writes."
            )
        weights = projection.W[...]
        for layer, module in modules.items():
            W = np.asarray(weights[layer], np.float32)
            changed_W = jnp.asarray(W + stored.change(module, W))
            weights = weights.at[layer].set(changed_W.astype(weights.dtype))
        projection.W[...] = weights
    return stored.config


def adapter_fields(peft: PeftConfig, config: LlamaConfig) -> dict[str, Any]:
    """Returns kind, rank, scale and targets of an adapter that training can continue.

    Args:
        peft: config of an adapter.
        config: config of the base.

    Returns:
        ``kind``, ``rank``, ``alpha``, ``rank_stabilised``, and ``names``, ours of the projections.

    Raises:
        CheckpointError: if our kinds have no such adapter: layers differ, or the form.
    """
    variant = peft.content.get("init_weights", True)
    if peft.form == RANDLORA or variant == "mini":
        what = f"{peft.form} (mini)" if variant == "mini" else peft.form
        raise CheckpointError(
            f"{peft.path}: an adapter of form {what} can be merged into its base, but not trained; "
            f"expected {LORA}, {ADALORA} or {MISS}."
        )
    modules = peft.modules(config)
    places: dict[_Place, int] = {}
    for module in modules:
        _, place = place_of(module)
        places[place] = places.get(place, 0) + 1
    for place, count in places.items():
        if count != config.num_layers:
            raise CheckpointError(
                f"{peft.path}: {PROJECTIONS[place]} is adapted in {count} of {config.num_layers} "
                "layers; expected all of them, to train it."
            )
    fields = {"rank": peft.rank, "names": tuple(name for _, name in places)}
    if peft.form == MISS:
        return fields | {"kind": "bone" if variant == "bat" else "miss"}
    if peft.form == ADALORA:
        if peft.content.get("rank_pattern"):
            raise CheckpointError(
                f"{peft.path}: rank_pattern: ranks of this adapter are pruned; expected one with "
                "all of them, to train it."
            )
        alpha = peft.alpha if peft.alpha > 0 else peft.rank
        return fields | {"kind": "adalora", "alpha": alpha, "rank_stabilised": False}
    return fields | {"kind": "lora"} | lora_fields(peft, modules)


def lora_fields(peft: PeftConfig, modules: Iterable[str]) -> dict[str, Any]:
    """Returns rank and scale of LoRA as fields of a run's adapters.

    Args:
        peft: config of the adapter.
        modules: the modules that it adapts.

    Raises:
        CheckpointError: if they differ in rank or scale.
    """
    modules = list(modules)
    ranks, scales = ({get(m) for m in modules} for get in (peft.rank_of, peft.scale_of))
    if len(ranks) > 1 or len(scales) > 1:
        raise CheckpointError(
            f"{peft.path}: ranks or scales of projections differ; expected the same, to train it."
        )
    rank, scale = ranks.pop(), scales.pop()
    stabilised = bool(peft.content.get("use_rslora"))
    alpha = scale * (math.sqrt(rank) if stabilised else rank)
    return {"rank": rank, "alpha": alpha, "rank_stabilised": stabilised}


def adapter_arrays(stored: StoredAdapter) -> dict[_Place, dict[str, np.ndarray]]:
    """Returns the arrays of an adapter that training can continue, stacked over the layers.

    Args:
        stored: an adapter that :func:`adapter_fields` accepts.

    Returns:
        Variables of our kind of adapter, by our module and attribute.
    """
    ours = {"lora_A": "A", "lora_B": "B", "lora_E": "E", "miss_block": "b"}
    found: dict[_Place, dict[str, list[np.ndarray]]] = {}
    for module, tensors in stored.modules.items():
        variables = found.setdefault(place_of(module)[1], {})
        for name, value in tensors.items():
            own = ours[name.removesuffix(".weight")]
            # PEFT has E as a column.
            variables.setdefault(own, []).append(value[:, 0] if own == "E" else value)
    return {
        place: {name: np.stack(values) for name, values in variables.items()}
        for place, variables in found.items()
    }
