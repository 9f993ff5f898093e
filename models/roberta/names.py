"""Hugging Face's names of our parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

PREFIX = "roberta."
# Modules outside of the blocks, and in each of them, by our paths.
_OUTSIDE: dict[tuple[str, ...], str] = {
    ("embeddings", "word"): "roberta.embeddings.word_embeddings",
    ("embeddings", "position"): "roberta.embeddings.position_embeddings",
    ("embeddings", "token_type"): "roberta.embeddings.token_type_embeddings",
    ("embeddings", "norm"): "roberta.embeddings.LayerNorm",
    ("pooler",): "roberta.pooler.dense",
    ("classifier", "dense"): "classifier.dense",
    ("classifier", "out_proj"): "classifier.out_proj",
}
PROJECTIONS: dict[tuple[str, ...], str] = {
    ("attention", "query"): "attention.self.query",
    ("attention", "key"): "attention.self.key",
    ("attention", "value"): "attention.self.value",
    ("attention", "output"): "attention.output.dense",
    ("mlp", "intermediate"): "intermediate.dense",
    ("mlp", "output"): "output.dense",
}
NORMS: dict[tuple[str, ...], str] = {
    ("attention_norm",): "attention.output.LayerNorm",
    ("mlp_norm",): "output.LayerNorm",
}
# Stored but not needed for sentences: the head of pretraining, buffers, and a pooler that the
# classifier does not use.
IGNORED = (
    "lm_head.",
    "roberta.pooler.",
    "roberta.embeddings.position_ids",
    "roberta.embeddings.token_type_ids",
)


def layer_prefix(layer: int) -> str:
    """Returns the prefix of the names of a layer's tensors."""
    return f"roberta.encoder.layer.{layer}."


def stored_name(path: tuple[str, ...], layer: int = 0) -> str:
    """Returns the name of the tensor at a path of our parameters.

    Args:
        path: from the root of the model, with the name of the variable.
        layer: index of the layer, for paths in the blocks.

    Example:
        >>> stored_name(("blocks", "attention", "query", "W"), layer=3)
        'roberta.encoder.layer.3.attention.self.query.weight'
        >>> stored_name(("embeddings", "word"))
        'roberta.embeddings.word_embeddings.weight'
    """
    if path in _OUTSIDE:
        return f"{_OUTSIDE[path]}.weight"
    *module, variable = path
    kind = {"W": "weight", "scale": "weight"}.get(variable, variable)
    if module[0] == "blocks":
        theirs = (PROJECTIONS | NORMS)[tuple(module[1:])]
        return f"{layer_prefix(layer)}{theirs}.{kind}"
    return f"{_OUTSIDE[tuple(module)]}.{kind}"


def leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields paths and leaves of nested dicts."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), value
