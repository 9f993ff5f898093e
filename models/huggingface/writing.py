"""Writing a model to a directory in Hugging Face's format."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from flax import nnx

from models.config import GROUPS
from models.crossing import crosses
from models.huggingface.casts import cast_all
from models.huggingface.companions import GENERATION, TokenIds, complete_ids, generation_config
from models.huggingface.configs import to_huggingface
from models.huggingface.errors import CheckpointError
from models.huggingface.files import check_dtype, new_directory, write_tensors
from models.huggingface.names import (
    EMBEDDING,
    HEAD,
    NORM,
    NORMS,
    PROJECTIONS,
    layer_prefix,
    variable_name,
)
from models.llama import Llama

# Size above which Hugging Face's programs shard files.
SHARD_BYTES = 5_000_000_000


def write_model(
    model: Llama,
    out: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    keep_factors: bool = False,
    files: Mapping[str, bytes] | None = None,
    token_ids: TokenIds | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Writes a model, merged into dense projections or with its factors.

    Args:
        model: the model.
        out: a directory that does not exist yet.
        dtype: dtype of the tensors: "float32", "bfloat16" or "float16".
        keep_factors: store B and A instead of their product.
        files: contents of additional files by name, such as the tokenizer's.
        token_ids: ``eos_token_id`` (a number or a list), ``bos_token_id`` and ``pad_token_id``, for
            ``config.json`` and ``generation_config.json``. ``bos_token_id`` defaults to the (first)
            ``eos_token_id``.
        shard_bytes: upper bound on a file's size.

    Returns:
        Total bytes of the tensors.

    Raises:
        CheckpointError: if ``out`` exists or can't be written, the dtype is unknown, a tensor holds
            numbers that are not finite or that the dtype can't hold, or the projections can't be
            merged into one matrix.

    Example:
        >>> import tempfile
        >>> from models import LlamaConfig
        >>> config = LlamaConfig(64, 32, 48, num_layers=2, num_heads=4, rank=8)
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     write_model(Llama(config, nnx.Rngs(0)), f"{parent}/model")
        86656
    """
    check_dtype(dtype)
    config = model.config
    kind = config.projection
    if not keep_factors and config.scope != "none" and kind in ("cola", "lost", "scaffold_cola"):
        raise CheckpointError(
            f'projections of kind "{kind}" can\'t be merged (there is an activation between their '
            'factors); expected --keep_factors, or a model of projection "low_rank".'
        )
    if any(crosses(config, group) for group in GROUPS):
        raise CheckpointError(
            f"model.cross_layer = {config.cross_layer}: the format of Hugging Face has no outputs "
            "that cross layers; expected a model with cross_layer = 0."
        )
    ids = complete_ids(token_ids)
    content = to_huggingface(config, dtype, keep_factors) | ids
    companions = {GENERATION: generation_config(ids)} if ids else {}
    companions |= files or {}
    tensors = _factors(model) if keep_factors else _matrices(model)
    # The generators below make each tensor only when it is written.
    with new_directory(out) as directory:
        total = write_tensors(directory, cast_all(_named(model, tensors), dtype), shard_bytes)
        (directory / "config.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        for name, data in companions.items():
            # Some chat templates are in a separate folder.
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(data)
    return total


def zero_matrices(model: Llama) -> list[str]:
    """Returns the names of a model's dense matrices that are all zeros.

    Args:
        model: the model.

    Returns:
        Names, in the order of the computation, without factors.

    Example:
        >>> from models import LlamaConfig
        >>> model = Llama(LlamaConfig(64, 32, 48, num_layers=1, num_heads=4, rank=8), nnx.Rngs(0))
        >>> model.head.W[...] = 0 * model.head.W[...]
        >>> zero_matrices(model)
        ['lm_head.weight']
    """
    tensors = _named(model, _factors(model))
    return [name for name, value in tensors if name.endswith(".weight") and not value.any()]


_Tensors = Iterator[tuple[str, jax.Array]]


def _named(model: Llama, layers: _Tensors) -> _Tensors:
    """Yields all tensors, in the order of the computation."""
    yield EMBEDDING, model.embedding[...]
    yield from layers
    yield NORM, model.norm.scale[...]
    if not model.config.tie_embeddings:
        yield HEAD, model.head.W[...]


def _matrices(model: Llama) -> _Tensors:
    """Yields the layers' tensors, a dense matrix for each projection."""
    # Merged layer by layer: the dense matrices of only one layer exist at a time.
    graphdef, stacked = nnx.split(model.blocks)
    for layer in range(model.config.num_layers):
        block = nnx.merge(graphdef, jax.tree.map(lambda x, layer=layer: x[layer], stacked))
        prefix = layer_prefix(layer)
        for (part, name), theirs in PROJECTIONS.items():
            projection = getattr(getattr(block, part), name)
            yield f"{prefix}{theirs}.weight", projection.weight()
        for ours, theirs in NORMS.items():
            yield f"{prefix}{theirs}.weight", getattr(block, ours).scale[...]


def _factors(model: Llama) -> _Tensors:
    """Yields the layers' tensors as they were trained."""
    blocks = nnx.to_pure_dict(nnx.state(model.blocks))
    for layer in range(model.config.num_layers):
        prefix = layer_prefix(layer)
        for (part, name), theirs in PROJECTIONS.items():
            own = {variable: value[layer] for variable, value in blocks[part][name].items()}
            if model.config.ranks and set(own) == {"B", "A"}:
                own = without_padding(own)
            for variable, value in own.items():
                yield f"{prefix}{theirs}.{variable_name(variable)}", value
        for ours, theirs in NORMS.items():
            yield f"{prefix}{theirs}.weight", blocks[ours]["scale"][layer]


def without_padding(pair: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Removes the last ranks of a pair B, A that are zero in both; at least one rank is kept.

    Example:
        >>> pair = {"B": jax.numpy.array([[1.0, 0.0]]), "A": jax.numpy.array([[2.0], [0.0]])}
        >>> without_padding(pair)["A"].shape
        (1, 1)
    """
    used = np.asarray(pair["B"]).any(axis=0) | np.asarray(pair["A"]).any(axis=1)
    rank = int(np.flatnonzero(used)[-1]) + 1 if used.any() else 1
    return {"B": pair["B"][:, :rank], "A": pair["A"][:rank]}
