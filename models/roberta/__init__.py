"""RoBERTa in Flax NNX: the encoder, a head for classification and regression, checkpoints.

    model, notes = read_classifier("roberta-base", num_labels=2)
    logits = model(ids, mask=mask)                      # (batch, labels)
    write_roberta(model, "out")

Projections are :class:`loro_jax.layers.dense.Dense` with a bias: ``blocks/attention/query``,
``key``, ``value`` and ``output``, ``blocks/mlp/intermediate`` and ``output``; a stack of layers has
leading axes. :func:`loro_jax.layers.factorise` replaces them by pairs.
"""

from models.roberta.checkpoints import read_classifier, read_roberta, write_roberta
from models.roberta.config import RobertaConfig
from models.roberta.network import ClassificationHead, Roberta, RobertaClassifier

__all__ = [
    "ClassificationHead",
    "Roberta",
    "RobertaClassifier",
    "RobertaConfig",
    "read_classifier",
    "read_roberta",
    "write_roberta",
]
