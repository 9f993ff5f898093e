"""Thread limits of the libraries besides XLA."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import scipy.linalg  # noqa: F401  JAX calls its LAPACK, and loads it only with the first call
from threadpoolctl import threadpool_limits


@contextlib.contextmanager
def lapack_by_one_thread() -> Iterator[None]:
    """Limits LAPACK to one thread in this context, to leave the CPU's cores to XLA.

    JAX calls SciPy's OpenBLAS, which has one thread per core and lets them spin while they wait for
    more work, on the cores that XLA's threads need. For an exact step this costs more than a second
    thread gains (``python -m loro_jax bench exact_step``, with and without
    ``OPENBLAS_NUM_THREADS=1``).

    Example:
        >>> from threadpoolctl import threadpool_info
        >>> with lapack_by_one_thread():
        ...     {library["num_threads"] for library in threadpool_info()
        ...      if library["user_api"] == "blas"}
        {1}
    """
    with threadpool_limits(limits=1, user_api="blas"):
        yield
