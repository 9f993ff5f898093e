"""The same steps on eight devices, in every direction of a mesh: losses, and what is sent."""

import numpy as np
import pytest

from tests.helpers import run_module
from tests.training.eight_devices_adapters import KINDS

pytestmark = pytest.mark.slow

# Sums of losses and norms, counts of tokens.
SCALARS = 256


@pytest.fixture(scope="module")
def seen():
    rows = run_module("tests.training.eight_devices")
    return {(row["method"], row["mesh"]): row for row in rows}


@pytest.mark.parametrize("method", ["loro", "full"])
@pytest.mark.parametrize("mesh", ["8x1x1", "1x8x1", "1x1x8", "2x2x2"])
def test_losses_are_those_of_one_device(seen, method, mesh):
    one, several = seen[method, "1x1x1"]["losses"], seen[method, mesh]["losses"]
    assert one[-1] < 0.9 * one[0]
    np.testing.assert_allclose(several, one, rtol=1e-4)


@pytest.mark.parametrize("method", ["lost", "gradnormlorp", "lift", "osft", "sst", "trp"])
def test_methods_with_arrays_of_their_own_are_sharded_too(seen, method):
    one, several = (seen[method, mesh]["losses"] for mesh in ("1x1x1", "2x2x2"))
    assert one[-1] < 0.9 * one[0]
    np.testing.assert_allclose(several, one, rtol=1e-4)


@pytest.mark.parametrize("method", ["loro", "full"])
def test_one_device_sends_nothing(seen, method):
    assert seen[method, "1x1x1"]["sent_exact"] == 0


@pytest.mark.parametrize("method", ["loro", "full"])
def test_copies_of_the_model_exchange_their_gradients_once_a_step(seen, method):
    """Behind the last micro-batch, and nothing else but scalars."""
    row = seen[method, "8x1x1"]
    assert row["by_kind"].keys() == {"all-reduce"}
    assert 0 <= row["by_kind"]["all-reduce"] - row["parameter_bytes"] < SCALARS


@pytest.mark.parametrize("mesh", ["8x1x1", "1x8x1", "1x1x8", "2x2x2"])
def test_factors_send_less_than_the_matrices_that_they_stand_for(seen, mesh):
    assert seen["loro", mesh]["sent"] < 0.75 * seen["full", mesh]["sent"]


@pytest.mark.parametrize("mesh", ["8x1x1", "1x8x1", "1x1x8", "2x2x2"])
def test_an_exact_step_sends_a_few_times_the_factors_more(seen, mesh):
    row = seen["loro", mesh]
    assert 0 < row["sent_exact"] - row["sent"] < 6 * row["parameter_bytes"]


def test_adapters_are_sharded_too():
    rows = run_module("tests.training.eight_devices_adapters")
    losses = {(row["kind"], row["mesh"]): row["losses"] for row in rows}
    for kind in KINDS:
        one, several = (losses[kind, mesh] for mesh in ("1x1x1", "2x2x2"))
        assert one[-1] < one[0], kind
        np.testing.assert_allclose(several, one, rtol=1e-3, err_msg=kind)
