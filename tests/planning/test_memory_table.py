import dataclasses
import json

import pytest

from loro_jax.planning.memory_table import MODELS, PAPER, held_by, memory_rows
from loro_jax.training.config import METHODS, Config
from models import preset
from tests.helpers import command

TINY = preset("tiny")


@pytest.fixture(scope="module")
def tables():
    """Rows of the methods that the paper has, by model and method."""
    return {
        model: {row["method"]: row for row in memory_rows(model, methods=PAPER)} for model in MODELS
    }


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", ["full", "lowrank", "loro", "sltrain", "galore"])
@pytest.mark.slow
def test_parameters_are_the_papers(tables, model, method):
    row = tables[model][method]
    assert round(row["total M"]) == row["paper M"] == PAPER[method][MODELS.index(model)][0]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.slow
def test_memory_of_weights_and_adam_is_the_papers_but_at_60m(tables, model):
    for method in ("full", "lowrank", "loro"):
        row = tables[model][method]
        assert row["paper GB"] is not None
        # The paper rounds, up at times; its 0.24 GB at 60M contradict its own parameters.
        limit = 0.02 if (model, method != "full") == ("60m", True) else 0.011
        assert abs(row["difference GB"]) <= limit, (method, row["difference GB"])


def test_other_ranks_are_beside_no_paper():
    (row,) = memory_rows("60m", rank=64, methods=["loro"])
    assert row["paper M"] is None
    assert row["total M"] < 43


def test_what_is_fixed_has_no_gradient():
    held = held_by(Config(method="lora", model=TINY))
    dense = held_by(Config(method="full", model=TINY))
    factors = held_by(Config(method="lowrank", model=TINY))
    assert held.trainable == factors.trainable
    assert held.total - held.trainable == 2 * (4 * 32 * 32 + 3 * 32 * 48)
    assert held.gradients < dense.gradients < held.weights
    bf16 = held_by(Config(method="lora", model=dataclasses.replace(TINY, param_dtype="bfloat16")))
    assert 2 * bf16.weights == held.weights


@pytest.mark.parametrize(
    ("method", "direction"),
    [
        ("lowrank", "adam"),
        ("lowrank_restarts", "adam"),
        ("lora", "adam"),
        ("lift", "adam"),
        ("trion", "adam"),
        ("full", "adam"),
        ("full", "orthogonal"),
    ],
)
def test_the_state_of_bfloat16_weights_is_counted_as_float32(method, direction):
    wide, narrow = (
        held_by(
            Config(
                method=method,
                direction=direction,
                model=dataclasses.replace(TINY, param_dtype=dtype),
            )
        )
        for dtype in ("float32", "bfloat16")
    )
    assert (narrow.optimizer, 2 * narrow.weights) == (wide.optimizer, wide.weights)


@pytest.mark.slow
def test_the_command():
    status, output = command("memory", "--model=60m", "--rank=128", "--json")
    assert status == 0, output
    assert [row["method"] for row in json.loads(output)] == list(METHODS)
    for arguments, message in (
        (["--model=61m"], "--model=61m: expected one of tiny, 60m, 130m"),
        (["--model=60m", "--rank=1000"], "model.rank"),
    ):
        status, output = command("memory", *arguments)
        assert status == 1
        assert message in output
        assert output.count("\n") == 1
