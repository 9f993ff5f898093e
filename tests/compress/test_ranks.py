"""Ranks: how many parameters they keep, and where."""

import numpy as np
import pytest

from loro_jax.compress.ranks import (
    fixed_ranks,
    parameters,
    proportional_ranks,
    threshold_ranks,
)
from loro_jax.errors import TrainingError

SHAPES = {"q": (64, 64), "k": (16, 64), "gate": (96, 64), "down": (64, 96)}
LAYERS = 6
TOTAL = LAYERS * sum(m * n for m, n in SHAPES.values())


@pytest.fixture
def spectra():
    """Of each layer and projection, falling at a speed of its own."""
    rng = np.random.default_rng(0)
    return {
        name: [
            np.sort(np.exp(-np.arange(min(shape)) * speed) * rng.uniform(0.5, 1, min(shape)))[::-1]
            for speed in rng.uniform(0.01, 0.1, LAYERS)
        ]
        for name, shape in SHAPES.items()
    }


def at(keep, spectra):
    return threshold_ranks(keep, SHAPES, LAYERS, lambda: spectra)


def test_one_threshold_keeps_the_fraction_of_parameters(spectra):
    for keep in (0.1, 0.3, 0.5, 0.7, 0.9):
        ranks = at(keep, spectra)
        found = parameters(ranks, SHAPES, LAYERS) / TOTAL
        assert keep - 0.01 <= found <= keep
        assert len({rank for found in ranks.values() for rank in found or []}) > 1


def test_the_threshold_falls_as_more_is_kept(spectra):
    before = None
    for keep in np.linspace(0.05, 0.95, 10):
        ranks = at(keep, spectra)
        now = {name: found or [min(SHAPES[name])] * LAYERS for name, found in ranks.items()}
        if before is not None:
            assert all(np.all(np.array(now[name]) >= before[name]) for name in SHAPES)
        before = now


def test_ranks_are_the_values_above_the_threshold(spectra):
    """And projections stay dense as a whole where their pairs would not be smaller."""
    ranks = at(0.8, spectra)
    scaled = {
        name: [(one - one.min()) / (one.max() - one.min()) for one in found]
        for name, found in spectra.items()
    }
    pairs = {name: found for name, found in ranks.items() if found is not None}
    assert 0 < len(pairs) < len(SHAPES)
    lowest = min(
        one[rank - 1] for name in pairs for one, rank in zip(scaled[name], pairs[name], strict=True)
    )
    highest_left = max(
        one[rank] for name in pairs for one, rank in zip(scaled[name], pairs[name], strict=True)
    )
    assert highest_left < lowest
    for name in SHAPES.keys() - pairs.keys():
        m, n = SHAPES[name]
        assert sum(int((one >= lowest).sum()) for one in scaled[name]) * (m + n) >= LAYERS * m * n


def test_ranks_in_proportion():
    ranks = proportional_ranks(0.5, SHAPES, LAYERS)
    assert ranks == {
        "q": [16] * LAYERS,
        "k": [6] * LAYERS,
        "gate": [19] * LAYERS,
        "down": [19] * LAYERS,
    }
    real = {"q": (576, 576), "k": (192, 576), "gate": (1536, 576)}
    for keep in (0.9, 0.5, 0.2):
        found = parameters(proportional_ranks(keep, real, 1), real, 1)
        assert found == pytest.approx(keep * sum(m * n for m, n in real.values()), rel=0.01)


def test_one_rank_for_all_is_at_most_the_smaller_side():
    assert fixed_ranks(20, SHAPES, 2) == {"q": [20] * 2, "k": [16] * 2, "gate": [20] * 2,
                                          "down": [20] * 2}  # fmt: skip


def test_fractions_that_can_not_be_met_are_named(spectra):
    with pytest.raises(TrainingError, match=r"keep = 0.001 can't be met: pairs of rank 1 have 0.0"):
        at(0.001, spectra)
    with pytest.raises(TrainingError, match=r"keep = 0.001 can't be met"):
        proportional_ranks(0.001, SHAPES, LAYERS)
