"""A disk that fills, by a limit on the size of files: one line, and what was whole stays whole."""

import contextlib
import json
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loro_jax.errors import TrainingError
from loro_jax.training.checkpoint import Checkpoints
from loro_jax.training.config import Config
from loro_jax.training.metrics import MetricsWriter, read_rows
from loro_jax.training.plots import plot_run
from loro_jax.training.run_directory import RunDirectory


@contextlib.contextmanager
def no_file_above(size):
    """Writes beyond a size fail, as they do on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refused(caught, *words):
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in ("can't be written", "make room", *words)), message


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_that_does_not_fit_leaves_those_before_it(tmp_path):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    values = np.random.default_rng(0).integers(0, 2**32, 50_000, dtype=np.uint32)
    state = {"w": jax.device_put(jnp.asarray(values), sharding)}
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder, 3, print)
    checkpoints.save(1, state, {"tokens": 5})
    checkpoints.wait()

    def save():
        checkpoints.save(2, state, {"tokens": 6})
        checkpoints.wait()

    with no_file_above(20_000), pytest.raises(TrainingError) as caught:
        save()
    refused(caught, "the checkpoint of step 2")
    checkpoints.close()
    assert names(folder) == ["1"]
    again = Checkpoints(folder, 3, print)
    abstract = {"w": jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=sharding)}
    restored = again.restore(abstract)
    assert (restored.step, restored.progress["tokens"]) == (1, 5)
    np.testing.assert_array_equal(restored.state["w"], values)
    again.save(2, state, {"tokens": 6})
    again.close()
    assert names(folder) == ["1", "2"]


@pytest.mark.parametrize("tensorboard", [False, True])
def test_metrics_hold_whole_rows(tmp_path, tensorboard):
    writer = MetricsWriter(tmp_path, 0, tensorboard)
    row = {"loss": 1.5, "lr": 0.25}

    def fill():
        for step in range(1, 100):
            writer.write({"step": step, **row})
            writer.sync()

    with no_file_above(1000), pytest.raises(TrainingError) as caught:
        fill()
    refused(caught, "tensorboard" if tensorboard else "metrics.jsonl")
    writer.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [found["step"] for found in rows] == list(range(1, len(rows) + 1))
    assert len(rows) > 5
    with no_file_above(10), pytest.raises(TrainingError) as caught:
        MetricsWriter(tmp_path, 4, tensorboard)
    refused(caught, "metrics.jsonl")
    assert read_rows(tmp_path / "metrics.jsonl") == rows
    assert set(names(tmp_path)) <= {"metrics.jsonl", "tensorboard"}


def test_event_files_hold_the_rows(tmp_path):
    from tensorboardX.proto import event_pb2

    writer = MetricsWriter(tmp_path, 7, tensorboard=True)
    writer.write({"step": 8, "loss": 1.5})
    writer.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, events = path.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        events.append(event_pb2.Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    assert [event.step for event in events] == [0, 8, 8]
    assert events[1].session_log.status == event_pb2.SessionLog.START
    (value,) = events[2].summary.value
    assert (value.tag, value.simple_value) == ("loss", 1.5)


def test_the_plot_before_stays(tmp_path):
    (tmp_path / "plot.png").write_text("before")
    rows = [{"step": 1, "loss": 2.0, "tokens": 10}]
    with no_file_above(100), pytest.raises(TrainingError) as caught:
        plot_run(rows, tmp_path / "plot.png", None, "title")
    refused(caught, "plot.png")
    assert names(tmp_path) == ["plot.png"]
    assert (tmp_path / "plot.png").read_text() == "before"


def test_half_a_config_is_none(tmp_path):
    with (
        no_file_above(100),
        pytest.raises(TrainingError, match=r"can't be written \(File too large\)"),
    ):
        RunDirectory(tmp_path / "run", Config(), "fingerprint")
    assert names(tmp_path / "run") == ["data.json"]
    with RunDirectory(tmp_path / "run", Config(), "fingerprint"):
        assert names(tmp_path / "run") == ["config.json", "data.json"]


def test_a_directory_that_has_vanished_is_named(tmp_path):
    with pytest.raises(TrainingError) as caught:
        MetricsWriter(tmp_path / "gone", 0, tensorboard=False)
    refused(caught, "gone/metrics.jsonl")
