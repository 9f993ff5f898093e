"""Methods on tasks of GLUE: one command trains all runs, chooses rates and shows Table 6."""

import json

import pytest

from loro_jax.__main__ import main
from loro_jax.study import comparison
from tests.training import glue_runs, runs
from tests.training.glue_runs import TINY, write_glue, write_model

CONFIG = f"{runs.ROOT}/configs/roberta_glue.py"


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glue")
    fields = TINY | {
        "init_from": write_model(folder),
        "data.source": write_glue(folder / "tables"),
        "steps": 30,
        "eval_every": 15,
        "exact_every": 10,
    }
    return [f"--set={name}={json.dumps(value, default=str)}" for name, value in fields.items()]


@pytest.mark.slow
def test_one_command_trains_all_runs_and_shows_the_table(given, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    command = ["compare", CONFIG, *given, "--methods=full,loro_4", "--tasks=mrpc", "--seeds=0,1"]
    command += ["--lrs=0.01", "--lrs=full=0.0001,0.003,1e30", f"--out={out}"]
    assert main(command) == 0
    output = capsys.readouterr().out
    assert "full/mrpc/lr1e+30/seed0: diverged (step " in output
    best = {
        path.relative_to(out).as_posix(): max(
            row["val_f1"] for row in glue_runs.rows(path) if "val_f1" in row
        )
        for path in sorted(path.parent for path in out.rglob("metrics.jsonl"))
        if "1e+30" not in path.as_posix()
    }
    # Of the rates of `full` the better one is run with the other seed.
    rates = {rate: best[f"full/mrpc/lr{rate}/seed0"] for rate in ("0.0001", "0.003")}
    chosen = max(rates, key=rates.get)
    means = {
        "full": (best[f"full/mrpc/lr{chosen}/seed0"] + best[f"full/mrpc/lr{chosen}/seed1"]) / 2,
        "loro": (best["loro_4/mrpc/lr0.01/seed0"] + best["loro_4/mrpc/lr0.01/seed1"]) / 2,
    }
    assert len(best) == 5
    rows = json.loads((out / "table.json").read_text())["rows"]
    assert {row["method"].split(",")[0]: row["MRPC"] for row in rows} == {
        name: f"{100 * mean:.2f}" for name, mean in means.items()
    }
    # Again: nothing is trained, not even what diverged.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*/checkpoints/*")}
    trained = []
    monkeypatch.setattr(
        comparison,
        "train",
        lambda config, *rest, original=comparison.train: (
            trained.append(config.learning_rate) or original(config, *rest)
        ),
    )
    assert main(command) == 0
    assert 1e30 not in trained
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*/checkpoints/*")} == before
    assert f"| {rows[0]['MRPC']} |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods=lowrank"], "there is no method 'lowrank'; expected one of loro, lora,"),
        (["--methods=full", "--tasks=mrpc,wnli"], "--tasks: 'wnli'; expected cola, sst2,"),
        (["--methods=full", "--arm=a=full"], "--arm, --equal: expected neither"),
        (["--methods=full", "--equal=flops"], "--arm, --equal: expected neither"),
        (["--methods=full", "--lrs=lora=0.1"], "--lrs lora=0.1: 'lora' is not among"),
        (["--methods=full", "--set=steps=-1"], "config.steps must be"),
        (["--methods=full", "--seeds=a"], "--seeds=a: expected whole numbers"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, options, message):
    assert main(["compare", CONFIG, f"--out={tmp_path / 'out'}", *options]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_settings_and_tasks_are_where_they_belong(tmp_path, capsys):
    out = f"--out={tmp_path / 'out'}"
    assert main(["compare", f"{CONFIG}:loro_4", "--methods=full", out]) == 1
    assert "expected its settings in --methods" in capsys.readouterr().err
    language = f"{runs.ROOT}/configs/default.py:paper"
    assert main(["compare", language, "--methods=full", "--tasks=mrpc", out]) == 1
    assert "--tasks: expected a config on GLUE" in capsys.readouterr().err
