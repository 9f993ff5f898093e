"""Checkpoints of training state, data position and counters, verified by checksums when read.

Orbax writes each checkpoint to a temporary name and renames it, so earlier ones survive a kill at
any moment. Orbax does not detect bytes that change on disk: every checkpoint therefore has a
checksum of its arrays, computed on the devices. A checkpoint does not depend on the number of
devices or processes.
"""

from __future__ import annotations

import functools
import logging
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from loro_jax.errors import TrainingError, cannot_write
from loro_jax.training.processes import is_first, together

Array = jax.Array


class Restored(NamedTuple):
    """Content of a checkpoint.

    Attributes:
        step: step of the checkpoint.
        state: the restored state.
        progress: the counters and data position saved with it.
    """

    step: int
    state: Any
    progress: dict[str, Any]


class Checkpoints:
    """Saves and restores the checkpoints of a run directory.

    Args:
        directory: directory of the checkpoints; created if missing.
        keep: number of checkpoints to keep.
        warn: called with a line to print for each damaged checkpoint.
    """

    def __init__(self, directory: pathlib.Path, keep: int, warn: Callable[[str], None]):
        # Orbax logs every save, and a traceback for every file it can't read.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._directory = directory
        self._keep = keep
        self._warn = warn
        self._pending: Any = None
        self._pending_step = 0
        self._failed = False
        self._open()

    def _open(self) -> None:
        policies = ocp.training.preservation_policies
        try:
            self._checkpointer = ocp.training.Checkpointer(
                self._directory.absolute(),
                # The loop decides when to save; Orbax saves whenever it is asked.
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=policies.LatestN(self._keep),
                # What a kill in the middle of a save leaves.
                cleanup_tmp_directories=True,
            )
        except OSError as error:
            raise cannot_write(self._directory, error) from None

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Saves in the background, after the previous save has ended; skips an existing checkpoint.

        Args:
            step: number of steps taken.
            state: the training state, on the devices.
            progress: numbers and small arrays, the same in every process.
        """
        self.wait()
        # The checksum is computed on the devices, before the next step overwrites the donated
        # state.
        content = {
            "state": {"state": state, "checksum": _checksum(state)},
            "progress": progress,
        }
        try:
            if any(checkpoint.step == step for checkpoint in self._checkpointer.checkpoints):
                return
            self._pending = self._checkpointer.save_checkpointables_async(step, content, force=True)
        except Exception as error:  # Orbax passes on whatever the file system or tensorstore raised
            raise self._cannot_write(step, error) from None
        self._pending_step = step

    def wait(self) -> None:
        """Waits until the last checkpoint is on disk.

        Raises:
            TrainingError: if it could not be written; earlier checkpoints are intact.
        """
        # Forgotten first, so that a failed save is reported once.
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except Exception as error:  # Orbax passes on whatever the file system or tensorstore raised
            raise self._cannot_write(self._pending_step, error) from None

    def _cannot_write(self, step: int, error: Exception) -> TrainingError:
        self._failed = True
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        if is_first():  # free the space of the incomplete checkpoint for the next attempt
            for half in self._directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(half, ignore_errors=True)
        return TrainingError(
            f"the checkpoint of step {step} can't be written to {self._directory} ({reason}); "
            "earlier checkpoints are intact: make room and run the same command again."
        )

    def restore(self, abstract_state: Any) -> Restored | None:
        """Restores the newest intact checkpoint.

        Damaged ones after it are moved to ``damaged_checkpoints/`` and reported.

        Args:
            abstract_state: shapes, dtypes and shardings of the state.

        Returns:
            Its content; None if there is no checkpoint.

        Raises:
            TrainingError: if all checkpoints are damaged.
        """
        steps = sorted((c.step for c in self._checkpointer.checkpoints), reverse=True)
        # Moved only when an intact one is found: if there is none, nothing is changed.
        damaged: list[tuple[int, str]] = []
        for step in steps:
            try:
                restored = self._load(step, abstract_state)
            except Exception as error:  # what a damaged file raises depends on the file
                damaged.append((step, str(error).strip().split("\n")[0][:120]))
                continue
            self._set_aside(damaged, step)
            return restored
        if damaged:
            raise TrainingError(
                f"no checkpoint in {self._directory} can be read (steps "
                f"{', '.join(str(step) for step, _ in damaged)}; the newest: {damaged[0][1]}). "
                "Nothing was changed; start again with another --workdir."
            )
        return None

    def _load(self, step: int, abstract_state: Any) -> Restored:
        content = self._checkpointer.load_checkpointables(
            step, {"state": _checked(abstract_state), "progress": None}
        )
        return Restored(step, _check(content["state"]), content["progress"])

    def _set_aside(self, damaged: list[tuple[int, str]], good_step: int) -> None:
        if not damaged:
            return
        # Orbax lists the directory when it opens: closed before the renames, and opened after them.
        self._checkpointer.close()
        for step, reason in damaged:
            target = self._directory.parent / "damaged_checkpoints" / str(step)
            if target.exists():
                target = _unused(target)
            # No process opens the directory again before the first one has renamed it.
            together(functools.partial(self._move, step, target))
            self._warn(
                f"checkpoint {step} is damaged ({reason}); moved to {target}, "
                f"resuming from the checkpoint of step {good_step}."
            )
        self._open()

    def _move(self, step: int, target: pathlib.Path) -> None:
        if is_first():
            try:
                target.parent.mkdir(exist_ok=True)
                (self._directory / str(step)).rename(target)
            except OSError as error:
                raise cannot_write(target, error) from None

    def close(self) -> None:
        """Waits for a save in progress and releases the directory."""
        try:
            self.wait()
        finally:
            try:
                self._checkpointer.close()
            except Exception as error:  # a failed save is raised again
                if not self._failed:
                    raise self._cannot_write(self._pending_step, error) from None


def read_checkpoint(path: pathlib.Path, abstract_state: Any) -> Any:
    """Reads the state of one checkpoint without changing anything on disk.

    Args:
        path: directory of the checkpoint.
        abstract_state: shapes, dtypes and shardings of the state.

    Returns:
        The state.

    Raises:
        ValueError: if its checksum does not match. Orbax raises various errors for damaged files.
    """
    content = ocp.load_checkpointables(path.absolute(), {"state": _checked(abstract_state)})
    return _check(content["state"])


def _checked(abstract_state: Any) -> dict[str, Any]:
    """Returns the abstract content of a stored state, with its checksum."""
    leaves = jax.tree.leaves(abstract_state)
    # On the current devices: those that wrote the checkpoint may no longer exist.
    everywhere = jax.sharding.NamedSharding(leaves[0].sharding.mesh, jax.sharding.PartitionSpec())
    checksum = jax.ShapeDtypeStruct((len(leaves),), jnp.uint32, sharding=everywhere)
    return {"state": abstract_state, "checksum": checksum}


def _check(stored: dict[str, Any]) -> Any:
    """Returns the state if its checksum matches the stored one; raises ValueError otherwise."""
    if not np.array_equal(_checksum(stored["state"]), stored["checksum"]):
        raise ValueError("its checksum does not match")
    return stored["state"]


def _unused(path: pathlib.Path) -> pathlib.Path:
    number = 2
    while path.with_name(f"{path.name}.{number}").exists():
        number += 1
    return path.with_name(f"{path.name}.{number}")


@jax.jit
def _checksum(tree: Any) -> Array:
    """Computes one uint32 per leaf: the sum of its words, weighted by position, modulo 2^32.

    Integer sums do not depend on the order of summation, so the value is the same on any mesh.
    """

    def leaf_checksum(leaf: Array) -> Array:
        # bitcast_convert_type takes no booleans.
        words = leaf.astype(jnp.uint32) if leaf.dtype == jnp.bool_ else _words(leaf)
        places = jnp.arange(words.size, dtype=jnp.uint32).reshape(words.shape)
        # The weights are odd, and so invertible modulo 2^32: a change of a single word always
        # changes the sum. That they differ detects words in exchanged places.
        return jnp.sum(words * (2 * places + 1), dtype=jnp.uint32)

    return jnp.stack([leaf_checksum(jnp.asarray(leaf)) for leaf in jax.tree.leaves(tree)])


def _words(leaf: Array) -> Array:
    # Numbers of 8 bytes become two words each, along a new last axis.
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[leaf.dtype.itemsize]
    return jax.lax.bitcast_convert_type(leaf, bits).astype(jnp.uint32)
