"""Exact steps shared by eight simulated devices, from every layout of the factors."""

import functools
import os

import jax
import jax.numpy as jnp
import pytest

from loro_jax.pair_parallel import _division
from tests.helpers import run_module

# Entries of the largest leaf, the B of eight layers.
SCANNED_FACTOR = 8 * 64 * 16


@pytest.fixture(scope="module", params=["explicit", "auto"])
def seen(request):
    """What happened on a mesh of one axis or two, by mesh and layout."""
    rows = run_module("tests.eight_devices", request.param)
    return {(row["mesh"], row["layout"]): row for row in rows}


@pytest.mark.slow
def test_updates_are_those_of_one_device(seen):
    assert len(seen) == 9
    for where, row in seen.items():
        assert row["error"] < 1e-5, where


@pytest.mark.slow
def test_factors_and_state_lie_as_they_did(seen):
    for where, row in seen.items():
        assert row["state_lies_as_the_factors"], where
        assert row["factors_lie_as_before"], where


@pytest.mark.slow
def test_split_factors_are_never_gathered(seen):
    """Those that are replicated are put together one after the other; nothing else is."""
    for layout in ("rows", "columns", "rank"):
        assert seen["line", layout]["largest_gather"] == 0, layout
    for where, row in seen.items():
        assert row["largest_gather"] <= SCANNED_FACTOR, where
        assert row["full_size"] == 0, f"{where}: a full-size W"


@pytest.mark.slow
def test_each_pair_is_factored_once_in_the_whole_mesh(seen):
    for mesh in ("line", "square"):
        row = seen[mesh, "mixed"]
        assert row["factored"] == [1] * row["pairs"]
        # Eight devices in rounds of one pair each: the last round is filled up.
        assert row["in_all"] == 16


def compiled(*arguments):
    """What the program of LLaMA-1B prints. Nothing runs: code need not be fast."""
    quick = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    quick += " --xla_llvm_disable_expensive_passes=true"
    (row,) = run_module("tests.exact.exact_step_of_1b", *arguments, XLA_FLAGS=quick)
    return row


@functools.cache
def of_one_pair():
    return compiled(1, 1)


@pytest.mark.parametrize(
    ("devices", "rounds"),
    # 96 pairs of q, k, v, o; 48 of gate and up; 24 of down: of each shape a device takes its share.
    [(8, 96 // 8 + 48 // 8 + 24 // 8), (64, 2 + 1 + 1)],
)
@pytest.mark.slow
def test_the_168_pairs_of_1b_are_shared_by_all_devices(devices, rounds):
    row = compiled(devices)
    assert row["factored"] == rounds * of_one_pair()["factored"]
    assert row["sent"] == 0, "an approximate step exchanges nothing here"
    # Factors and directions go out, and updates come back to where everybody has a copy.
    assert 0 < row["sent_exact"] < 2 * row["bytes"]


def test_one_device_divides_nothing():
    assert _division([jnp.ones((4, 2))], None) is None
    assert _division([], jax.make_mesh((1,), ("x",))) is None
