"""Small tables of products and factors, written while a run trains."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from loro_jax.errors import TrainingError
from loro_jax.inspection import small_tables
from loro_jax.training.config import AdapterConfig, Config
from loro_jax.training.inspecting import Inspection
from loro_jax.training.step import TrainState
from loro_jax.training.trained import load_state
from models import preset
from tests.training import runs

CONFIG = Config(inspect_every=4)


def state_at(step):
    rng = np.random.default_rng(step)
    q = {"B": rng.normal(size=(2, 6, 3)), "A": rng.normal(size=(2, 3, 5))}
    return TrainState(jnp.zeros([]), {"blocks": {"q": q}}, None, {})


def read(folder):
    return [json.loads(line) for line in (folder / "inspect.jsonl").read_text().splitlines()]


def written(folder, start, steps, is_new):
    one = Inspection(CONFIG, folder, start, state_at(start), 10 * start, is_new)
    for step in steps:
        if one.is_due(step):
            one.write(step, state_at(step), 10 * step)
    one.close()


def test_rows_after_the_restored_checkpoint_are_dropped(tmp_path):
    written(tmp_path, 0, range(1, 14), True)
    whole = read(tmp_path)
    assert [row["step"] for row in whole] == [0, 4, 8, 12]
    assert whole[1] == {
        "step": 4,
        "tokens": 40,
        "matrices": small_tables(state_at(4).params),
    }
    written(tmp_path, 6, range(7, 14), False)
    assert read(tmp_path) == whole
    # Killed before its first checkpoint, a run starts again.
    written(tmp_path, 0, range(1, 6), True)
    assert read(tmp_path) == whole[:2]


def test_without_the_option_nothing_is_written(tmp_path):
    one = Inspection(Config(), tmp_path, 0, state_at(0), 0, True)
    assert not any(map(one.is_due, range(1, 50)))
    one.sync()
    one.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["full", "galore", "sst"])
def test_a_method_without_products_is_named(method):
    config = Config(method=method, model=preset("tiny"), inspect_every=5)
    with pytest.raises(TrainingError, match=rf"^config.inspect_every = 5: method '{method}' has"):
        config.validate()


def test_of_adapters_those_with_products_are_inspected():
    def config(kind, method):
        adapter = AdapterConfig(kind=kind)
        return Config(method=method, model=preset("tiny"), inspect_every=5, adapter=adapter)

    config("lora", "lowrank").validate()
    with pytest.raises(TrainingError, match="adapters of kind 'bone' have no product B A"):
        config("bone", "full").validate()


@pytest.mark.slow
def test_the_trajectory_is_the_same_and_resumes(tmp_path):
    changes = {"steps": 24, "keep_checkpoints": 9}
    source = runs.corpus(tmp_path)
    status, output = runs.run(*runs.flags(tmp_path / "plain", source, **changes))
    assert status == 0, output
    inspected = runs.flags(tmp_path / "run", source, inspect_every=4, **changes)
    status, output = runs.run(*inspected)
    assert status == 0, output
    assert runs.rows(tmp_path / "run") == runs.rows(tmp_path / "plain")
    assert not (tmp_path / "plain" / "inspect.jsonl").exists()
    whole = read(tmp_path / "run")
    assert [row["step"] for row in whole] == list(range(0, 25, 4))
    assert whole[-1]["matrices"] == small_tables(load_state(tmp_path / "run")[2].params)
    for step in (22, 24):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    status, output = runs.run(*inspected)
    assert status == 0, output
    assert "continuing" in output
    assert read(tmp_path / "run") == whole
    assert runs.rows(tmp_path / "run") == runs.rows(tmp_path / "plain")
