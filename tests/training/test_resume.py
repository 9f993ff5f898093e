"""Killed at any moment and started again, a run ends as if it had never been interrupted."""

import os
import re
import shutil
import signal
import time

import pytest

from loro_jax.training.metrics import MetricsWriter
from tests.helpers import some_fast
from tests.training import runs

TIMEOUT = 600


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A corpus, and the directory of a run on it in this process."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    workdir = folder / "run"
    source = runs.corpus(folder)
    status, output = runs.run(*runs.flags(workdir, source))
    assert status == 0, output
    return source, workdir


@pytest.fixture(scope="module")
def freshly_compiled(tmp_path_factory):
    """The same, in another process and without what others have compiled."""
    folder = tmp_path_factory.mktemp("fresh")
    workdir = folder / "run"
    source = runs.corpus(folder)
    status, output = runs.finish(runs.start(*runs.flags(workdir, source), shared_cache=False))
    assert status == 0, output
    return source, workdir


def wait_for(condition, process):
    """Waits for a moment in a running process; False when it ended before."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    raise AssertionError("the moment never came")


def reached(workdir, step):
    metrics = workdir / "metrics.jsonl"
    return lambda: metrics.exists() and f'"step": {step},' in metrics.read_text()


def writing_a_checkpoint(workdir, behind):
    """A checkpoint newer than step ``behind`` is half on disk (Orbax writes beside its place)."""
    folder = workdir / "checkpoints"

    def condition():
        names = os.listdir(folder) if folder.exists() else []
        steps = [int(name.split(".")[0]) for name in names if "tmp" in name and name[0].isdigit()]
        return any(step > behind for step in steps)

    return condition


def saved_steps(checkpoints):
    return [int(name) for name in os.listdir(checkpoints) if name.isdigit()]


def end_when(source, workdir, condition, number=signal.SIGKILL):
    """Sends a signal to a run at a moment: its status and output."""
    process = runs.start(*runs.flags(workdir, source))
    caught = wait_for(condition, process)
    process.send_signal(number)
    status, output = runs.finish(process)
    assert caught, f"the run ended before the signal:\n{output}"
    return status, output


@pytest.mark.slow
def test_a_signal_between_two_steps_saves_and_the_run_resumes(uninterrupted, tmp_path, monkeypatch):
    """SIGINT; SIGTERM is sent to a process below."""
    source, reference = uninterrupted
    number = signal.SIGINT
    workdir = tmp_path / "run"
    write = MetricsWriter.write

    def write_and_signal(writer, row):
        write(writer, row)
        if row["step"] == 3:
            signal.raise_signal(number)

    # Should the run handle no signal, this test fails, and not the process of all tests.
    before = signal.signal(number, lambda *_: pytest.fail("nothing handles the signal"))
    try:
        with monkeypatch.context() as patch:
            patch.setattr(MetricsWriter, "write", write_and_signal)
            status, output = runs.run(*runs.flags(workdir, source, checkpoint_every=1000))
    finally:
        signal.signal(number, before)
    assert status == 128 + number, output
    assert f"stopped by {number.name}" in output
    (saved,) = os.listdir(workdir / "checkpoints")
    assert int(saved) >= 3
    status, output = runs.run(*runs.flags(workdir, source))
    assert status == 0, output
    assert f"from step {saved}" in output
    assert runs.rows(workdir) == runs.rows(reference)


@pytest.mark.slow
def test_killed_at_several_moments_it_ends_bit_for_bit_the_same(freshly_compiled, tmp_path):
    source, reference = freshly_compiled
    workdir = tmp_path / "run"
    checkpoints = workdir / "checkpoints"
    # Before any checkpoint; going on from just behind an exact step (11) and from just before one
    # (99); and while a checkpoint is being written.
    end_when(source, workdir, reached(workdir, 2))
    assert not saved_steps(checkpoints)
    end_when(source, workdir, (checkpoints / "11").is_dir)
    _, output = end_when(source, workdir, writing_a_checkpoint(workdir, behind=33))
    assert re.search(r"continuing .* from step (11|22)", output)
    # A polite signal, sent when the run has written a checkpoint of its own: before, it may still
    # be starting and handle none. That it saves then, too, is tested above.
    newest = max(saved_steps(checkpoints))
    soon = checkpoints / str(newest - newest % 11 + 11)
    status, output = end_when(source, workdir, soon.is_dir, signal.SIGTERM)
    assert status == 128 + signal.SIGTERM, output
    assert "stopped by SIGTERM" in output
    saved = max(saved_steps(checkpoints))
    assert int(soon.name) <= saved < 99
    _, output = end_when(source, workdir, (checkpoints / "99").is_dir)
    assert f"from step {saved}" in output
    status, output = runs.finish(runs.start(*runs.flags(workdir, source)))
    assert status == 0, output
    assert re.search(r"continuing .* from step (99|110)", output)
    assert runs.rows(workdir) == runs.rows(reference)
    assert (workdir / "plot.png").stat().st_size > 5_000


@pytest.mark.slow  # the fast tier compares a resumed run with an uninterrupted one
def test_two_runs_of_one_seed_are_equal_and_of_two_seeds_are_not(
    uninterrupted, freshly_compiled, tmp_path
):
    source, reference = uninterrupted
    # One in this process, one in another, which has compiled everything itself.
    assert runs.rows(freshly_compiled[1]) == runs.rows(reference)
    workdir = tmp_path / "run"
    changes = {"seed": 1, "checkpoint_every": 1000}
    status, output = runs.run(*runs.flags(workdir, source, **changes))
    assert status == 0, output
    losses = [[row.get("loss") for row in runs.rows(of)] for of in (workdir, reference)]
    assert losses[0] != losses[1]


def test_a_finished_run_is_not_run_again(uninterrupted):
    source, workdir = uninterrupted
    before = (workdir / "metrics.jsonl").read_bytes()
    status, output = runs.run(*runs.flags(workdir, source))
    assert status == 0
    assert "validation perplexity" in output
    assert "step 120/120" not in output
    assert (workdir / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("damage", some_fast(["truncated", "flipped", "deleted"], ["flipped"]))
def test_a_damaged_checkpoint_falls_back_to_the_one_before(uninterrupted, tmp_path, damage):
    source, reference = uninterrupted
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    newest = workdir / "checkpoints" / "120"
    victim = max((newest / "state").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    content = victim.read_bytes()
    if damage == "truncated":
        victim.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        middle = len(content) // 2
        victim.write_bytes(
            content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]
        )
    else:
        victim.unlink()
    status, output = runs.run(*runs.flags(workdir, source))
    assert status == 0, output
    assert "checkpoint 120 is damaged" in output
    assert "continuing" in output
    assert (workdir / "damaged_checkpoints" / "120").is_dir()
    assert runs.rows(workdir) == runs.rows(reference)


def test_when_no_checkpoint_is_whole_nothing_is_touched(uninterrupted, tmp_path):
    source, reference = uninterrupted
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    for file in (workdir / "checkpoints").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:100])
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    status, output = runs.run(*runs.flags(workdir, source))
    assert status == 1
    assert output.count("\n") == 1
    assert "no checkpoint in" in output
    assert before == {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
