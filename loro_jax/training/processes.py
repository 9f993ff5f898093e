"""Multi-process runs: connecting, sharing errors, and exiting.

Every process runs the same program on its own devices, which JAX joins to one mesh. The first
process alone writes files and terminal output. An error in one process is raised in all, so that
none waits for a process that has exited.
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

# Bytes of an error message that are sent to the other processes.
_MESSAGE_BYTES = 2048


class Cluster(NamedTuple):
    """Cluster configuration of a run.

    Attributes:
        coordinator: HOST:PORT of the first process, reachable by all; None: from the environment.
        processes: number of processes; None: from the environment.
        process: index of this process, from 0; None: from the environment.
        discover: whether to connect to other processes if none of the above is given.
        heartbeat_seconds: time without heartbeat after which a process counts as dead.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    discover: bool = False
    heartbeat_seconds: int = 60


def connect(cluster: Cluster) -> None:
    """Connects to the other processes; call it before any other function of JAX.

    SLURM, Open MPI, Kubernetes and TPU pods describe the cluster in the environment; elsewhere
    the first three fields of ``cluster`` are needed.

    Args:
        cluster: the user's settings; with the defaults nothing happens.

    Raises:
        TrainingError: if the cluster is not described, or the processes can't connect.
    """
    said = (cluster.coordinator, cluster.processes, cluster.process)
    # Never unasked: a run that is started alone on a cluster must not wait for others.
    if not cluster.discover and said == (None, None, None):
        return
    if cluster.coordinator is not None and not cluster.coordinator.rpartition(":")[2].isdigit():
        raise TrainingError(f"--coordinator={cluster.coordinator}: expected HOST:PORT.")
    # Either number may also come from the environment, and is then not known here.
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
            f"could not connect to the other processes ({reason}); expected "
            "--coordinator=HOST:PORT, --processes=N and --process=I for each, or an environment "
            "(SLURM, Open MPI, Kubernetes, a TPU pod) that sets them."
        ) from None


def leave(status: int) -> int:
    """Returns the exit status of a failing process; in a multi-process run, exits here.

    The others may have exited, or wait in the middle of a step, and JAX would wait for them.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        # sys.exit would run JAX's shutdown, which waits for all processes.
        os._exit(status)
    return status


def is_first() -> bool:
    """Returns whether this process is the one that writes files and terminal output."""
    return jax.process_index() == 0


def together(action: Callable[[], T]) -> T:
    """Runs an action in every process; a TrainingError in one of them is raised in all.

    Args:
        action: the action; it must not communicate between processes.

    Returns:
        The action's result in this process.

    Raises:
        TrainingError: the error in this process, or else in the first process that raised one.
    """
    if jax.process_count() == 1:
        return action()
    outcome, failure = None, None
    try:
        outcome = action()
    except TrainingError as error:
        failure = error
    # All processes must send arrays of one shape, whether they failed or not.
    message = np.zeros(_MESSAGE_BYTES, np.uint8)
    text = str(failure or "").encode()[:_MESSAGE_BYTES]
    message[: len(text)] = np.frombuffer(text, np.uint8)
    messages = _gathered(message)
    # Gathered before raising: a process that raised at once would leave the others waiting.
    if failure is not None:
        raise failure
    for process, said in enumerate(messages):
        if said.any():
            # Without the zeros that fill the message up; its last character may be cut.
            message_text = bytes(said).rstrip(bytes(1)).decode(errors="ignore")
            raise TrainingError(f"process {process}: {message_text}")
    return outcome  # type: ignore[return-value]


def largest(array: np.ndarray) -> np.ndarray:
    """Returns the entrywise maximum over all processes."""
    return array if jax.process_count() == 1 else _gathered(array).max(axis=0)


def _gathered(array: np.ndarray) -> np.ndarray:
    """Stacks the arrays of all processes."""
    with others_alive():
        return np.asarray(multihost_utils.process_allgather(array))


class others_alive:  # noqa: N801 - a context manager, read as a phrase
    """Context manager that raises LostProcessError if another process exits.

    Raises:
        LostProcessError: if communication with another process failed.
    """

    def __enter__(self) -> None:
        """Does nothing."""

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        """Converts JAX's error to ours."""
        if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
            reason = str(error).strip().split("\n")[0][:200]
            raise LostProcessError(
                f"process {jax.process_index()} of {jax.process_count()} lost another one "
                f"({reason}); stopped. The last complete checkpoint is kept: run the same command "
                "again, with any number of processes."
            ) from None
