"""Shared by all tests: where optional reference material lies, and a float64 switch."""

import gc
import os
import pathlib
import tempfile

import jax
import pytest

# Tests compile the same small programs again and again: they share what was compiled, among the
# processes of one session. Processes that the tests start inherit it.
CACHE = os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="loro_jax_tests_")
)
jax.config.update("jax_compilation_cache_dir", CACHE)
# The many small programs of the tests' own processes are not worth a file each.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

ROOT = pathlib.Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"


# Every compiled program takes some memory maps of its process, of which Linux allows 65,530 in all;
# XLA crashes when there are none left. Those of earlier tests are of no use to later ones.
MAPS = pathlib.Path("/proc/self/maps")
MANY_MAPS = 25_000


@pytest.fixture(autouse=True)
def _few_programs():
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()
        gc.collect()


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
