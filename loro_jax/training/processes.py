"""Several processes as one run: how they meet, agree, and part.

Every process runs the same program on its own devices; JAX joins these to one mesh. What only one
of them may do (files, what a person sees) the first does. An error of one is an error of all, so
that none waits for another that is gone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from loro_jax.errors import LostProcessError, TrainingError

T = TypeVar("T")

# Bytes of an error's message that travel to the other processes.
_MESSAGE_BYTES = 2048


class Cluster(NamedTuple):
    """How the processes of a run find each other.

    Attributes:
        coordinator: HOST:PORT of the first one, reached by all; None: as the environment says.
        processes: how many there are; None: as the environment says.
        process: the number of this one, from 0; None: as the environment says.
        discover: whether to join others at all when nothing above says so.
        heartbeat_seconds: silence after which a process is taken for dead.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    discover: bool = False
    heartbeat_seconds: int = 60


def connect(cluster: Cluster) -> None:
    """Joins the other processes; to be called before anything else of JAX.

    SLURM, Open MPI, Kubernetes and TPU pods say in the environment who is where; elsewhere the
    three fields of ``cluster`` do.

    Args:
        cluster: what the user said. Without any of it, there is one process and nothing happens.

    Raises:
        TrainingError: if they don't say who is where, or don't meet.
    """
    said = (cluster.coordinator, cluster.processes, cluster.process)
    if not cluster.discover and said == (None, None, None):
        return
    if cluster.coordinator is not None and not cluster.coordinator.rpartition(":")[2].isdigit():
        raise TrainingError(f"--coordinator={cluster.coordinator}: expected HOST:PORT.")
    known = cluster.process is not None and cluster.processes is not None
    if known and cluster.process not in range(cluster.processes or 0):
        raise TrainingError(
            f"--process={cluster.process}: expected a number from 0 to below --processes="
            f"{cluster.processes}."
        )
    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.processes,
            cluster.process,
            heartbeat_timeout_seconds=cluster.heartbeat_seconds,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise TrainingError(
            f"the processes of the run don't meet ({reason}); expected --coordinator=HOST:PORT, "
            "--processes=N and --process=I of each, or an environment (SLURM, Open MPI, "
            "Kubernetes, a TPU pod) that says as much."
        ) from None


def leave(status: int) -> int:
    """What a failing process ends with; among several, it ends here.

    The others may be gone, or wait in the middle of a step, and JAX would wait for them.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def is_first() -> bool:
    """Whether this process is the one that writes and shows."""
    return jax.process_index() == 0


def together(action: Callable[[], T]) -> T:
    """Does something in every process; what one of them raises, all raise.

    Args:
        action: without communication between processes in it.

    Returns:
        What it returned here.

    Raises:
        TrainingError: that of the action here, or of the first process where it raised one.
    """
    if jax.process_count() == 1:
        return action()
    outcome, failure = None, None
    try:
        outcome = action()
    except TrainingError as error:
        failure = error
    message = np.zeros(_MESSAGE_BYTES, np.uint8)
    text = str(failure or "").encode()[:_MESSAGE_BYTES]
    message[: len(text)] = np.frombuffer(text, np.uint8)
    messages = _gathered(message)
    if failure is not None:
        raise failure
    for process, said in enumerate(messages):
        if said.any():
            raise TrainingError(f"process {process}: {bytes(said).rstrip(bytes(1)).decode()}")
    return outcome  # type: ignore[return-value]


def largest(array: np.ndarray) -> np.ndarray:
    """The largest value of each entry over all processes."""
    return array if jax.process_count() == 1 else _gathered(array).max(axis=0)


def _gathered(array: np.ndarray) -> np.ndarray:
    """The arrays of all processes, stacked."""
    with others_alive():
        return np.asarray(multihost_utils.process_allgather(array))


class others_alive:  # noqa: N801 - a context manager, read as a phrase
    """A context in which the end of another process is an error of its own.

    Raises:
        LostProcessError: where JAX says that a message to or from another process failed.
    """

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        """Turns JAX's error into ours."""
        if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
            reason = str(error).strip().split("\n")[0][:200]
            raise LostProcessError(
                f"process {jax.process_index()} of {jax.process_count()} lost another one "
                f"({reason}); stopped. The last whole checkpoint is kept: run the same command "
                "again, with as many processes as you like."
            ) from None
