"""Dry runs: what they print, and whether it is what a real step takes."""

import math

import jax
import pytest

from loro_jax.planning.accelerators import ACCELERATORS
from loro_jax.planning.collectives import Collective
from loro_jax.planning.flops import flops_per_token
from loro_jax.planning.plan import make_plan
from loro_jax.training.config import Config
from loro_jax.training.step import make_program
from models.llama import preset
from tests.training import runs

MODEL = preset("tiny")


@pytest.fixture(scope="module")
def plan():
    config = Config(
        model=MODEL,
        batch_size=8,
        sequence_length=32,
        gradient_accumulation=2,
        exact_method="svd",  # the quickest to compile
    )
    return config, make_plan(config, 1)


def test_products_are_those_that_a_step_needs(plan):
    config, found = plan
    assert found.tokens == 8 * 32
    assert found.model_flops == found.tokens * flops_per_token(config)
    # Attention is counted causal there and computed whole; its two products, of scores and of
    # values, are the only ones that the backward pass computes again (remat="dots").
    one_product = MODEL.num_layers * 2 * 32 * MODEL.hidden_size * found.tokens
    halves_of_squares, again = 3 * one_product, 2 * one_product
    executed = sum(one.flops for one in found.kernels)
    assert executed == found.model_flops + halves_of_squares + again


def test_one_device_holds_the_whole_state_and_sends_nothing(plan):
    config, found = plan
    state = jax.eval_shape(make_program(config).init)
    assert found.state_bytes == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert (found.sent, found.sent_more) == (0, 0)


def test_exchanges_within_a_node_take_its_links(plan):
    h100 = ACCELERATORS["h100"]
    near = Collective("all-gather", 8_000_000_000, (tuple(range(8)),), 1)
    far = near._replace(groups=(tuple(range(0, 64, 8)),))
    assert math.isclose(h100.seconds(near), 7e9 / 450e9)
    assert math.isclose(h100.seconds(far), 7e9 / 50e9)


def in_a_process(*arguments):
    """Devices can be simulated before JAX has started, and then no more."""
    return runs.finish(runs.start(*arguments))


def dry_run(tmp_path, *arguments, run=in_a_process):
    flags = runs.flags(tmp_path / "run", tmp_path / "no_corpus.txt", **{"mesh.fsdp": 2})
    done = run("--dry_run", *flags, *arguments)
    assert not (tmp_path / "run").exists()
    return done


def test_a_dry_run_prints_its_plan_and_touches_nothing(tmp_path):
    status, output = dry_run(tmp_path, "--config.mesh.data=2")
    assert status == 0, output
    lines = output.splitlines()
    assert "on 4 device(s) (2 x 2 x 1" in lines[0]
    assert "all-reduce" in output
    assert "more in an exact one" in output
    for name in ACCELERATORS:
        (row,) = [line for line in lines if line.startswith(f"| {name} ")]
        assert "yes" in row


@pytest.mark.slow
def test_a_dry_run_needs_to_know_how_many_devices_there_are(tmp_path):
    status, output = dry_run(tmp_path, run=runs.run)
    assert status == 1
    assert output.startswith("error: config.mesh = -1 x 2 x 1")
    assert "--devices=N" in output
    status, output = dry_run(tmp_path, "--devices=3")
    assert status == 1
    assert output.startswith("error: config.mesh")
    assert "does not make 3 device(s)" in output
