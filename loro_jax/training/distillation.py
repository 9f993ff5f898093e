"""Distillation from a dense teacher while factors heal, as in PELA.

Two terms are added to the loss of the next token, each with a weight:

* features: the mean squared difference between the outputs of each layer and those of the teacher's
  layer, averaged over layers and, as the loss, over the tokens that count;
* pairs: with ``d = max |B A - W|`` of a matrix W of the teacher, the mean over all matrices of
  ``max(d - tolerance, 0)^2``.

Source: Guo et al., "PELA: Learning Parameter-Efficient Models with Low-Rank Approximation", CVPR
2024 (arXiv 2310.10700), and the authors' code, with a tolerance of 1e-3. There, the second term is
``(d - tolerance)^2``, which moves d to the tolerance from below, too; and there is a third one, of
logits, of weight 0 by default, which is left out here.

The teacher's outputs, one array of the size of the hidden states for each layer, are in memory
during the student's pass. A product B A exists only inside of the second term, of one matrix at a
time; the gradient is that of its largest difference, a row of B and a column of A.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from loro_jax.linalg.precision import at_least_float32, matmul
from models.config import LlamaConfig
from models.llama import Llama
from models.loss import Batch, cross_entropy
from models.precision import reduction_dtype

if TYPE_CHECKING:
    from loro_jax.training.config import Config

Array = jax.Array
# (trained, fixed, batch) -> a sum over the batch's tokens.
_Sum = Callable[[Any, Any, Any], Array]
# (trained, fixed, batch) -> (its mean, the gradient).
_Differentiated = Callable[[Any, Any, Any], tuple[Array, Any]]


def teacher_config(config: Config) -> LlamaConfig:
    """Returns the network of a run's teacher: dense, without a head, which is not used."""
    return dataclasses.replace(config.model.dense(), tie_embeddings=True, remat="none")


def abstract_teacher(config: Config) -> Llama | None:
    """Returns the shapes and dtypes of a run's teacher; None if it has none."""
    if config.distillation.teacher is None:
        return None
    model: Llama = nnx.eval_shape(lambda: Llama(teacher_config(config), nnx.Rngs(0)))
    return model


def with_terms(
    config: Config,
    network: Callable[[Any, Any], Any],
    loss_and_gradient: _Differentiated,
    differentiated: Callable[[_Sum], _Differentiated],
) -> Callable[..., tuple[Array, Any, dict[str, Array]]]:
    """Returns the loss of a run, its gradient, and the terms of its distillation.

    Args:
        config: the run's config.
        network: (trained parameters, fixed arrays) -> the student.
        loss_and_gradient: (trained, fixed, batch) -> (mean loss, gradient), without distillation.
        differentiated: makes such a function of one that returns a sum over tokens; it may split
            the batch.

    Returns:
        A function (trained, fixed, batch, and with a teacher its parameters) -> (the mean loss of
        the next token alone, the gradient of everything, the terms without their weights, by name).
    """
    settings = config.distillation
    abstract = abstract_teacher(config)
    if abstract is None:
        return lambda params, fixed, batch: (*loss_and_gradient(params, fixed, batch), {})
    graphdef = nnx.graphdef(abstract)

    def loss_sum(trained: tuple[Any, Array], beside: tuple[Any, Any], batch: Batch) -> Array:
        (params, weight), (fixed, teacher) = trained, beside
        student = network(params, fixed)
        if not settings.features:
            return next_token_and_features(student, batch)[0]
        features = layer_outputs(nnx.merge(graphdef, teacher), batch.inputs)
        loss, error = next_token_and_features(student, batch, features)
        return loss + weight.astype(loss.dtype) * error

    of_batch = differentiated(loss_sum)

    def with_teacher(
        params: Any, fixed: Any, batch: Any, teacher: Any
    ) -> tuple[Array, Any, dict[str, Array]]:
        weight = jnp.asarray(settings.features, jnp.float32)
        # The loss is linear in the weight, so that its derivative is the term: a sum over the
        # tokens of all micro-batches and devices, as the gradient is.
        total, (grads, error) = of_batch((params, weight), (fixed, teacher), batch)
        terms = {}
        if settings.features:
            terms["feature_error"] = error
        if settings.penalty:
            penalty, of_penalty = jax.value_and_grad(pair_penalty)(
                params, teacher, settings.tolerance
            )
            grads = jax.tree.map(
                lambda g, p: g + (settings.penalty * p).astype(g.dtype), grads, of_penalty
            )
            terms["pair_error"] = penalty
        return total - weight.astype(total.dtype) * error, grads, terms

    return with_teacher


