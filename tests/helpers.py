"""What tests of several folders share."""

import chex
import pytest


def assert_trees_match(found, wanted, **tolerance):
    """Trees of one structure, of the same dtypes, and close: chex compares values alone."""
    chex.assert_trees_all_equal_dtypes(found, wanted)
    chex.assert_trees_all_close(found, wanted, **tolerance)


def some_fast(values, fast):
    """Parameters of a test: those in ``fast`` in both tiers, all others in the slow one alone."""
    return [x if x in fast else pytest.param(x, marks=pytest.mark.slow) for x in values]
