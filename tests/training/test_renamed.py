"""Run directories and fields of earlier versions."""

import dataclasses
import json

import pytest

from loro_jax.errors import TrainingError
from loro_jax.training.config import Config
from loro_jax.training.config_differences import differences
from loro_jax.training.renamed import old_name_message, present, upgraded
from loro_jax.training.trained import load_config
from models import LlamaConfig


def stored(**changes):
    """What the version before stored of a run."""
    config = json.loads(Config().to_json())
    for name in ("moments", "method_options"):
        del config[name]
    config |= {"refresh": "all", "momentum": 0.95, "projection_scale": 0.25, "exact_until": 0}
    config["model"]["depth_scaled"] = False
    return config | changes


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({}, {}),
        ({"refresh": "all"}, {"moments": "reset"}),
        ({"refresh": "factors"}, {"moments": "reset_factors"}),
        ({"refresh": "transport"}, {"moments": "transport"}),
        ({"refresh": "none", "basis": "nearest"}, {"basis": "nearest"}),
        ({"refresh": "none", "basis": "nearest"}, {"basis": "nearest", "moments": "keep"}),
        ({"refresh": "all", "basis": "nearest"}, {"basis": "nearest", "moments": "reset"}),
        (
            {"direction": "orthogonal", "momentum": 0.9},
            {"direction": "orthogonal", "method_options": {"momentum": 0.9}},
        ),
        ({"direction": "orthogonal"}, {"direction": "orthogonal"}),
        (
            {"method": "fira", "projection_scale": 0.5},
            {"method": "fira", "method_options": {"scale": 0.5}},
        ),
        # Options that the method never read.
        ({"method": "lowrank", "projection_scale": 0.5, "momentum": 0.1}, {"method": "lowrank"}),
        ({"method": "spectron", "momentum": 0.5}, {"method": "spectron"}),
    ],
)
def test_a_stored_config_is_the_same_run_by_its_present_names(old, new, tmp_path):
    config = Config(**new)
    assert differences(stored(**old), config) == []
    path = tmp_path / "config.json"
    path.write_text(json.dumps(stored(**old)))
    loaded = load_config(path)
    assert differences(json.loads(loaded.to_json()), config) == []


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ({"refresh": "none"}, {}, "moments: 'keep' there, 'reset' now"),
        (
            {"refresh": "all", "basis": "nearest"},
            {"basis": "nearest"},
            "moments: 'reset' there, 'keep' now",
        ),
        (
            {"direction": "orthogonal", "momentum": 0.9},
            {"direction": "orthogonal"},
            "method_options.momentum: 0.9 there, 0.95 now",
        ),
        ({"exact_until": 40}, {}, "config.exact_until = 40: there is no such field any more."),
        ({"direction": "tangent"}, {}, "direction: 'tangent' there, 'adam' now"),
    ],
)
def test_another_run_is_told_apart(old, new, line):
    assert line in differences(stored(**old), Config(**new))


def test_a_run_that_can_no_longer_be_is_one_line(tmp_path):
    path = tmp_path / "config.json"
    deep = stored()
    deep["model"]["depth_scaled"] = True
    for content, message in (
        (deep, "config.model.depth_scaled = True: there is no such field any more"),
        (stored(direction="tangent"), "config.direction must be one of adam, orthogonal"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(TrainingError, match=message):
            load_config(path)


def test_names_on_the_command_line():
    assert old_name_message("refresh").startswith("config.refresh is now config.moments (")
    assert "none is now keep" in old_name_message("refresh")
    assert old_name_message("momentum") == "config.momentum is now config.method_options.momentum"
    assert old_name_message("depth_scaled").startswith("config.model.depth_scaled is gone")
    assert old_name_message("steps") is None
    with pytest.raises(ValueError, match=r"exact_until = 3"):
        present("exact_until", 3)


def test_damaged_configs_do_no_harm():
    for content in ({"model": 3}, {"model": "x", "refresh": ["all"]}):
        upgraded(content)
    assert differences(dataclasses.asdict(Config(model=LlamaConfig())), Config()) == []
