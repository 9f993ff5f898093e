"""Classification and regression of texts: a RoBERTa with a head, and its loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from loro_jax.glue import TASKS
from loro_jax.glue.batches import Rows
from loro_jax.layers.adapters import adapt
from loro_jax.training.glue_config import TARGETS, GlueRun
from loro_jax.training.network import adapter_spec
from loro_jax.training.registry import Task
from models.roberta import RobertaClassifier

Array = jax.Array


def glue_task(config: GlueRun) -> Task:
    """Returns the task of a run on GLUE.

    Dropout has a key for each row, of the row's number within all batches: it does not depend on
    micro-batches, devices, or where a run was interrupted.
    """
    regression = TASKS[config.task].regression
    model = config.model
    drops = max(model.hidden_dropout, model.attention_dropout, model.head_dropout) > 0
    # Another stream than those of the weights and the adapters.
    base_key = jax.random.fold_in(jax.random.key(config.seed), 3)

    def losses(logits_BxN: Array, labels_B: Array) -> Array:
        logits_BxN = logits_BxN.astype(jnp.float32)
        if regression:
            return jnp.square(logits_BxN[:, 0] - labels_B)
        log_p_BxN = jax.nn.log_softmax(logits_BxN)
        return -jnp.take_along_axis(log_p_BxN, labels_B[:, None], axis=-1)[:, 0]

    def loss(model: RobertaClassifier, batch: Rows) -> Array:
        fold = jax.vmap(lambda number: jax.random.fold_in(base_key, number))
        keys = fold(batch.numbers) if drops else None
        logits_BxN = model(batch.ids, mask=batch.mask, key=keys)
        return jnp.sum(losses(logits_BxN, batch.labels) * batch.weights)

    def evaluate(model: RobertaClassifier, batch: Rows) -> tuple[Array, Array]:
        logits_BxN = model(batch.ids, mask=batch.mask)
        return losses(logits_BxN, batch.labels), logits_BxN.astype(jnp.float32)

    return Task(
        make=lambda: make_classifier(config),
        loss=loss,
        number=lambda batch: jnp.sum(batch.weights),
        tokens=lambda batch: jnp.sum(batch.mask * batch.weights[:, None]),
        evaluate=evaluate,
    )


def make_classifier(config: GlueRun) -> RobertaClassifier:
    """Makes the network of a run, with new weights, and adapters if the config asks for them."""
    model = RobertaClassifier(config.model, nnx.Rngs(config.seed))
    if not config.has_adapters:
        return model
    return adapt(
        model,
        adapter_spec(config),
        where=[TARGETS[name] for name in config.adapter.names],
        trained=config.adapter.also,
        # Another stream than that of the network's weights.
        key=jax.random.fold_in(jax.random.key(config.seed), 2),
        in_place=True,
    )
