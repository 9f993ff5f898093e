"""One run by several real processes: their losses, their ends, and who goes on."""

import json
import os
import re
import signal
import time

import chex
import numpy as np
import pytest

from loro_jax.errors import TrainingError
from loro_jax.training.processes import Cluster, connect, together
from tests.training import runs

TWO_DEVICES = {"JAX_NUM_CPU_DEVICES": "2"}


def wait_for(condition, processes):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), runs.finish_all(processes)
        time.sleep(0.05)


def last_step(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


def tables(workdir):
    """What a run writes of its factors, by step."""
    lines = (workdir / "inspect.jsonl").read_text().splitlines()
    return {row["step"]: row["matrices"] for row in map(json.loads, lines)}


@pytest.mark.slow
def test_processes_come_and_go_and_the_losses_are_those_of_one(tmp_path):
    source = runs.corpus(tmp_path)
    one, workdir = tmp_path / "one", tmp_path / "run"
    # Tables of factors gather them from all processes.
    inspected = {"inspect_every": 8}
    small = {**runs.SMALL, **inspected}
    status, output = runs.run(*runs.flags(one, source, steps=24, **small))
    assert status == 0, output

    # Two processes with two devices each; one is killed once there is a checkpoint. Steps are slow
    # enough for that.
    two = runs.start_all(2, workdir, [source] * 2, TWO_DEVICES, **{"mesh.fsdp": 2}, **inspected)
    wait_for((workdir / "checkpoints" / "11").exists, two)
    two[1].send_signal(signal.SIGKILL)
    ends = runs.finish_all(two)
    assert ends.pop(1)[0] == -signal.SIGKILL
    for status, output in ends:
        assert status not in (0, -signal.SIGKILL), output
        assert "lost another one" in output or "another task died" in output
    if last_step(workdir) < 24:
        # Two on another mesh; a signal to one of them stops both.
        mesh = {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 2, **inspected}
        left = (workdir / "metrics.jsonl").read_bytes()
        two = runs.start_all(2, workdir, [source] * 2, TWO_DEVICES, **mesh)
        # While they start, the file holds rows of the first, and no handler waits for a signal.
        # They drop the rows past their checkpoint, and then add their own.
        wait_for(lambda: (workdir / "metrics.jsonl").read_bytes() != left, two)
        soon = min(last_step(workdir) + 1, 24)
        wait_for(lambda: last_step(workdir) >= soon, two)
        two[1].send_signal(signal.SIGTERM)
        ends = runs.finish_all(two)
        assert {status for status, _ in ends} <= {0, 128 + signal.SIGTERM}, ends
        assert ends[0][0] == ends[1][0]
        assert "continuing" in ends[0][1]
        assert "step 1" not in ends[1][1], "only the first shows anything"
    # And one ends what is left.
    status, output = runs.run(*runs.flags(workdir, source, steps=24, **small))
    assert status == 0, output
    expected, found = runs.rows(one), runs.rows(workdir)
    assert [row["tokens"] for row in found] == [row["tokens"] for row in expected]
    for one_row, row in zip(expected, found, strict=True):
        key = "loss" if "loss" in one_row else "val_loss"
        np.testing.assert_allclose(row[key], one_row[key], rtol=1e-4)
    chex.assert_trees_all_close(tables(workdir), tables(one), rtol=1e-3)


@pytest.mark.slow
def test_an_error_of_one_process_is_an_error_of_all(tmp_path):
    source = runs.corpus(tmp_path)
    missing = tmp_path / "missing.txt"
    ends = runs.finish_all(runs.start_all(2, tmp_path / "run", [source, missing], {}))
    assert [status for status, _ in ends] == [1, 1]
    assert "error: process 1: " in ends[0][1]
    for _, output in ends:
        assert f"{missing}" in output
    assert not os.path.exists(tmp_path / "run")


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        (Cluster("somewhere"), "--coordinator=somewhere: expected HOST:PORT"),
        (Cluster("here:1", 2, 2), "--process=2: expected .* below --processes=2"),
    ],
)
def test_what_does_not_say_who_is_where_is_named(cluster, message):
    with pytest.raises(TrainingError, match=message):
        connect(cluster)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coordinator=localhost:1", "--processes=2"], "could not connect .*process id"),
        (["--distributed"], "could not connect .*coordinator"),
    ],
)
@pytest.mark.slow
def test_what_nothing_in_the_environment_says_is_named(tmp_path, flags, message):
    """By processes of their own: JAX asks nobody once it has computed something."""
    status, output = runs.finish(runs.start(f"--workdir={tmp_path / 'run'}", *flags))
    assert status == 1
    assert re.fullmatch(f"error: .*{message}.*\n", output), output
    assert not (tmp_path / "run").exists()


def test_one_process_needs_nobody():
    connect(Cluster())
    assert together(lambda: 5) == 5
