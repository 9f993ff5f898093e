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
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that a process asks for itself


import fnmatch
import gc
import itertools
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import jax
import jaxlib
import pytest
from jax._src.interpreters import mlir

pytest_plugins = ["tests.processor_time"]

ROOT = pathlib.Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"

# Together they compile in a quarter of the time. The first are options of every version of XLA.
QUICK = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
    # Small programs gain nothing from being split into modules that compile in parallel.
    "--xla_cpu_parallel_codegen_split_count=1",
)

# What is compiled as users do: it compares roundings, or what a program holds. Of exact steps, the
# default method and the reference; the quick tiers compare the others.
OPTIMIZED = (
    "exact/test_retractions.py::test_float32_error*graph[]]",
    "exact/test_retractions.py::test_float32_error*svd[]]",
    "exact/test_retractions.py::test_ranks_of_several_blocks*graph[]]",
    "exact/test_retractions.py::test_the_reference_of_a_tpu*",
    "exact/test_retractions.py::test_pairs_of_all_shapes*",
    "exact/test_retractions.py::test_a_batch_falls_back*graph*",
    "exact/test_retractions.py::test_what_a_step_needs*",
    "exact/test_tangent.py::test_exact_update_is_the_truncated_svd[[]9-12-4-*",
    "exact/test_tangent.py::test_narrow_factors*",
    "exact/test_tangent.py::test_float32_is_close*",
    "linalg/*",
    "test_parity.py::test_every_loss*",
    "training/test_step.py::test_exact_steps_need_no_memory*",
)

# By their processor time in either tier, the longest first.
LONGEST = (
    "training/test_meshes.py",
    "training/test_glue.py",
    "training/test_methods.py",
    "bench/test_bench.py",
    "training/test_resume.py",
    "training/test_processes.py",
    "test_pair_parallel.py",
    "training/test_adapters.py",
    "test_programs.py",
    "layers/test_nnx.py",
    "bench/test_counterpart.py",
    "training/test_ranks.py",
    "training/test_growth.py",
    "training/test_tasks.py",
    "training/test_distillation.py",
    "test_loro.py",
    "training/test_settings.py",
    "layers/test_equinox.py",
    "layers/test_examples.py",
    "models/test_decoding.py",
    "study/test_glue_comparison.py",
    "training/test_resume_data.py",
    "models/test_huggingface_adapters.py",
    "test_optax.py",
    "exact/test_retractions.py",
    "training/test_stored_adapters.py",
    "exact/test_tangent.py",
    "commands/test_inspect.py",
    "models/test_huggingface.py",
    "layers/test_nnx_networks.py",
    "training/test_trained.py",
    "study/test_comparison.py",
    "models/test_llama.py",
    "training/test_networks.py",
    "commands/test_healing.py",
    "text/tokenizers/test_conversion.py",
    "training/test_tables.py",
    "training/test_step.py",
    "planning/test_memory_table.py",
    "exact/test_transport.py",
    "test_readme.py",
    "text/tokenizers/test_tokenizer.py",
    "exact/test_basis.py",
    "layers/test_adapters.py",
    "study/test_sweep.py",
    "peers/test_preconditioned.py",
    "training/test_command.py",
    "peers/test_projections.py",
    "planning/test_plan.py",
    "test_processor_time.py",
    "layers/test_linen.py",
    "models/test_roberta.py",
    "compress/test_compression.py",
    "test_parity.py",
)

# MLIR's context of a program takes longer to make than a small program takes to translate.
PROGRAMS_OF_A_CONTEXT = 200

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
# Recording the Python lines that each operation comes from slows tracing, and no test reads them.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
jax.config.update("jax_traceback_in_locations_limit", 0)
# Programs that compile quicker than that are not worth a file each.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _share_contexts():
    """Lets programs of a thread share a context of MLIR, where this version of JAX allows it."""
    make = getattr(mlir, "make_ir_context", None)
    if make is None:
        return
    held = threading.local()

    def make_or_share():
        used = getattr(held, "used", 0)
        if used % PROGRAMS_OF_A_CONTEXT == 0:
            held.context = make()
        held.used = used + 1
        return held.context

    mlir.make_ir_context = make_or_share


_share_contexts()


def _known_options(config):
    """Those of QUICK that this version of XLA has: it ends a process for any other."""
    cache = getattr(config, "cache", None)  # pytest can do without
    key = f"quick_options/{jaxlib.__version__}"
    asked, known = (cache and cache.get(key, None)) or (None, [])
    if asked != list(QUICK):
        together = _are_known(*QUICK)
        known = [option for option in QUICK if together or _are_known(option)]
        if cache is not None:
            cache.set(key, [list(QUICK), known])
    return known


def _are_known(*options):
    environment = {**os.environ, "XLA_FLAGS": " ".join(options), "JAX_PLATFORMS": "cpu"}
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
    """Marks the tests that need XLA's optimizations; sorts the files."""
    for item in items:
        name = f"{_file_of(item)}::{item.name}"
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in OPTIMIZED):
            item.add_marker(pytest.mark.optimized)
    items.sort(key=_turn)


def _file_of(item):
    return os.path.relpath(item.path, ROOT / "tests").replace(os.sep, "/")


def _turn(item):
    """The place of a test's file: the longest come first, so that none is left for the end."""
    name = _file_of(item)
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


def pytest_collection_finish():
    """Lets the garbage collector look at what tests make, not at hundreds of modules."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


# Every compiled program takes some memory maps of its process, of which Linux allows 65,530 in all;
# XLA crashes when there are none left. Those of earlier tests are of no use to later ones. Counting
# them takes tens of milliseconds.
MAPS = pathlib.Path("/proc/self/maps")
MANY_MAPS = 30_000
TESTS_BETWEEN_COUNTS = 16


@pytest.fixture(autouse=True)
def _few_programs():
    yield
    if next(_tests) % TESTS_BETWEEN_COUNTS or not MAPS.exists():
        return
    if MAPS.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()
        gc.collect()


_tests = itertools.count(1)


@pytest.fixture(autouse=True, scope="module")
def _no_plots(request):
    """Leaves an empty file for a run's plot, which takes as long as a run of a few steps.

    Modules that look at it say ``DRAWS_PLOTS = True``.
    """
    with pytest.MonkeyPatch.context() as patch:
        for module, function in PLOTS if not getattr(request.module, "DRAWS_PLOTS", False) else ():
            if module in sys.modules:
                patch.setattr(sys.modules[module], function, lambda rows, path, *_: path.touch())
        yield


PLOTS = (
    ("loro_jax.training.language", "plot_run"),
    ("loro_jax.training.glue_inputs", "plot_measures"),
)


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
