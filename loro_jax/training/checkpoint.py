"""Checkpoints: state, place in the data and counters together, checked when they are read.

Orbax writes each checkpoint beside its place and renames it, so a kill at any moment leaves the
earlier ones whole. What Orbax does not notice is a byte that has changed on disk: every checkpoint
therefore carries a checksum of its arrays, computed on the devices. Nothing in it depends on how
many devices or processes there were.
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
    """What a checkpoint holds.

    Attributes:
        step: its step.
        state: the restored state.
        progress: the counters saved with it.
    """

    step: int
    state: Any
    progress: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run directory.

    Args:
        directory: where they are; made when missing.
        keep: how many of the latest to keep.
        warn: called with a line to print when a checkpoint turns out to be damaged.
    """

    def __init__(self, directory: pathlib.Path, keep: int, warn: Callable[[str], None]):
        # Orbax logs each save, and dumps a traceback where it meets a file it can't read.
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
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=policies.LatestN(self._keep),
                cleanup_tmp_directories=True,
            )
        except OSError as error:
            raise cannot_write(self._directory, error) from None

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Saves in the background; waits for the save before it. Does nothing if it exists.

        Args:
            step: behind which the state is.
            state: all that changes on the devices.
            progress: numbers and small arrays, the same in every process.
        """
        self.wait()
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
        """Waits until the last save is on disk.

        Raises:
            TrainingError: if it could not be written; the checkpoints before it are whole.
        """
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
        if is_first():  # half a checkpoint takes room that the next try needs
            for half in self._directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(half, ignore_errors=True)
        return TrainingError(
            f"the checkpoint of step {step} can't be written to {self._directory} ({reason}); "
            "earlier checkpoints are whole: make room and run the same command again."
        )

    def restore(self, abstract_state: Any) -> Restored | None:
        """Restores the newest checkpoint that is whole.

        Damaged ones behind it are moved out of the way, to ``damaged_checkpoints/``, and reported.

        Args:
            abstract_state: shapes, dtypes and shardings of the state.

        Returns:
            What it holds; None when there is no checkpoint.

        Raises:
            TrainingError: if there are checkpoints and none of them is whole.
        """
        steps = sorted((c.step for c in self._checkpointer.checkpoints), reverse=True)
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
        self._checkpointer.close()
        for step, reason in damaged:
            target = self._directory.parent / "damaged_checkpoints" / str(step)
            if target.exists():
                target = _unused(target)
            together(functools.partial(self._move, step, target))
            self._warn(
                f"checkpoint {step} is damaged ({reason}); moved to {target}, "
                f"going on from the one of step {good_step}."
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
        """Waits for a save under way and releases the directory."""
        try:
            self.wait()
        finally:
            try:
                self._checkpointer.close()
            except Exception as error:  # a failed save is told again, which has been told
                if not self._failed:
                    raise self._cannot_write(self._pending_step, error) from None


def read_checkpoint(path: pathlib.Path, abstract_state: Any) -> Any:
    """The state of one checkpoint; nothing on disk is touched.

    Args:
        path: the checkpoint's directory.
        abstract_state: shapes, dtypes and shardings of the state.

    Returns:
        The state.

    Raises:
        ValueError: if a byte of it has changed; or whatever Orbax raises when it can't be read.
    """
    content = ocp.load_checkpointables(path.absolute(), {"state": _checked(abstract_state)})
    return _check(content["state"])


def _checked(abstract_state: Any) -> dict[str, Any]:
    """A state as it is stored, with its checksum."""
    leaves = jax.tree.leaves(abstract_state)
    # On the devices of now: those that wrote the checkpoint may not be there.
    everywhere = jax.sharding.NamedSharding(leaves[0].sharding.mesh, jax.sharding.PartitionSpec())
    checksum = jax.ShapeDtypeStruct((len(leaves),), jnp.uint32, sharding=everywhere)
    return {"state": abstract_state, "checksum": checksum}


def _check(stored: dict[str, Any]) -> Any:
    """The state, if its checksum is the stored one."""
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
    """One uint32 per leaf: its words, each weighted by its place, summed modulo 2^32.

    Integer sums do not depend on their order, so the value is the same on any mesh.
    """

    def leaf_checksum(leaf: Array) -> Array:
        words = leaf.astype(jnp.uint32) if leaf.dtype == jnp.bool_ else _words(leaf)
        places = jnp.arange(words.size, dtype=jnp.uint32).reshape(words.shape)
        return jnp.sum(words * (2 * places + 1), dtype=jnp.uint32)

    return jnp.stack([leaf_checksum(jnp.asarray(leaf)) for leaf in jax.tree.leaves(tree)])


def _words(leaf: Array) -> Array:
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[leaf.dtype.itemsize]
    return jax.lax.bitcast_convert_type(leaf, bits).astype(jnp.uint32)
