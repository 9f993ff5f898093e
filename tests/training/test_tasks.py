"""Tasks that follow each other: a run for each, started from the last one's directory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loro_jax.layers import merge
from loro_jax.peers.coso import coso
from loro_jax.training.optimizers import CoSOOptions
from loro_jax.training.start import start_from
from loro_jax.training.step import TrainState, make_program, merge_model
from loro_jax.training.task_sequence import coso_next_task
from loro_jax.training.trained import load_state
from models.huggingface import write_model
from tests.training import runs

STEPS = 8
SHORT = {
    "steps": STEPS,
    "checkpoint_every": STEPS,
    "eval_every": STEPS,
    "exact_every": 500,
    "exact_method": "graph",
    "model.num_layers": 2,
    "model.rank": 8,
}


@pytest.fixture(scope="module")
def runs_of(tmp_path_factory):
    """Runs that follow each other, by name; each is started when it is asked for first."""
    folder = tmp_path_factory.mktemp("tasks")
    source, known = runs.corpus(folder), {}

    def run(name, **changes):
        if name not in known:
            known[name] = runs.run(*runs.flags(folder / name, source, **{**SHORT, **changes}))
        status, output = known[name]
        assert status == 0, output
        return folder / name, output

    return run


def network(path):
    config, _, state = load_state(path)
    return config, merge_model(config, state.params, state.fixed)


def dense(model):
    return nnx.to_pure_dict(nnx.state(merge(model)))


def started(config, run):
    """The state in which a run begins."""
    config = dataclasses.replace(config, init_from=str(run))
    return start_from(config, make_program(config).init())


def close(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["osft", "sst"])
def test_projections_in_parts_start_from_dense_runs_and_directories(runs_of, method, tmp_path):
    base, _ = runs_of("dense", method="full")
    changes = {} if method == "osft" else {"exact_every": 4}
    first, output = runs_of(f"{method}-1", method=method, init_from=base, **changes)
    assert f"starting from step {STEPS} of" in output
    assert "next task" not in output
    config, _ = network(first)
    _, model = network(base)
    state, _ = started(config, base)
    close(dense(merge_model(config, state.params, state.fixed)), dense(model))
    write_model(model, tmp_path / "out")
    other, line = started(config, tmp_path / "out")
    assert "truncated" not in line
    close(state.params, other.params)
    close(state.fixed, other.fixed)


@pytest.mark.slow
def test_coso_remembers_a_task_and_moves_beside_it(runs_of):
    options = {"method": "coso", "exact_every": 2, "method_options.threshold": 0.5}
    options |= {"method_options.threshold": 0.9, "method_options.memory": 0.1}
    first, output = runs_of("coso-1", init_from=runs_of("dense", method="full")[0], **options)
    assert "next task" not in output
    second, output = runs_of("coso-2", init_from=first, **options)
    assert "as the next task" in output
    assert output.count("warning: the memory of earlier tasks' directions is full in") == 1
    (_, _, before), (_, _, after) = load_state(first), load_state(second)
    assert not any(x.any() for x in jax.tree.leaves(before.opt_state.memory))
    for group, names in (("attention", "qkvo"), ("mlp", ("gate", "up", "down"))):
        for name in names:
            old, new, M, number = (
                np.asarray(tree["blocks"][group][name]["W"])
                for tree in (
                    before.params,
                    after.params,
                    after.opt_state.memory,
                    after.opt_state.remembered,
                )
            )
            assert (number > 0).all()
            move = new - old
            if M.shape[-2] != move.shape[-2]:  # the smaller side is the inputs'
                move = np.swapaxes(move, -1, -2)
            assert np.linalg.norm(move) > 0.01
            np.testing.assert_allclose(np.swapaxes(M, -1, -2) @ move, 0, atol=1e-5)


@pytest.mark.slow
def test_osft_splits_its_weights_anew_for_the_next_task(runs_of):
    base, _ = runs_of("dense", method="full")
    first, _ = runs_of("osft-1", method="osft", init_from=base)
    second, output = runs_of("osft-2", method="osft", init_from=first)
    assert "as the next task" in output
    assert [row["step"] for row in runs.rows(second) if "loss" in row] == [*range(1, STEPS + 1)]
    config, model = network(first)
    state, _ = started(config, first)
    assert int(state.step) == 0
    close(dense(merge_model(config, state.params, state.fixed)), dense(model))
    assert not any(leaf.any() for leaf in jax.tree.leaves(state.opt_state))
    up, before = state.fixed["blocks"]["mlp"]["up"], model.blocks.mlp.up
    # What is kept are the strongest directions of the present weight, not those of the first task.
    s = jnp.linalg.svd(before.weight(), compute_uv=False)
    np.testing.assert_allclose(up["S_high"], s[:, : up["S_high"].shape[1]], atol=1e-5)
    assert np.abs(up["S_high"] - before.S_high[...]).max() > 1e-4
    # With the optimizer's state copied, the task goes on: nothing is split.
    copied = dataclasses.replace(config, steps=2 * STEPS, init_optimizer="copied")
    state, line = started(copied, first)
    assert "next task" not in line
    np.testing.assert_array_equal(state.fixed["blocks"]["mlp"]["up"]["S_high"], before.S_high[...])


@pytest.mark.parametrize(("memory", "full"), [(1.0, 0), (0.5, 1)])
def test_coso_says_when_its_memory_is_full(memory, full):
    params = {"w": jnp.ones((2, 4, 6)), "b": jnp.ones(3)}
    tx = coso(0.1, 2, projected={"w": True, "b": False}, memory=memory)
    # A task that used one direction of the first matrix, and two of the second.
    sketch = jnp.zeros((2, 4, 4)).at[0, 0, 0].set(1).at[1, :2, :2].set(jnp.eye(2))
    fresh = TrainState(jnp.int32(0), params, tx.init(params), {})
    used = fresh.opt_state._replace(sketch={**fresh.opt_state.sketch, "w": sketch})
    options = CoSOOptions(memory=memory, threshold=1.0)
    state, note = coso_next_task(options, fresh._replace(opt_state=used), fresh)
    assert state.opt_state.remembered["w"].tolist() == [1, 2]
    assert note.startswith("warning: the memory of earlier tasks' directions") == bool(full)
    if full:
        assert "full in 1 of 2 matrices" in note
        assert "config.method_options.memory = 0.5" in note
