"""Equal compute: steps follow from operations per token."""

import pytest

from loro_jax.commands.arms import load_config, parse_arms
from loro_jax.planning.flops import flops_per_token
from loro_jax.study.budgets import with_equal_compute
from loro_jax.study.report import Run, config_of


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
