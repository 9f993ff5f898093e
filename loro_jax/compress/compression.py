"""Compression of a model: its dense projections become pairs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from loro_jax.compress.calibration import input_moments
from loro_jax.compress.methods import METHODS
from loro_jax.compress.moments import Moments, output_error
from loro_jax.compress.ranks import (
    Ranks,
    energy_ranks,
    fixed_ranks,
    proportional_ranks,
    threshold_ranks,
)
from loro_jax.errors import TrainingError
from models.config import GROUPS
from models.llama import Llama, LlamaConfig

# Modules of a block by the groups of projections.
_PARTS = {"attn": "attention", "mlp": "mlp"}


class CompressedMatrix(NamedTuple):
    """A matrix and its pair.

    Attributes:
        layer: its layer.
        name: its projection, such as "q".
        shape: (outputs, inputs).
        rank: rank of the pair; None: it stays dense.
        error: ``|W - B A| / |W|`` in the Frobenius norm.
        output_error: the same of its outputs on the calibration text; None: there is no text.
    """

    layer: int
    name: str
    shape: tuple[int, int]
    rank: int | None
    error: float
    output_error: float | None

    @property
    def parameters(self) -> int:
        """Number of its parameters."""
        m, n = self.shape
        return m * n if self.rank is None else self.rank * (m + n)


class Compressed(NamedTuple):
    """A compressed model.

    Attributes:
        model: the model. In it, the layers of a projection have one rank: pairs of smaller ranks
            are padded by zeros.
        matrices: its matrices, layer by layer.
    """

    model: Llama
    matrices: list[CompressedMatrix]


def compress(
    model: Llama,
    method: str,
    *,
    keep: float | None = None,
    rank: int | None = None,
    energy: float | None = None,
    tokens_NxL: np.ndarray | None = None,
) -> Compressed:
    """Replaces a model's dense projections by low-rank pairs.

    Args:
        model: a model with dense projections, in float32 or wider.
        method: a key of :data:`METHODS`.
        keep: fraction of the projections' parameters to keep, between 0 and 1.
        rank: one rank for all matrices, instead of ``keep``.
        energy: share of each matrix's squared singular values that its rank covers, instead of
            ``keep``; 1: the rank that it has, as after training by TRP.
        tokens_NxL: calibration text, sequences of token ids; None: none.

    Returns:
        The new model and its matrices.

    Raises:
        TrainingError: if the projections are not dense, the method needs a text, or the fraction,
            rank or energy can't be met.

    Example:
        >>> config = LlamaConfig(64, 32, 48, num_layers=2, num_heads=4, scope="none")
        >>> found = compress(Llama(config, nnx.Rngs(0)), "svd", keep=0.5)
        >>> len(found.matrices), found.model.config.ranks
        (14, 'q=8,k=8,v=8,o=8,gate=10,up=10,down=10')
    """
    _check(model.config, method, keep, rank, energy, tokens_NxL)
    config = model.config
    weights = _weights(model)
    ranks = _ranks(config, keep, rank, energy, METHODS[method].by_spectrum, weights)
    moments: Iterator[dict[str, Moments]] = iter(())
    if tokens_NxL is not None:
        moments = input_moments(model, tokens_NxL)
    matrices: list[CompressedMatrix] = []
    pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {
        name: [] for name, found in ranks.items() if found is not None
    }
    for layer, inputs in itertools.zip_longest(range(config.num_layers), moments):
        for name in ranks:
            W = np.asarray(weights[name][layer], np.float64)
            made, pair = _matrix(layer, name, W, ranks[name], method, (inputs or {}).get(name))
            matrices.append(made)
            if pair is not None:
                dtype = np.dtype(weights[name].dtype)
                pairs[name].append((pair[0].astype(dtype), pair[1].astype(dtype)))
    return Compressed(_with_pairs(model, ranks, pairs), matrices)


def _check(
    config: LlamaConfig,
    method: str,
    keep: float | None,
    rank: int | None,
    energy: float | None,
    tokens: Any,
) -> None:
    if config.scope != "none":
        raise TrainingError("the projections have factors already; expected a dense model.")
    if METHODS[method].needs_text and tokens is None:
        raise TrainingError(f"method {method!r} needs a calibration text, but there is none.")
    if sum(one is not None for one in (keep, rank, energy)) != 1:
        raise TrainingError("expected one of keep, rank and energy.")
    if keep is not None and not 0 < keep < 1:
        raise TrainingError(f"keep = {keep:g}: expected a fraction above 0 and below 1.")
    if energy is not None and not 0 < energy <= 1:
        raise TrainingError(f"energy = {energy:g}: expected a share above 0 and at most 1.")
    if keep is None and METHODS[method].by_spectrum:
        given = "energy" if rank is None else "rank"
        raise TrainingError(f"method {method!r} chooses the ranks; expected keep, not {given}.")
    most = max(map(min, _shapes(config).values()))
    if rank is not None and not 1 <= rank <= most:
        raise TrainingError(
            f"rank = {rank}: expected between 1 and {most}, the smaller side of the largest matrix."
        )


def _shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    return config.shapes("attn") | config.shapes("mlp")


def _weights(model: Llama) -> dict[str, jax.Array]:
    """Returns the dense matrices of all layers, (layers, m, n), by projection."""
    return {
        name: getattr(getattr(model.blocks, _PARTS[group]), name).W[...]
        for group in GROUPS
        for name in model.config.shapes(group)
    }


def _ranks(
    config: LlamaConfig,
    keep: float | None,
    rank: int | None,
    energy: float | None,
    by_spectrum: bool,
    weights: dict[str, jax.Array],
) -> Ranks:
    shapes, layers = _shapes(config), config.num_layers
    if rank is not None:
        return fixed_ranks(rank, shapes, layers)

    def spectra() -> dict[str, list[np.ndarray]]:
        return {
            name: [np.linalg.svd(np.asarray(W), compute_uv=False) for W in stacked]
            for name, stacked in weights.items()
        }

    if energy is not None:
        return energy_ranks(energy, shapes, layers, spectra())
    assert keep is not None  # _check
    if not by_spectrum:
        return proportional_ranks(keep, shapes, layers)

    return threshold_ranks(keep, shapes, layers, spectra)


def _matrix(
    layer: int,
    name: str,
    W: np.ndarray,
    ranks: list[int] | None,
    method: str,
    moments: Moments | None,
) -> tuple[CompressedMatrix, tuple[np.ndarray, np.ndarray] | None]:
    """Makes the pair of one matrix, in float64."""
    if ranks is None:
        none = None if moments is None else 0.0
        return CompressedMatrix(layer, name, W.shape, None, 0.0, none), None
    B, A = METHODS[method].pair(W, ranks[layer], moments)
    size = float(np.linalg.norm(W))
    error = float(np.linalg.norm(W - B @ A)) / size if size else 0.0
    of_outputs = None if moments is None else output_error(W, B @ A, moments)
    return CompressedMatrix(layer, name, W.shape, ranks[layer], error, of_outputs), (B, A)


def _with_pairs(
    model: Llama, ranks: Ranks, pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]]
) -> Llama:
    """Builds the model with pairs, stacked over layers and padded to the largest rank of each."""
    most = {name: max(found) if found else 0 for name, found in ranks.items()}
    config = dataclasses.replace(
        model.config,
        scope="all",
        projection="low_rank",
        rank=max(*most.values(), 1),
        attn_rank=None,
        mlp_rank=None,
        ranks=",".join(f"{name}={rank}" for name, rank in most.items()),
    )
    abstract = nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    params = nnx.to_pure_dict(nnx.state(model))
    dtype = jnp.dtype(config.param_dtype)
    for group in GROUPS:
        for name in config.shapes(group):
            if ranks[name] is None:
                continue
            B, A = (
                np.stack([_padded(pair[side], 1 - side, most[name]) for pair in pairs[name]])
                for side in (0, 1)
            )
            params["blocks"][_PARTS[group]][name] = {
                "B": jnp.asarray(B, dtype),
                "A": jnp.asarray(A, dtype),
            }
    state.replace_by_pure_dict(params)
    return nnx.merge(graphdef, state)


def _padded(factor: np.ndarray, axis: int, rank: int) -> np.ndarray:
    width = [(0, 0), (0, 0)]
    width[axis] = (0, rank - factor.shape[axis])
    return np.pad(factor, width)
