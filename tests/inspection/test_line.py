"""The straight line between two models, in dense weights."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from loro_jax.errors import TrainingError
from loro_jax.inspection.line import along_line, merged
from models import Llama, preset
from tests.helpers import outputs

CONFIG = preset("tiny", vocab_size=40, max_sequence_length=32)
TOKENS = np.arange(24).reshape(2, 12)


def model(seed, **changes):
    return Llama(dataclasses.replace(CONFIG, **changes), nnx.Rngs(seed))


def logits(found):
    return outputs(found, TOKENS)


@pytest.mark.parametrize(
    "other", [{"scope": "none"}, pytest.param({"rank": 4}, marks=pytest.mark.slow)]
)
def test_the_ends_are_the_models_and_the_middle_is_the_mean_of_products(other):
    """Whatever their ranks are."""
    one, two = model(0, rank=8), model(1, **other)
    made = []
    rows = along_line(one, two, lambda found: made.append(found) or 1.0, (0.0, 0.5, 1.0))
    assert [row["t"] for row in rows] == [0.0, 0.5, 1.0]
    for found, expected in ((made[0], one), (made[2], two)):
        np.testing.assert_allclose(logits(found), logits(expected), rtol=1e-4, atol=1e-5)
    B, A = (np.asarray(factor[...]) for factor in one.blocks.mlp.up.factors())
    other_up = np.asarray(merged(two)["blocks"]["mlp"]["up"]["W"])
    middle = np.asarray(made[1].blocks.mlp.up.W[...])
    np.testing.assert_allclose(middle, (B @ A + other_up) / 2, atol=1e-6)
    mean = (np.asarray(one.embedding[...]) + np.asarray(two.embedding[...])) / 2
    np.testing.assert_allclose(made[1].embedding[...], mean, atol=1e-7)


def test_a_perplexity_that_is_not_finite_is_none():
    rows = along_line(model(0), model(1), lambda found: float("inf"), (0.5,))
    assert rows == [{"t": 0.5, "perplexity": None}]


@pytest.mark.parametrize(
    ("one", "two", "message"),
    [
        ({}, {"num_layers": 1}, "differ in num_hidden_layers: 2 and 1"),
        ({}, {"num_kv_heads": 2}, "differ in num_key_value_heads"),
        ({"projection": "cola"}, {}, 'kind "cola" can\'t be merged'),
    ],
)
def test_models_without_a_line_are_named(one, two, message):
    with pytest.raises(TrainingError, match=message):
        along_line(model(0, **one), model(1, **two), lambda found: 1.0)


def test_merged_leaves_the_model_as_it_was():
    one = model(0)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(one)))
    merged(one)
    after = nnx.to_pure_dict(nnx.state(one))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, before, after)))
