"""Adapters of runs as directories in PEFT's format: written, started from, and merged on load."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loro_jax.__main__ import main
from loro_jax.commands import generate
from loro_jax.training.trained import load_run, load_state
from models import Llama, preset
from models.huggingface import read_model, write_model
from models.huggingface.adapter_reading import merge_stored_adapter
from tests.helpers import outputs
from tests.training import runs

# Its runs take long. tests/models/test_huggingface_adapters.py reads and writes in the fast tier.
pytestmark = pytest.mark.slow

SHORT = {"steps": 6, "eval_every": 6, "checkpoint_every": 3, "exact_every": 3, "log_every": 1}
LORA = {"adapter.kind": "lora", "adapter.rank": 3, "adapter.targets": "q,down"}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(260, size=(2, 12)))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base in Hugging Face's format with its tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("base")
    source = runs.corpus(folder)
    changes = {"method": "full", "exact_every": 500, "exact_method": "graph", "steps": 6}
    status, output = runs.run(*runs.flags(folder / "run", source, **{**SHORT, **changes}))
    assert status == 0, output
    assert main(["export", str(folder / "run"), str(folder / "hf")]) == 0
    return folder / "hf", source


def tune(base, workdir, **changes):
    directory, source = base
    fields = {**SHORT, "init_from": directory, **changes}
    return runs.run(*runs.flags(workdir, source, **fields))


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """A run with adapters by LORO that start with factors other than zero."""
    path = tmp_path_factory.mktemp("tuned") / "run"
    status, output = tune(base, path, **LORA, **{"adapter.initialiser": "xavier"})
    assert status == 0, output
    assert f"python -m loro_jax export {path} {path}_adapters --adapter" in output
    return path


@pytest.fixture(scope="module")
def adapter(base, tuned, tmp_path_factory):
    out = tmp_path_factory.mktemp("adapter") / "out"
    assert main(["export", str(tuned), str(out), "--adapter"]) == 0
    return out


def test_a_run_is_its_base_and_its_adapter(base, tuned, adapter):
    expected = outputs(load_run(tuned).model, TOKENS)
    model, _ = read_model(base[0])
    assert np.abs(outputs(model, TOKENS) - expected).max() > 0.01
    merge_stored_adapter(model, adapter)
    np.testing.assert_allclose(outputs(model, TOKENS), expected, atol=1e-4)
    content = json.loads((adapter / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == str(base[0])
    # The factors of the start are a part of it: they were subtracted from the base.
    assert (content["r"], content["target_modules"]) == (6, ["q_proj", "down_proj"])


def test_a_run_starts_from_an_adapter(base, tuned, adapter, tmp_path):
    changes = {"adapter.init_from": adapter, "method": "lowrank", "learning_rate": 1e-9}
    changes |= {"exact_every": 500, "exact_method": "graph"}
    status, output = tune(base, tmp_path / "run", **changes)
    assert status == 0, output
    assert f"with the adapters of {adapter}" in output
    assert "note:" not in output
    expected = outputs(load_run(tuned).model, TOKENS)
    np.testing.assert_allclose(
        outputs(load_run(tmp_path / "run").model, TOKENS), expected, atol=1e-4
    )
    config, _, state = load_state(tmp_path / "run")
    assert (config.adapter.kind, config.adapter.rank, config.adapter.alpha) == ("lora", 6, 6.0)
    assert state.params["blocks"]["attention"]["q"]["adapter"]["B"].shape[-1] == 6
    # The same command resumes it; from its last checkpoint.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    status, output = tune(base, tmp_path / "run", **changes)
    assert status == 0, output
    assert "from step 3" in output
    assert "with the adapters" not in output
    # Written again, it is the same adapter.
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "again"), "--adapter"]) == 0
    model, _ = read_model(base[0])
    merge_stored_adapter(model, tmp_path / "again")
    np.testing.assert_allclose(outputs(model, TOKENS), expected, atol=1e-4)


def test_a_run_that_continues_adapters_is_written_for_their_first_base(base, tuned, tmp_path):
    changes = {**LORA, "adapter.initialiser": "xavier", "init_from": tuned, "seed": 3}
    status, output = tune(base, tmp_path / "run", **changes)
    assert status == 0, output
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--adapter"]) == 0
    expected = outputs(load_run(tmp_path / "run").model, TOKENS)
    model, _ = read_model(base[0])
    merge_stored_adapter(model, tmp_path / "out")
    np.testing.assert_allclose(outputs(model, TOKENS), expected, atol=1e-4)


def test_commands_add_an_adapter_to_its_base(base, tuned, adapter, capsys):
    arguments = ["--prompt=Paragraph 7: the", "--temperature=0", "--max_new_tokens=12"]
    assert generate.main([str(tuned), *arguments]) == 0
    expected = capsys.readouterr().out
    command = ["generate", str(base[0]), *arguments, f"--adapter={adapter}"]
    assert main(command) == 0
    assert capsys.readouterr() == (expected, "")
    sizes = ["--window=32", "--max_tokens=400", "--json"]
    assert main(["evaluate", str(tuned), str(base[1]), "--split=all", *sizes]) == 0
    run = json.loads(capsys.readouterr().out)
    command = ["evaluate", str(base[0]), str(base[1]), *sizes, f"--adapter={adapter}"]
    assert main(command) == 0
    np.testing.assert_allclose(json.loads(capsys.readouterr().out)["loss"], run["loss"], rtol=1e-4)


def test_another_base_is_noted_or_refused(base, adapter, tmp_path, capsys):
    model, _ = read_model(base[0])
    write_model(model, tmp_path / "copy")
    for file in base[0].glob("tokenizer*"):
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    arguments = ["--prompt=the", "--max_new_tokens=2", f"--adapter={adapter}"]
    assert main(["generate", str(tmp_path / "copy"), *arguments]) == 0
    assert "note: " in (noted := capsys.readouterr().err)
    assert noted.count("\n") == 1
    write_model(Llama(preset("tiny", scope="none", num_layers=3), nnx.Rngs(0)), tmp_path / "deep")
    for file in base[0].glob("tokenizer*"):
        (tmp_path / "deep" / file.name).write_bytes(file.read_bytes())
    assert main(["generate", str(tmp_path / "deep"), *arguments]) == 1
    error = capsys.readouterr().err
    assert "layers.2" in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    status, output = tune(
        (tmp_path / "deep", base[1]), tmp_path / "run", **{"adapter.init_from": adapter}
    )
    assert status == 1
    assert "error: config.adapter.init_from: " in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.adapter.rank=4"], r"adapter.rank follows from config.adapter.init_from"),
        (
            ["--config.method=full", "--config.exact_every=500", "--config.exact_method=graph"],
            r"method 'full' does not train such adapters",
        ),
    ],
)
def test_fields_that_do_not_fit_an_adapter_are_refused(base, adapter, tmp_path, flags, message):
    directory, source = base
    given = runs.flags(
        tmp_path / "run", source, init_from=directory, **{"adapter.init_from": adapter}
    )
    status, output = runs.run(*given, *flags)
    assert status == 1
    assert message in output
    assert not (tmp_path / "run").exists()


def test_an_adapter_needs_its_base(tmp_path):
    status, output = runs.run("--config.adapter.init_from=none", f"--workdir={tmp_path / 'run'}")
    assert status == 1
    assert "init_from = 'none' needs its base in config.init_from, which is None" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--base=x"], "--base names the base of adapters; expected --adapter"),
        (["--adapter", "--keep_factors"], "--keep_factors is for whole models"),
        (["--adapter", "--step=2"], "holds no checkpoint of step 2"),
    ],
)
def test_options_of_export_are_one_line(tuned, tmp_path, capsys, flags, message):
    assert main(["export", str(tuned), str(tmp_path / "out"), *flags]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
