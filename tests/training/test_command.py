"""The command as a user meets it: bad input, one line, nothing touched."""

import dataclasses
import fcntl
import json
import math
import shutil

import pytest
from absl import flags

from loro_jax.errors import TrainingError
from loro_jax.training.config import Config, DataConfig, MeshConfig
from loro_jax.training.config_differences import field_names
from loro_jax.training.loop import train
from models import LlamaConfig
from tests.training import runs

DRAWS_PLOTS = True
AS_FINISHED = {"tensorboard": True, "published_ppl": True, "checkpoint_every": 55}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    source = runs.corpus(folder)
    workdir = folder / "run"
    arguments = runs.flags(workdir, source, **AS_FINISHED)
    status, output = runs.run(*arguments)
    assert status == 0, output
    return source, workdir, output


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_leaves_what_it_promises(finished):
    source, workdir, output = finished
    assert {p.name for p in workdir.iterdir()} == {
        "metrics.jsonl",
        "config.json",
        "data.json",
        "checkpoints",
        "plot.png",
        "tensorboard",
    }
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    training = [row for row in rows if "loss" in row]
    evaluation = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in training] == list(range(1, 121))
    assert [row["step"] for row in evaluation] == [25, 50, 75, 100, 120]
    assert {"step", "loss", "lr", "tokens", "tokens_per_second"} <= set(training[0])
    assert training[-1]["tokens"] == 120 * 8 * 64
    assert {"step", "val_loss", "val_ppl"} <= set(evaluation[0])
    assert evaluation[-1]["val_loss"] < evaluation[0]["val_loss"]
    for row in evaluation:
        # Batches are of almost as many tokens each.
        n = row["val_batches"]
        expected = row["val_loss"] * n / (n + 1)
        assert math.log(row["published_ppl"]) == pytest.approx(expected, rel=0.02)
    assert f"(published {evaluation[-1]['published_ppl']:.2f}, n = {n})" in output
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["110", "120"]
    assert (workdir / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert list((workdir / "tensorboard").glob("events.*"))
    config = json.loads((workdir / "config.json").read_text())
    assert config["model"]["rank"] == 8
    assert config["b1"] == 0.9, "resolved: defaults written out"
    for expected in ("tokens/s", "left", "unigram model", "bigram model", "dense twin", "next:"):
        assert expected in output
    # The comparisons that it proposes are of the same run in all else.
    line = next(line for line in output.splitlines() if "--config.method=full" in line)
    assert f"--config.data.source={source}" in line
    assert "--config.sequence_length=64" in line
    assert line.count("--workdir") == 1
    assert all(0 <= row["data_wait"] < 1 for row in training)


def test_help_prints_every_field():
    status, output = runs.run("--help")
    assert status == 0
    printed = {line.split("=")[0].strip() for line in output.splitlines() if "--config." in line}
    assert {f"--config.{name}" for name in field_names()} <= printed
    assert "--workdir" in output


BAD_FLAGS = {
    "an unknown field": (["--config.stepz=3"], "no field 'stepz'; did you mean config.steps?"),
    "an unknown nested field": (["--config.model.rnk=3"], "no field 'rnk'"),
    "an ill-typed field": (["--config.steps=many"], "--config.steps=many"),
    "an unknown flag": (["--stepz=3"], "stepz"),
    "a stray argument": (["llama_60m"], "unexpected argument 'llama_60m'"),
    "a missing config file": (["--config=configs/none.py"], "no such file"),
    "a missing file with settings": (["--config=configs/none.py:paper"], "no such file"),
    "unknown settings": (
        [f"--config={runs.ROOT}/configs/default.py:papers"],
        "no settings 'papers'; expected one of recommended, scaffold, mergeable, paper",
    ),
    "a rank too large": (["--config.model.rank=129"], "but is 129"),
    "a field by its old name": (
        ["--config.refresh=none"],
        "config.refresh is now config.moments (all is now reset, factors is now reset_factors, "
        "none is now keep)",
    ),
    "a field that the method does not use": (
        ["--config.method=lowrank", "--config.basis=nearest"],
        "config.basis = 'nearest': config.method = \"lowrank\" does not use it",
    ),
    "an option that no method has": (
        ["--config.method_options.momentun=1"],
        "config.method_options has no field 'momentun'; did you mean momentum?",
    ),
    "an option of another method": (
        [
            "--config.method=galore",
            "--config.exact_every=9",
            "--config.method_options.momentum=0.5",
        ],
        'method_options.momentum: config.method = "galore" has no such option; it has scale, '
        "basis, moments.",
    ),
    "an option for factors of a dense model": (
        [
            "--config.method=full",
            "--config.direction=orthogonal",
            "--config.method_options.damping=0.5",
        ],
        "method_options.damping: only factors use it",
    ),
    "a missing corpus": (["--config.data.source=none/*.txt"], "matches no file"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_input_is_one_line_and_leaves_no_trace(case, tmp_path):
    arguments, message = BAD_FLAGS[case]
    workdir = tmp_path / "run"
    status, output = runs.run(f"--workdir={workdir}", *arguments)
    assert status == 1
    assert output.startswith("error: ")
    assert output.count("\n") == 1
    assert message in output
    assert not workdir.exists()


def test_the_program_ends_as_its_function_does(tmp_path):
    status, output = runs.finish(runs.start(f"--workdir={tmp_path / 'run'}", "--config.stepz=3"))
    assert (status, output) == runs.run("--config.stepz=3")
    assert not (tmp_path / "run").exists()


def test_the_function_leaves_the_flags_of_a_program_around_it_alone():
    known = set(flags.FLAGS)
    for _ in range(2):
        runs.run("--config.stepz=3")
    assert set(flags.FLAGS) == known


@pytest.mark.parametrize(("steps", "warmup"), [(20, 2), (1, 0)])
def test_the_warm_up_of_a_config_file_yields_to_fewer_steps(steps, warmup, tmp_path):
    fewer = [f"--workdir={tmp_path / 'run'}", f"--config.steps={steps}"]
    missing = "--config.data.source=none/*.txt"
    _, output = runs.run(f"--config={runs.ROOT}/configs/default.py", *fewer, missing)
    note, error = output.splitlines()
    assert note == (
        f"config.warmup_steps = 100 is longer than config.steps = {steps}: taken as a tenth of "
        f"them, {warmup}"
    )
    assert "matches no file" in error
    status, output = runs.run(*fewer, "--config.warmup_steps=50", missing)
    assert status == 1
    assert f"config.warmup_steps must be at most steps = {steps}, but is 50" in output


BAD_VALUES = {
    "a rank below 1": ({"model": LlamaConfig(rank=0)}, "but is 0"),
    "a negative K": ({"exact_every": -1}, "exact_every must be at least 0"),
    "restarts that never come": (
        {"method": "lowrank_restarts", "exact_every": 0},
        "exact_every must be at least 1",
    ),
    "a long sequence": ({"sequence_length": 4096}, "4096"),
    "a small vocabulary": ({"model": LlamaConfig(vocab_size=99)}, "vocab_size = 99"),
    "a missing tokenizer": ({"data": DataConfig(tokenizer="none.model")}, "none.model"),
    "a mesh of other devices": ({"mesh": MeshConfig(fsdp=3)}, "config.mesh"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_values_raise_before_anything_is_written(case, tmp_path):
    changes, message = BAD_VALUES[case]
    with pytest.raises(TrainingError, match=message):
        train(dataclasses.replace(Config(), **changes), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def refuse(workdir, *arguments):
    before = contents(workdir)
    status, output = runs.run(*arguments)
    assert status == 1
    assert output.count("\n") == 1, output
    assert contents(workdir) == before
    return output


def test_a_directory_of_another_config_is_refused(finished):
    source, workdir, _ = finished
    output = refuse(workdir, *runs.flags(workdir, source, learning_rate=0.02, **AS_FINISHED))
    assert "learning_rate: 0.01 there, 0.02 now" in output


def test_a_directory_of_something_else_is_refused(finished, tmp_path):
    source, _, _ = finished
    (tmp_path / "thesis.tex").write_text("important")
    assert "thesis.tex" in refuse(tmp_path, *runs.flags(tmp_path, source))


def test_a_directory_in_use_is_refused(finished, tmp_path):
    source, reference, _ = finished
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    with (workdir / "config.json").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        output = refuse(workdir, *runs.flags(workdir, source, **AS_FINISHED))
    assert "in use by another process" in output


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    source = runs.corpus(tmp_path)
    workdir = tmp_path / "run"
    # The rate climbs so far that the loss overflows some steps behind the first checkpoint.
    arguments = runs.flags(
        workdir,
        source,
        learning_rate=1e30,
        warmup_steps=120,
        initial_lr_ratio=0,
        checkpoint_every=1,
    )
    status, output = runs.run(*arguments)
    assert status == 1
    last = output.strip().split("\n")[-1]
    assert last.startswith("error: step ")
    assert "--config.learning_rate" in last
    stopped_at = int(last.split("step ")[1].split(":")[0])
    assert all(row["step"] < stopped_at for row in runs.rows(workdir))
    saved = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())
    assert saved
    assert saved[-1] == stopped_at - 1
    again, output = runs.run(*arguments)
    assert again == 1
    assert f"from step {saved[-1]}" in output, "the checkpoint is whole"
