"""Ensembles: each member ends where a run of its own does."""

import dataclasses
import json

import pytest

from loro_jax.commands.arms import load_config
from loro_jax.commands.sweep import main
from loro_jax.errors import TrainingError
from loro_jax.study.sweep import Member, sweep
from loro_jax.training.config import DistillationConfig
from loro_jax.training.loop import train
from tests.training import runs


@pytest.fixture(scope="module")
def base(config):
    """Exact steps among the twelve, and a rate of the projections' own."""
    changes = ["lr_scale=0.5", "basis=nearest", "restart_warmup_steps=0", "model.initialiser=auto"]
    return load_config(config, changes)


@pytest.mark.slow
def test_members_end_where_runs_of_their_own_do(base, tmp_path):
    # The last one diverges, which must not end the others.
    members = [Member(0.01, 0.5, 0), Member(0.003, 2, 0), Member(0.003, 2, 1), Member(1e30, 1, 0)]
    swept = sweep(base, members)
    assert [found.step for found in swept.evaluations] == [6, 12]
    assert swept.tokens == 12 * 4 * 32
    assert swept.perplexities()[3] is None
    # Rates and seeds all make a difference.
    losses = swept.evaluations[-1].losses
    assert min(abs(losses[0] - losses[1]), abs(losses[1] - losses[2])) > 1e-3
    rates = dataclasses.replace(base, learning_rate=0.003, lr_scale=2.0, seed=1)
    alone = train(rates, str(tmp_path / "run")).val_ppl
    assert swept.perplexities()[2] == pytest.approx(alone, rel=1e-4)
    # The run records every second of the six training losses of which this is the mean.
    rows = [row for row in runs.rows(tmp_path / "run") if row["step"] <= 6 and "loss" in row]
    mean = sum(row["loss"] for row in rows) / len(rows)
    assert swept.evaluations[0].train_losses[2] == pytest.approx(mean, rel=0.02)


def test_members_share_whether_they_have_a_scale(base):
    with pytest.raises(TrainingError, match="all have an lr_scale, or none"):
        sweep(base, [Member(0.01, None, 0), Member(0.01, 0.5, 0)])


def test_an_ensemble_has_no_teacher(base):
    taught = dataclasses.replace(base, distillation=DistillationConfig("dir", features=1.0))
    with pytest.raises(TrainingError, match="teacher = 'dir': an ensemble has no teacher"):
        sweep(taught, [Member(0.01, None, 0)])


@pytest.mark.slow
def test_the_command_writes_an_arm_once(config, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [config, "--arm=ours=loro,exact_every=0,steps=6", f"--out={out}"]
    arguments += ["--lrs=0.02", "--etas=0.01,0.02", "--seeds=0,1"]
    assert main(arguments) == 0
    content = json.loads((out / "ours.json").read_text())
    assert content["command"].startswith("python -m loro_jax sweep ")
    assert content["arm"]["changes"] == {"exact_every": 0, "steps": 6}
    assert [row["lr_scale"] for row in content["rows"]] == [0.5, 1.0]
    for row in content["rows"]:
        assert len(row["seeds"].split(", ")) == 2
        assert 1 < row["perplexity"] < 400
    assert len(content["evaluations"][-1]["losses"]) == len(content["members"]) == 4
    capsys.readouterr()
    assert main(arguments) == 0
    assert "ours.json exists" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr_scales=0"], "--lr_scales=0: expected numbers above 0."),
        (["--lrs=a"], "--lrs=a: expected numbers"),
        (["--etas=0.01", "--lr_scales=1"], "--lr_scales, --etas: expected one of them"),
        (["--seeds=a"], "--seeds=a: expected whole numbers."),
        (["--arm=b=loro,exact_evry=1"], "--arm b=loro,exact_evry=1: expected NAME=METHOD"),
    ],
)
def test_wrong_arguments_are_named(config, tmp_path, capsys, arguments, message):
    assert main([config, "--arm=a=loro", *arguments, f"--out={tmp_path / 'out'}"]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_there_is_an_arm(config, tmp_path, capsys):
    assert main([config, f"--out={tmp_path / 'out'}"]) == 1
    assert "expected at least one arm" in capsys.readouterr().err
