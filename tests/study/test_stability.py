"""The reading of runs: spikes after exact steps, condition numbers of what they made."""

import json

import numpy as np
import pytest

from loro_jax.bench import __main__ as bench
from loro_jax.text.config import DataConfig
from loro_jax.training.config import Config
from loro_jax.training.loop import train
from loro_jax.training.trained import load_run
from models import preset
from tests.training import runs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    config = Config(
        steps=40,
        batch_size=4,
        sequence_length=32,
        warmup_steps=2,
        exact_every=16,
        exact_method="svd",
        log_every=1,
        eval_every=40,
        checkpoint_every=40,
        tensorboard=False,
        model=preset("tiny", rank=4),
        data=DataConfig(source=str(runs.corpus(folder)), tokenizer="bytes", max_eval_sequences=4),
    )
    train(config, str(folder / "arm" / "seed0"))
    return folder


def test_what_a_run_directory_says(folder, tmp_path):
    bench.main(["stability", str(folder), f"--json={tmp_path / 'out.json'}"])
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert (row["run"], row["exact steps"]) == ("arm/seed0", 2)
    losses = {r["step"]: r["loss"] for r in runs.rows(folder / "arm" / "seed0") if "loss" in r}
    spikes = [
        max(losses[i] for i in range(step + 1, step + 6))
        - np.mean([losses[i] for i in range(step - 10, step)])
        for step in (16, 32)
    ]
    np.testing.assert_allclose(row["largest spike"], max(spikes))
    np.testing.assert_allclose(row["median spike"], np.median(spikes))
    model = load_run(folder / "arm" / "seed0").model
    blocks = model.blocks
    projections = [getattr(blocks.attention, name) for name in "qkvo"]
    projections += [blocks.mlp.gate, blocks.mlp.up, blocks.mlp.down]
    products = [np.asarray(p.B[...], np.float64) @ np.asarray(p.A[...]) for p in projections]
    values = [np.linalg.svd(product, compute_uv=False) for product in products]
    conditions = np.ravel([v[:, 0] / v[:, 3] for v in values])
    np.testing.assert_allclose(row["largest condition of W"], conditions.max(), rtol=1e-3)
    np.testing.assert_allclose(row["median condition of W"], np.median(conditions), rtol=1e-3)


def test_directories_without_runs_are_named(tmp_path, capsys):
    assert bench.main(["stability", str(tmp_path)]) == 1
    assert "expected run directories below it, but found none" in capsys.readouterr().err
