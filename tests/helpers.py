"""What tests of several folders share."""

import chex


def assert_trees_match(found, wanted, **tolerance):
    """Trees of one structure, of the same dtypes, and close: chex compares values alone."""
    chex.assert_trees_all_equal_dtypes(found, wanted)
    chex.assert_trees_all_close(found, wanted, **tolerance)
