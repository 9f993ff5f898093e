"""Shared by all tests: where optional reference material lies, and a float64 switch."""

import pathlib

import jax
import pytest

ROOT = pathlib.Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"


@pytest.fixture
def x64():
    """Runs a test in double precision."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def shared_data():
    """The folder of real corpora and tokenizers beside the checkout; skips where there is none."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"no reference data at {folder}")
    return folder
