"""LAPACK's threads while a run goes on."""

import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from loro_jax.errors import TrainingError
from loro_jax.training import loop
from loro_jax.training.config import Config


def blas_threads():
    return {one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"}


def test_a_run_has_one_and_leaves_what_it_found(monkeypatch, tmp_path):
    seen = []

    def stop_here(config):
        seen.append(blas_threads())
        raise TrainingError("seen")

    monkeypatch.setattr(loop, "_read_inputs", stop_here)
    with threadpool_limits(limits=2, user_api="blas"):
        with pytest.raises(TrainingError, match="seen"):
            loop.train(Config(), str(tmp_path / "run"))
        assert blas_threads() == {2}
    assert seen == [{1}]