def layer_outputs(model: Llama, tokens_BxL: Array) -> Array:
    """Returns the outputs of all layers of a model, (layers, B, L, D), without gradients."""
    outputs = model.through_layers(tokens_BxL, lambda x_BxLxD, _: x_BxLxD)[1]
    return jax.lax.stop_gradient(outputs)


def next_token_and_features(
    model: Llama, batch: Batch, features: Array | None = None
) -> tuple[Array, Array]:
    """Sums the cross-entropies, and the errors of the layers' outputs, over a batch's tokens.

    Args:
        model: the model.
        batch: the batch.
        features: outputs of the teacher's layers, (layers, B, L, D); None: there are none.

    Returns:
        (the sum of the cross-entropies in nats; the sum over tokens of the mean squared difference
        of the outputs, averaged over layers: 0 without features).
    """
    observe = None if features is None else _mean_square
    x_BxLxD, errors = model.through_layers(batch.inputs, observe, features)
    chunk = model.config.loss_chunk_size
    loss = cross_entropy(x_BxLxD, model.head_VxD(), batch.targets, batch.mask, chunk)
    if errors is None:
        return loss, jnp.zeros_like(loss)
    return loss, jnp.sum(jnp.mean(errors, axis=0) * batch.mask)


def _mean_square(x_BxLxD: Array, feature_BxLxD: Array) -> Array:
    """Returns the mean squared difference of each token's outputs, (B, L)."""
    dtype = reduction_dtype(x_BxLxD.dtype)
    return jnp.mean(jnp.square(x_BxLxD.astype(dtype) - feature_BxLxD.astype(dtype)), axis=-1)


def pair_penalty(params: Any, teacher: Any, tolerance: float) -> Array:
    """Returns the mean over all pairs of the squared largest difference from the teacher's weight.

    Args:
        params: parameters with pairs B, A, nested dicts.
        teacher: parameters with W in these places.
        tolerance: differences up to this size do not count.

    Example:
        >>> pair = {"B": jnp.ones((1, 2, 1)), "A": jnp.array([[[1.0, 2.0]]])}  # of one layer
        >>> W = {"W": jnp.array([[[1.0, 2.0], [1.5, 2.0]]])}
        >>> float(pair_penalty({"q": pair}, {"q": W}, 0.25))  # (0.5 - 0.25)^2
        0.0625
    """
    largest = [_largest_difference(*pair) for pair in _pairs(params, teacher)]
    excess = jnp.maximum(jnp.concatenate(largest) - tolerance, 0)
    return jnp.mean(jnp.square(excess))


def _pairs(params: Any, teacher: Any) -> Iterator[tuple[Array, Array, Array]]:
    """Yields B and A of all pairs, and the teacher's W."""
    if not isinstance(params, dict):
        return
    if params.keys() == {"B", "A"}:
        yield params["B"], params["A"], teacher["W"]
        return
    for name, value in params.items():
        if name in teacher:  # the student's head may be its own
            yield from _pairs(value, teacher[name])


def _largest_difference(B: Array, A: Array, W: Array) -> Array:
    """Returns ``max |B A - W|`` of each layer, (layers,)."""

    def wide(*arrays: Array) -> list[Array]:
        return [x.astype(at_least_float32(x.dtype)) for x in arrays]

    def place(pair: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        # Widened here, so that no stack of all layers is.
        B, A, W = wide(*pair)
        differences = jnp.abs(matmul(B, A) - W)
        # By rows first, which needs no flat copy of a sharded matrix.
        columns = jnp.argmax(differences, axis=1)
        row = jnp.argmax(jnp.max(differences, axis=1))
        return row, columns[row]

    # One layer after another. Only the entry found is differentiated: no product is kept.
    rows, columns = jax.lax.map(place, jax.lax.stop_gradient((B, A, W)))
    layers = jnp.arange(len(B))
    row, column, entry = wide(
        B[layers, rows], A[layers, :, columns], jax.lax.stop_gradient(W)[layers, rows, columns]
    )
    return jnp.abs(jnp.sum(row * column, axis=-1) - entry)
