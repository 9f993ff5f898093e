"""Shared by all tests: the two tiers, XLA's options, compiled programs, float64, real corpora.

``pytest`` runs the fast tier, ``pytest -m slow`` the slow one, ``pytest -m optimized`` what depends
on XLA's optimizations. The fast tier compiles without them: most of its time goes into compiling
small programs that run once. Any other choice of markers compiles as users do. Environment
variables:

* ``LORO_JAX_TESTS_XLA=default`` leaves XLA's options alone in the fast tier too, and ``quick``
  compiles any choice of markers without optimizations.
* ``LORO_JAX_TESTS_CACHE=DIR`` keeps compiled programs in another directory than
  ``~/.cache/loro_jax_tests/<version of JAX>``; empty: in a directory of this session alone.
"""

import os

# Before NumPy: between two small calls, threads of LAPACK and of torch keep the cores busy that the
# tests of other processes need.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")


import gc
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import jaxlib
import pytest

pytest_plugins = ["tests.processor_time"]

ROOT = pathlib.Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"

# Together they compile in a quarter of the time. The first are options of every version of XLA.
QUICK = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
)

# What is run once more, compiled as users do: it compares roundings, or what a program holds.
OPTIMIZED = (
    "exact/test_retractions.py::test_float32_error",
    "exact/test_retractions.py::test_ranks_of_several_blocks",
    "exact/test_retractions.py::test_the_reference_of_a_tpu",
    "exact/test_retractions.py::test_pairs_of_all_shapes",
    "exact/test_retractions.py::test_a_batch_falls_back",
    "exact/test_retractions.py::test_what_a_step_needs",
    "exact/test_tangent.py::test_exact_update_is_the_truncated_svd",
    "exact/test_tangent.py::test_narrow_factors",
    "exact/test_tangent.py::test_float32_is_close",
    "layers/test_equinox.py::test_the_character_model",
    "linalg/",
    "test_parity.py::test_every_loss",
    "training/test_step.py::test_the_step",
    "training/test_step.py::test_exact_steps_need_no_memory",
)

FOURTEEN_DAYS = 14 * 24 * 3600


def _cache_folder():
    """The directory of compiled programs, without those of more than two weeks ago."""
    chosen = os.environ.get("LORO_JAX_TESTS_CACHE")
    if chosen:
        return str(pathlib.Path(chosen).expanduser())
    if chosen == "":
        return tempfile.mkdtemp(prefix="loro_jax_tests_")
    folder = pathlib.Path(f"~/.cache/loro_jax_tests/{jax.__version__}").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*-cache"):
            if time.time() - path.stat().st_mtime > FOURTEEN_DAYS:
                path.unlink(missing_ok=True)
    except OSError:  # a home that can't be written to
        return tempfile.mkdtemp(prefix="loro_jax_tests_")
    return str(folder)


# Tests compile the same programs again and again: they share what was compiled with each other,
# with the processes that they start, and with the next session.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache_folder()
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
# Programs that compile quicker than that are not worth a file each.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _known_options(config):
    """Those of QUICK that this version of XLA has: it ends a process for any other."""
    cache = getattr(config, "cache", None)  # pytest can do without
    key = f"xla_options/{jaxlib.__version__}"
    known = cache and cache.get(key, None)
    if known is None:
        known = [option for option in QUICK if _is_known(option)]
        if cache is not None:
            cache.set(key, known)
    return known


def _is_known(option):
    environment = {**os.environ, "XLA_FLAGS": option, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(command, env=environment, capture_output=True).returncode == 0


def pytest_configure(config):
    """Sets XLA's options before it starts, here and in the processes that inherit them."""
    is_worker = hasattr(config, "workerinput")
    chosen = os.environ.get("LORO_JAX_TESTS_XLA")
    is_quick = chosen == "quick" or (chosen != "default" and config.option.markexpr == "not slow")
    if is_quick and not is_worker:
        given = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = " ".join([*_known_options(config), given]).strip()


def pytest_collection_modifyitems(items):
    """Marks the tests that are run once more, with XLA's optimizations."""
    for item in items:
        name = f"{item.path.relative_to(ROOT / 'tests').as_posix()}::{item.name}"
        if name.startswith(OPTIMIZED):
            item.add_marker(pytest.mark.optimized)


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
