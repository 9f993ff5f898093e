"""The config of a RoBERTa, in its own fields and in those of a ``config.json``."""

# No `from __future__ import annotations` here: the command line reads the fields' types.

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from loro_jax.fields import above, at_least, check, field, one_of
from loro_jax.layers.common import ProjectionSpec
from models.config import DTYPES
from models.huggingface.errors import CheckpointError
from models.huggingface.fields import check_value, number, whole_number
from models.huggingface.frame import check_type, known_fields, validated

# By the names of transformers, some of which mean the same function.
ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_python": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_fast": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
REMAT_POLICIES = ("none", "full")

_RATE = at_least(0, below=1)


# Hashable, because NNX stores it in the static structure of modules, which jit hashes.
@dataclasses.dataclass(unsafe_hash=True)
class RobertaConfig:
    """Architecture and precision of a RoBERTa; the defaults are those of roberta-base."""

    vocab_size: int = field(50265, at_least(1), "rows of the embedding")
    hidden_size: int = field(768, at_least(1), "D")
    num_layers: int = field(12, at_least(1), "number of blocks")
    num_heads: int = field(12, at_least(1), "H, heads of attention")
    intermediate_size: int = field(3072, at_least(1), "F, width of the MLP")
    hidden_act: str = field("gelu", one_of(ACTIVATIONS), "activation of the MLP")
    max_position_embeddings: int = field(
        514, at_least(1), "rows of the position embedding; those up to pad_id belong to no token"
    )
    type_vocab_size: int = field(1, at_least(1), "rows of the token type embedding")
    pad_id: int = field(1, at_least(0), "id of padding; positions are counted from the next number")
    layer_norm_eps: float = field(1e-5, above(0), "epsilon of the norms")
    initializer_range: float = field(0.02, at_least(0), "standard deviation of initial weights")
    hidden_dropout: float = field(0.1, _RATE, "share of hidden entries dropped in training")
    attention_dropout: float = field(0.1, _RATE, "share of attention weights dropped in training")
    classifier_dropout: float | None = field(
        None, _RATE, "share of the head's entries dropped in training; none: hidden_dropout"
    )
    num_labels: int = field(2, at_least(1), "outputs of the head; 1: regression")
    dtype: str = field("float32", one_of(DTYPES), "dtype of activations and products")
    param_dtype: str = field("float32", one_of(DTYPES), "dtype of the stored parameters")
    remat: str = field(
        "none", one_of(REMAT_POLICIES), "rematerialisation: none, or full (each block anew)"
    )

    def validate(self) -> None:
        """Raises ValueError for an invalid field; it names field, value and expectation."""
        check(self, "model.")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.num_heads = {self.num_heads} must divide model.hidden_size = "
                f"{self.hidden_size}."
            )
        if self.pad_id >= self.vocab_size:
            raise ValueError(
                f"model.pad_id = {self.pad_id} is outside the vocabulary (0 to "
                f"{self.vocab_size - 1})."
            )
        if self.longest < 1:
            raise ValueError(
                f"model.max_position_embeddings = {self.max_position_embeddings} leaves no "
                f"position after model.pad_id = {self.pad_id}."
            )

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, padding not counted."""
        return self.max_position_embeddings - self.pad_id - 1

    @property
    def head_dropout(self) -> float:
        """Rate of the head's dropout."""
        own = self.classifier_dropout
        return self.hidden_dropout if own is None else own

    def projection_spec(self) -> ProjectionSpec:
        """Returns the specification of the dense projections, all of which have a bias."""
        return ProjectionSpec(
            initializer_range=self.initializer_range,
            use_bias=True,
            dtype=jnp.dtype(self.dtype),
            param_dtype=jnp.dtype(self.param_dtype),
        )


# Our field names by Hugging Face's.
_NUMBERS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
    "pad_token_id": "pad_id",
}
_FRACTIONS = {
    "layer_norm_eps": "layer_norm_eps",
    "initializer_range": "initializer_range",
    "hidden_dropout_prob": "hidden_dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "classifier_dropout": "classifier_dropout",
}
# Defaults of transformers that differ from ours, which are those of the published roberta-base.
_THEIR_DEFAULTS = {"max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12}
# Fields with the values that our network has; any other one requires another network.
_ONLY: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({}, []),
    "quantization_config": (),
}


def from_huggingface(content: Mapping[str, Any], where: str) -> RobertaConfig:
    """Converts the content of a ``config.json``.

    Args:
        content: content of the file.
        where: name of the file, for messages.

    Returns:
        The config, in float32 whatever the dtype of the stored tensors.

    Raises:
        CheckpointError: for a field that our network can't represent.

    Example:
        >>> from_huggingface({"model_type": "roberta", "num_labels": 3}, "config.json").num_labels
        3
    """
    full = known_fields(content)
    check_type(full.get("model_type"), ["roberta"], where)
    for name, allowed in _ONLY.items():
        if name in full:
            check_value(name, full[name], allowed, where)
    full = _THEIR_DEFAULTS | full
    fields: dict[str, Any] = {}
    for names, read in ((_NUMBERS, whole_number), (_FRACTIONS, number)):
        for theirs, ours in names.items():
            value = read(full, theirs, where)
            if value is not None:
                fields[ours] = value
    activation = full.get("hidden_act", "gelu")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise CheckpointError(
            f"{where}: hidden_act = {activation!r} is not supported; expected one of "
            f"{', '.join(ACTIVATIONS)}."
        )
    config = RobertaConfig(**fields, hidden_act=activation, num_labels=_labels(full, where))
    return validated(config, where)


def _labels(full: Mapping[str, Any], where: str) -> int:
    """Reads the number of labels: the length of ``id2label``, or ``num_labels``, or 2."""
    names = full.get("id2label")
    if names is None:
        count = whole_number(full, "num_labels", where)
        return 2 if count is None else count
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{where}: id2label = {names!r}; expected names by number.")
    return len(names)


def to_huggingface(
    config: RobertaConfig, dtype: str, labels: tuple[str, ...] | None, head: bool
) -> dict[str, Any]:
    """Converts a config to the content of a ``config.json``.

    Args:
        config: the config of a model.
        dtype: dtype of the stored tensors.
        labels: names of the labels; None: ``LABEL_0``, ...
        head: whether the model has a head.

    Returns:
        The content.

    Example:
        >>> to_huggingface(RobertaConfig(), "float32", ("no", "yes"), head=True)["id2label"]
        {'0': 'no', '1': 'yes'}
    """
    ours = dataclasses.asdict(config)
    names = labels or tuple(f"LABEL_{i}" for i in range(config.num_labels))
    content = {
        "architectures": ["RobertaForSequenceClassification" if head else "RobertaModel"],
        "model_type": "roberta",
        "torch_dtype": dtype,
        "hidden_act": config.hidden_act,
        "position_embedding_type": "absolute",
        **{theirs: ours[name] for theirs, name in (_NUMBERS | _FRACTIONS).items()},
    }
    if head:
        content["id2label"] = {str(i): name for i, name in enumerate(names)}
        content["label2id"] = {name: i for i, name in enumerate(names)}
        if config.num_labels == 1:
            content["problem_type"] = "regression"
    return content
