"""Runs that start from another run, with its stack of layers repeated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loro_jax.training.growth import grown
from loro_jax.training.start import start_from
from loro_jax.training.step import make_program
from loro_jax.training.trained import load_state
from tests.training import runs

STEPS = 12
SHORT = {"steps": STEPS, "checkpoint_every": STEPS, "eval_every": STEPS, "model.num_layers": 2}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A run of two layers, and its text."""
    folder = tmp_path_factory.mktemp("growth")
    source = runs.corpus(folder)
    status, output = runs.run(*runs.flags(folder / "small", source, **SHORT))
    assert status == 0, output
    return folder / "small", source


def grow(small, workdir, **changes):
    run, source = small
    fields = {**SHORT, "init_from": run, "model.num_layers": 4, **changes}
    return runs.run(*runs.flags(workdir, source, **fields))


def losses(workdir):
    return [row for row in runs.rows(workdir) if "loss" in row]


def layers_and_others(params):
    blocks = jax.tree.leaves(params["blocks"])
    return blocks, jax.tree.leaves({**params, "blocks": {}})


@pytest.mark.slow
def test_layer_i_is_that_of_the_smaller_stack_and_the_loss_falls(small, tmp_path):
    # Nothing but the weights is taken over: one step at a rate of nearly zero leaves them as they
    # are, so that they can be compared.
    still = {"learning_rate": 1e-30, "steps": 1, "checkpoint_every": 1, "warmup_steps": 0}
    status, output = grow(small, tmp_path / "still", **still)
    assert status == 0, output
    assert f"starting from step {STEPS} of" in output
    assert "its 2 layers 2 times" in output
    _, _, before = load_state(small[0])
    _, _, after = load_state(tmp_path / "still")
    (old, other), (new, same) = layers_and_others(before.params), layers_and_others(after.params)
    for x, y in zip(old, new, strict=True):
        assert y.shape == (4, *x.shape[1:])
        for i in range(4):
            np.testing.assert_array_equal(y[i], x[i % 2])
    for x, y in zip(other, same, strict=True):
        np.testing.assert_array_equal(x, y)

    status, output = grow(small, tmp_path / "grown", steps=40)
    assert status == 0, output
    found = losses(tmp_path / "grown")
    assert found[0]["step"] == 1
    assert np.mean([row["loss"] for row in found[-5:]]) < found[0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "sltrain"])
def test_dense_models_and_those_with_fixed_arrays_grow(method, tmp_path):
    source = runs.corpus(tmp_path)
    # Fields that these methods do not use have their defaults.
    changes = {"method": method, "exact_every": 500, "exact_method": "graph"}
    status, output = runs.run(*runs.flags(tmp_path / "small", source, **{**SHORT, **changes}))
    assert status == 0, output
    status, output = grow((tmp_path / "small", source), tmp_path / "grown", **changes)
    assert status == 0, output
    _, _, before = load_state(tmp_path / "small")
    _, _, after = load_state(tmp_path / "grown")
    for x, y in zip(jax.tree.leaves(before.fixed), jax.tree.leaves(after.fixed), strict=True):
        np.testing.assert_array_equal(y, np.concatenate([x, x]))


@pytest.mark.slow
def test_a_copied_optimizer_continues_at_the_step_of_the_run(small, tmp_path):
    status, output = grow(small, tmp_path / "grown", init_optimizer="copied", steps=STEPS + 4)
    assert status == 0, output
    assert "with its optimizer's state" in output
    assert [row["step"] for row in losses(tmp_path / "grown")] == [13, 14, 15, 16]
    config, step, state = load_state(tmp_path / "grown")
    assert step == int(state.step) == STEPS + 4
    # What it started from: moments are repeated as the weights are, counters are the run's.
    started, _ = start_from(config, make_program(config).init())
    _, _, before = load_state(small[0])
    assert int(started.step) == STEPS
    of_layers = 0
    for x, y in zip(
        jax.tree.leaves(before.opt_state), jax.tree.leaves(started.opt_state), strict=True
    ):
        if x.shape == y.shape:
            np.testing.assert_array_equal(y, x)
        else:
            of_layers += 1
            np.testing.assert_array_equal(y, np.concatenate([x, x]))
    assert of_layers > 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.num_layers": 3}, r"num_layers = 3 is no multiple of the 2 layers"),
        ({"init_optimizer": "copied"}, r"steps = 12 is not above step 12 of config.init_from"),
        (
            {"method": "full", "exact_every": 500, "exact_method": "graph"},
            r"a run of method 'loro', does not fit this run, of method 'full': expected arrays as",
        ),
        ({"model.rank": 2}, r"blocks/attention/k/A has shape .* expected"),
    ],
)
def test_what_does_not_fit_is_refused(small, tmp_path, changes, message):
    status, output = grow(small, tmp_path / "grown", **changes)
    assert status == 1
    (line,) = [line for line in output.splitlines() if line.startswith("error:")]
    with pytest.raises(ValueError, match=message):
        raise ValueError(line)


def test_a_copied_optimizer_needs_a_run(tmp_path):
    changes = {**SHORT, "init_optimizer": "copied"}
    status, output = runs.run(*runs.flags(tmp_path / "run", runs.corpus(tmp_path), **changes))
    assert status == 1
    assert "config.init_optimizer = 'copied' needs a run directory in config.init_from" in output
    assert not (tmp_path / "run").exists()


def test_arrays_of_another_structure_are_refused():
    with pytest.raises(ValueError, match="expected arrays as in"):
        grown({"a": jnp.ones(2)}, {"b": jnp.ones(4)}, 2)
    with pytest.raises(ValueError, match=r"a has shape \(2, 3\), expected \(4, 6\)"):
        grown({"a": jnp.ones((2, 3))}, {"a": jnp.ones((4, 6))}, 2)
