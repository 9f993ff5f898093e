"""The metrics are those of scikit-learn and SciPy."""

import math
import warnings

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from loro_jax.glue import METRICS, TASKS, evaluate

REFERENCES = {
    "accuracy": lambda p, y: sklearn.metrics.accuracy_score(y, p),
    "f1": lambda p, y: sklearn.metrics.f1_score(y, p, zero_division=0),
    "matthews": lambda p, y: sklearn.metrics.matthews_corrcoef(y, p),
    "pearson": lambda p, y: scipy.stats.pearsonr(p, y)[0],
    "spearman": lambda p, y: scipy.stats.spearmanr(p, y)[0],
}


def test_every_metric_has_its_reference():
    assert set(REFERENCES) == set(METRICS)
    assert {name for task in TASKS.values() for name in task.metrics} == set(METRICS)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("seed", range(3))
def test_values_are_those_of_the_reference(name, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 200)
    predicted = np.where(rng.random(200) < 0.3, 1 - labels, labels)
    if name in ("pearson", "spearman"):
        # Scores with ties, as those of STS-B, far from zero in float32.
        labels = (rng.integers(0, 26, 200) / 5).astype(np.float32)
        predicted = (labels + rng.normal(size=200) + 1000).astype(np.float32)
    wanted = REFERENCES[name](predicted.astype(np.float64), labels.astype(np.float64))
    assert math.isclose(METRICS[name](predicted, labels), wanted, abs_tol=1e-9)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("value", [0, 1])
def test_predictions_that_are_all_the_same(name, value):
    labels, predicted = np.array([0, 1, 1, 0, 1]), np.full(5, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the references warn of it
        wanted = REFERENCES[name](predicted, labels)
    # SciPy's correlation of a constant is no number; ours is 0, as Matthews' is.
    assert METRICS[name](predicted, labels) == pytest.approx(np.nan_to_num(wanted))


def test_a_task_is_evaluated_by_its_metrics():
    logits = np.array([[0.1, 0.9], [2.0, -1.0], [0.0, 1.0]])
    found = evaluate(TASKS["mrpc"], logits, np.array([1, 0, 0]))
    assert found == {"f1": 2 / 3, "accuracy": 2 / 3}
    scores = np.array([[0.5], [2.0], [4.5]])
    assert list(evaluate(TASKS["stsb"], scores, np.array([0.0, 2.5, 5.0]))) == [
        "pearson",
        "spearman",
    ]
