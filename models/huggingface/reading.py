"""Reading a model from a directory in Hugging Face's format."""

from __future__ import annotations

import dataclasses
import os
import pathlib

import jax
import jax.numpy as jnp
from flax import nnx

from models.huggingface.configs import from_huggingface
from models.huggingface.errors import CheckpointError
from models.huggingface.frame import read_directory
from models.huggingface.parameters import LayerError, read_parameters
from models.huggingface.tensors import Tensors
from models.llama import Llama, LlamaConfig


def read_model(
    directory: str | os.PathLike[str],
    *,
    rank: int | None = None,
    attn_rank: int | None = None,
    mlp_rank: int | None = None,
    dtype: str | None = None,
) -> tuple[Llama, list[LayerError]]:
    """Reads a dense or factored model, or factorises a dense one.

    Args:
        directory: directory with ``config.json`` and safetensors.
        rank: factorise dense projections by their truncated SVD (balanced factors) at this rank;
            None: keep the stored form. If only grouped keys and values have fewer rows, the rank of
            attention is reduced to their number of rows.
        attn_rank: rank of q, k, v and o; None: ``rank``.
        mlp_rank: rank of gate, up and down; None: ``rank``.
        dtype: dtype of parameters and products; None: as stored.

    Returns:
        (the model, the error of each factorised projection).

    Raises:
        CheckpointError: for a directory that holds no LLaMA; a missing, extra or damaged tensor; a
            wrong shape; numbers that are not finite or that the dtype can't hold; a rank that is
            too large.

    Example:
        >>> import tempfile
        >>> from models.huggingface import write_model
        >>> config = LlamaConfig(64, 32, 48, num_layers=2, num_heads=4, rank=8)
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     _ = write_model(Llama(config, nnx.Rngs(0)), f"{parent}/model")
        ...     model, errors = read_model(f"{parent}/model", rank=8)
        >>> model.config.rank, len(errors), max(error.error for error in errors) < 1e-5
        (8, 14, True)
    """
    config = read_config(directory, dtype=dtype)
    if (rank, attn_rank, mlp_rank) != (None, None, None):
        where = pathlib.Path(directory) / "config.json"
        if config.scope != "none":
            raise CheckpointError(f"{where}: the projections are factored; expected no rank.")
        config = _with_ranks(config, rank, attn_rank, mlp_rank)
        try:
            config.validate()
        except ValueError as error:
            asked = next(one for one in (rank, attn_rank, mlp_rank) if one is not None)
            raise CheckpointError(f"rank {asked} does not fit {where}: {error}") from None
    # Only shapes: drawing initial values to overwrite them would take time and memory.
    model = nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    params, errors = read_parameters(directory, nnx.to_pure_dict(state))
    state.replace_by_pure_dict(jax.tree.map(jnp.asarray, params))
    return nnx.merge(graphdef, state), errors


def _with_ranks(
    config: LlamaConfig, rank: int | None, attn_rank: int | None, mlp_rank: int | None
) -> LlamaConfig:
    """Adds ranks to a dense config, attention's at most the number of rows of k and v."""
    # A group without a rank stays dense, and the scope names the other one.
    attn, mlp = (rank if own is None else own for own in (attn_rank, mlp_rank))
    if attn_rank is None and attn is not None:
        sides = {name: min(shape) for name, shape in config.shapes("attn").items()}
        # Only where the grouped heads are what limits it; a rank too large for q is an error.
        if sides["k"] < attn <= sides["q"]:
            attn_rank = sides["k"]
    scope = "all" if None not in (attn, mlp) else "mlp" if attn is None else "attn"
    largest = next(one for one in (rank, attn, mlp) if one is not None)
    return dataclasses.replace(
        config, scope=scope, rank=largest, attn_rank=attn_rank, mlp_rank=mlp_rank
    )


def read_config(directory: str | os.PathLike[str], *, dtype: str | None = None) -> LlamaConfig:
    """Reads the config of the model in a directory.

    Args:
        directory: directory with ``config.json`` and safetensors.
        dtype: dtype of parameters and products; None: as stored.

    Returns:
        The config.

    Raises:
        CheckpointError: if it is missing or not that of a LLaMA, or if the dtype is unknown.
    """

    def stored(path: pathlib.Path, config: LlamaConfig) -> str:
        return Tensors(path, config.tie_embeddings).dtype()

    return read_directory(directory, from_huggingface, stored, dtype)
