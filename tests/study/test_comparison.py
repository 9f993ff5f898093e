"""Methods side by side: one table, resumable, divergence a row of it."""

import json
import pathlib
import re

import pytest

from loro_jax.commands.arms import load_config
from loro_jax.commands.compare import main
from loro_jax.errors import TrainingError
from loro_jax.study import comparison
from loro_jax.study.validation_plot import lines_of, read_table
from loro_jax.study.validation_plot import main as plot
from loro_jax.training.config import Config
from tests.training import runs


@pytest.fixture(scope="module")
def compared(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    arguments = [config, "--methods=lowrank,full", "--seeds=0,1", "--lrs=0.003,0.01"]
    # Far too large a rate: no finite loss.
    arguments += ["--lrs", "full=0.01,1e30", f"--out={out}"]
    assert main(arguments) == 0
    return arguments, out


def test_the_table_has_a_row_a_method(compared):
    _, out = compared
    content = json.loads((out / "table.json").read_text())
    assert content["command"].startswith("python -m loro_jax compare ")
    assert content["config"]["steps"] == 12
    rows = {row["arm"]: row for row in content["rows"]}
    assert set(rows) == {"lowrank", "full"}
    for row in rows.values():
        assert row["seeds"] == 2
        assert row["spread"] > 0
        assert 1 < row["perplexity"] < 400
        assert row["tokens/s"] > 0
        assert row["MFLOPs/token"] > 0
    assert rows["full"]["diverged"] == "lr 1e+30 seed 0"
    assert rows["lowrank"]["trainable M"] < rows["full"]["trainable M"]
    by_run = {(r["arm"], r["learning_rate"], r["seed"]): r for r in content["runs"]}
    assert len(by_run) == 6
    grid = {rate: by_run["lowrank", rate, 0]["perplexity"] for rate in (0.003, 0.01)}
    assert rows["lowrank"]["best lr"] == min(grid, key=grid.get)
    table = (out / "table.md").read_text().splitlines()
    assert re.match(r"\| arm +\|", table[0])
    assert len(table) == 4
    for name in ("curves.png", "perplexity.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    for (arm, rate, seed), run in by_run.items():
        metrics = runs.rows(out / arm / f"lr{rate:g}" / f"seed{seed}")
        evaluations = [[row["tokens"], row["val_ppl"]] for row in metrics if "val_ppl" in row]
        assert run["validation"] == evaluations
        assert bool(evaluations) == (run["perplexity"] is not None)


def test_evaluations_are_drawn_for_the_best_rate(compared, tmp_path, capsys):
    _, out = compared
    content = read_table(out / "table.json")
    labels = {"full": "dense", "lowrank": "lowrank"}
    dense, low_rank = lines_of(content["rows"], content["runs"], labels)
    rows = {row["arm"]: row for row in content["rows"]}
    best = rows["lowrank"]["best lr"]
    own = next(
        run for run in content["runs"] if (run["arm"], run["learning_rate"]) == ("lowrank", best)
    )
    assert [[t, p] for t, p in zip(low_rank.tokens, low_rank.perplexities, strict=True)] == [
        list(point) for point in own["validation"]
    ]
    assert low_rank.flops == rows["lowrank"]["MFLOPs/token"] * 1e6 < dense.flops
    assert dense.name.startswith("dense: ")
    table, png = str(out / "table.json"), tmp_path / "plot.png"
    assert plot([table, "--arms=full=dense,lowrank", f"--out={png}"]) == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    for arguments, expected in (
        ([table, "--arms=fool", f"--out={png}"], "'fool' is not in"),
        ([str(out / "table.md"), f"--out={png}"], "can't be read as the table.json"),
        ([table, f"--out={tmp_path / 'none' / 'plot.png'}"], "No such file"),
    ):
        assert plot(arguments) == 1
        error = capsys.readouterr().err
        assert expected in error
        assert error.count("\n") == 1


def test_the_same_seed_sees_the_same_text(compared):
    _, out = compared
    tokens = {
        method: [row["tokens"] for row in runs.rows(out / method / "lr0.01" / "seed0")]
        for method in ("lowrank", "full")
    }
    assert tokens["lowrank"] == tokens["full"]


def test_again_it_trains_nothing(compared, monkeypatch, capsys):
    arguments, out = compared
    before = (out / "table.json").read_text()
    monkeypatch.setattr(comparison, "train", None)
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("metrics.jsonl")}
    assert main(arguments) == 0
    assert {p: p.stat().st_mtime_ns for p in out.rglob("metrics.jsonl")} == stamps
    assert (out / "table.json").read_text() == before
    assert "| lowrank" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods=lorro"], "'lorro'; expected loro, lowrank"),
        (["--seeds=a"], "--seeds=a: expected whole numbers"),
        (["--lrs=0.1,x"], "expected numbers"),
        (["--lrs=-1"], "must be above 0"),
        (["--lrs=cola=0.1"], "'cola' is not among --methods and --arm"),
        (["--set=stepz=3"], "--set stepz=3: expected FIELD=VALUE"),
        (["--arm=slow=lowrank,lr=3"], "--arm slow=lowrank,lr=3: expected NAME=METHOD,FIELD=VALUE"),
        (["--arm=slow=lowrank,lr_scale"], "expected NAME=METHOD,FIELD=VALUE"),
        (["--arm=a/b=lowrank"], "expected NAME=METHOD,FIELD=VALUE"),
        (["--arm=slow=lorank"], "'lorank'; expected loro, lowrank"),
        (["--arm=full=lowrank"], "'full' occurs more than once"),
        (["--set=steps=0"], "config.steps must be at least 1"),
    ],
)
def test_bad_input_is_one_line(config, tmp_path, capsys, arguments, message):
    assert main([config, f"--out={tmp_path / 'out'}", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert (error.count("\n"), error[:7]) == (1, "error: ")
    assert not (tmp_path / "out").exists()


def test_a_file_without_a_config_is_named(tmp_path):
    with pytest.raises(TrainingError, match=r"CONFIG = .*none\.py"):
        load_config(str(tmp_path / "none.py"), [])
    path = tmp_path / "a.py"
    path.write_text("def get_config():\n    return 1\n")
    with pytest.raises(TrainingError, match="must return a training Config"):
        load_config(str(path), [])


def test_fields_are_set_by_their_dotted_names(config):
    changed = load_config(config, ["steps=30", "model.rank=2", "data.shape=padded"])
    assert isinstance(changed, Config)
    assert (changed.steps, changed.model.rank, changed.data.shape) == (30, 2, "padded")
    assert pathlib.Path(config).exists()
