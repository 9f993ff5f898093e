"""Budgets: steps follow from operations or measured times, ranks from memory."""

from typing import NamedTuple

import pytest

from loro_jax.commands.arms import load_config, parse_arms
from loro_jax.errors import TrainingError
from loro_jax.planning.flops import flops_per_token
from loro_jax.planning.memory_table import held_by
from loro_jax.study import budgets
from loro_jax.study.budgets import with_budget, with_equal_compute
from loro_jax.study.report import Run, config_of


class Step(NamedTuple):
    """Stands for a compiled step that nobody takes."""

    step: object


def test_all_arms_have_the_operations_of_the_first():
    changes = ["steps=1000", "warmup_steps=100", "eval_every=250", "data.tokenizer=bytes"]
    base = load_config("configs/default.py:paper", changes)
    arms = parse_arms("full,lowrank", ["narrow=loro,model.rank=8,steps=7"], base)
    configs = [config_of(base, Run(arm, 0.01, 0)) for arm in with_equal_compute(base, arms)]
    assert 1000 == configs[0].steps < configs[1].steps < configs[2].steps

    def operations(config):
        return config.steps * flops_per_token(config)

    for config in configs:
        config.validate()
        assert config.steps == 4 * config.eval_every
        assert config.warmup_steps == pytest.approx(config.steps / 10, abs=1)
        # Steps are rounded to evaluations: up to two of a thousand.
        assert operations(config) == pytest.approx(operations(configs[0]), rel=2e-3)


def test_operations_count_the_tokens_of_an_arms_own_batches():
    base = load_config("configs/default.py:paper", ["steps=100", "data.tokenizer=bytes"])
    arms = parse_arms("full", [f"half=full,batch_size={base.batch_size // 2}"], base)
    assert [dict(arm.changes)["steps"] for arm in with_equal_compute(base, arms)] == [100, 200]


def test_times_are_multiples_of_the_first_arms_and_kept(tmp_path, monkeypatch):
    base = load_config("configs/default.py:paper", ["steps=100", "eval_every=25"])
    timed = []

    def pretend(steps, rounds):
        timed.append(list(steps))
        return {name: step() for name, step in steps.items()}

    speeds = {"full": 4.0, "lowrank": 2.0, "loro": 2.5}
    monkeypatch.setattr(
        budgets, "prepare", lambda config: Step(lambda: len(timed) * speeds[config.method])
    )
    monkeypatch.setattr(budgets, "time_in_turns", pretend)

    def steps_of(methods):
        arms = with_budget("seconds", base, parse_arms(methods, [], base), str(tmp_path / "out"))
        return [dict(arm.changes)["steps"] for arm in arms]

    assert steps_of("full,lowrank") == [100, 200]
    assert steps_of("full,lowrank") == [100, 200]
    assert timed == [["full", "lowrank"]]
    # Another arm is measured beside the first one: the machine may have another speed by now.
    assert steps_of("full,lowrank,loro") == [100, 200, 160]
    assert timed[1:] == [["full", "loro"]]
    with pytest.raises(TrainingError, match="multiples of the first arm's, 'lowrank'"):
        steps_of("lowrank,full")
    (tmp_path / "out" / "seconds.json").write_text("[1, 2")
    with pytest.raises(TrainingError, match=r"seconds\.json: expected times of steps"):
        steps_of("full,lowrank")


def test_ranks_fill_the_memory_of_the_first_arm():
    base = load_config("configs/default.py:paper", ["data.tokenizer=bytes"])

    def held(arm):
        found = held_by(config_of(base, Run(arm, 0.01, 0)))
        return found.weights + found.gradients + found.optimizer

    arms = parse_arms("full,lowrank,galore", ["muon=full,direction=orthogonal"], base)
    full, lowrank, galore, muon = with_budget("memory", base, arms, "")
    assert (full, muon) == (arms[0], arms[3])  # neither has a rank
    for arm in (lowrank, galore):
        rank = dict(arm.changes)["model.rank"]
        assert 32 < rank <= 128
        larger = arm._replace(changes=(("model.rank", rank + 1),))
        assert held(arm) <= held(full)
        assert rank == 128 or held(larger) > held(full), arm
    assert dict(lowrank.changes)["model.rank"] < 128


def test_an_arm_that_does_not_fit_is_refused():
    base = load_config("configs/default.py:paper", ["data.tokenizer=bytes"])
    with pytest.raises(TrainingError, match=r"'full' takes .* MB without activations, even with"):
        with_budget("memory", base, parse_arms("lowrank,full", [], base), "")
