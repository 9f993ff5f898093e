"""The metrics of GLUE, in NumPy.

A metric that is undefined, because all predictions or all labels are the same, is 0, as in
scikit-learn's correlation coefficient.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from loro_jax.glue.tasks import Task

Array = np.ndarray


def accuracy(predicted: Array, labels: Array) -> float:
    """Returns the share of predictions that are right.

    Example:
        >>> accuracy(np.array([1, 0, 1, 1]), np.array([1, 0, 0, 1]))
        0.75
    """
    return float(np.mean(predicted == labels))


def f1(predicted: Array, labels: Array) -> float:
    """Returns the harmonic mean of precision and recall of label 1.

    Example:
        >>> f1(np.array([1, 0, 1, 1]), np.array([1, 0, 0, 1]))
        0.8
    """
    hits = np.sum((predicted == 1) & (labels == 1))
    found = np.sum(predicted == 1) + np.sum(labels == 1)
    return float(2 * hits / found) if found else 0.0


def matthews(predicted: Array, labels: Array) -> float:
    """Returns Matthews' correlation coefficient of two labels, 0 and 1.

    Example:
        >>> round(matthews(np.array([1, 0, 1, 1]), np.array([1, 0, 0, 1])), 4)
        0.5774
    """
    # For two values it is Pearson's coefficient.
    return pearson(predicted, labels)


def pearson(predicted: Array, labels: Array) -> float:
    """Returns Pearson's correlation coefficient.

    Example:
        >>> round(pearson(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.5])), 4)
        0.9979
    """
    # In float64, centred first: the sums of squares of float32 would cancel.
    x, y = (np.asarray(values, np.float64) for values in (predicted, labels))
    x, y = x - x.mean(), y - y.mean()
    size = np.sqrt(np.sum(x * x) * np.sum(y * y))
    return float(np.sum(x * y) / size) if size > 0 else 0.0


def spearman(predicted: Array, labels: Array) -> float:
    """Returns Pearson's coefficient of the ranks; equal values have the mean of their ranks.

    Example:
        >>> spearman(np.array([0.1, 5.0, 9.0]), np.array([1.0, 2.0, 3.0]))
        1.0
    """
    return pearson(_ranks(predicted), _ranks(labels))


def _ranks(values: Array) -> Array:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    # The k-th of the distinct values, in their order, takes the ranks up to the sum of counts.
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


METRICS: dict[str, Callable[[Array, Array], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def evaluate(task: Task, logits: Array, labels: Array) -> dict[str, float]:
    """Returns a task's metrics of a model's outputs.

    Args:
        task: the task.
        logits: outputs, (rows, labels), or (rows, 1) for regression.
        labels: numbers of the labels, or scores.

    Returns:
        Values by metric, the task's first one first.
    """
    predicted = logits[:, 0] if task.regression else np.argmax(logits, axis=-1)
    return {name: METRICS[name](predicted, labels) for name in task.metrics}
