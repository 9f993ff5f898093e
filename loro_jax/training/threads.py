"""How many threads the libraries around XLA take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import scipy.linalg  # noqa: F401  JAX calls its LAPACK, and loads it only with the first call
from threadpoolctl import threadpool_limits


@contextlib.contextmanager
def lapack_by_one_thread() -> Iterator[None]:
    """Leaves the cores to XLA: on CPU, LAPACK factorises with one thread while this lasts.

    JAX calls SciPy's OpenBLAS, which has as many threads as there are cores and lets them wait for
    more work, turning, when theirs is done; meanwhile XLA's threads share the cores with them. For
    an exact step that costs more than two threads gain (``python -m loro_jax.bench exact_step``,
    with and without ``OPENBLAS_NUM_THREADS=1``).

    Example:
        >>> from threadpoolctl import threadpool_info
        >>> with lapack_by_one_thread():
        ...     {library["num_threads"] for library in threadpool_info()
        ...      if library["user_api"] == "blas"}
        {1}
    """
    with threadpool_limits(limits=1, user_api="blas"):
        yield
