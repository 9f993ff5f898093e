import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loro_jax.training.config import Config
from loro_jax.training.mesh import make_mesh
from loro_jax.training.step import compile_program, make_program
from models import Batch, preset

BASE = Config(
    steps=50,
    batch_size=8,
    sequence_length=16,
    warmup_steps=2,
    exact_every=3,
    exact_method="svd",  # the quickest to compile
    model=preset("tiny"),
)


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(260, size=(8, 17))
    # Rows of different lengths, so that a mean of means would differ from the mean.
    mask = (np.arange(16) < rng.integers(2, 17, size=(8, 1))).astype(np.float32)
    return Batch(tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32), mask)


def steps(config, count):
    program, _ = compile_program(make_program(config), make_mesh(config.mesh))
    state, metrics = program.init(), []
    for i in range(count):
        state, row = program.train_step(state, make_batch(i))
        metrics.append({name: float(value) for name, value in row.items()})
    return state, metrics, program


@pytest.fixture(scope="module")
def plain():
    return steps(BASE, 5)


def test_the_step_compiles_once_and_donates_its_state():
    config = dataclasses.replace(BASE, exact_method="graph")
    program, _ = compile_program(make_program(config), make_mesh(config.mesh))
    state = program.init()
    before = jax.tree.leaves(state)
    for i in range(4):  # the third is exact
        state, _ = program.train_step(state, make_batch(i))
    assert program.train_step._cache_size() == 1
    assert all(leaf.is_deleted() for leaf in before)
    assert int(state.step) == int(state.opt_state.count) == 4


@pytest.mark.slow
def test_exact_steps_need_no_memory_beyond_that_of_the_gradients():
    """Their temporaries take the place of activations, which are gone by then."""

    def temporaries(method):
        config = dataclasses.replace(BASE, sequence_length=64, method=method, exact_method="graph")
        program, state = compile_program(make_program(config), make_mesh(config.mesh))
        ids = jax.ShapeDtypeStruct((8, 64), jnp.int32)
        batch = Batch(ids, ids, jax.ShapeDtypeStruct((8, 64), jnp.float32))
        return program.train_step.lower(state, batch).compile().memory_analysis().temp_size_in_bytes

    assert temporaries("loro") <= 1.01 * temporaries("lowrank")


def test_the_step_moves_nothing_to_the_host(plain):
    _, _, program = plain
    state, batch = program.init(), jax.device_put(make_batch())
    with jax.transfer_guard("disallow"):
        program.train_step(state, batch)


def test_accumulated_micro_batches_are_one_batch(plain):
    state, metrics, _ = plain
    config = dataclasses.replace(BASE, gradient_accumulation=4)
    other_state, other_metrics, _ = steps(config, 5)
    for one, other in zip(metrics, other_metrics, strict=True):
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-5)
        np.testing.assert_allclose(one["grad_norm"], other["grad_norm"], rtol=1e-4)
    assert int(other_state.opt_state.count) == 5, "one optimizer step a batch"
    np.testing.assert_allclose(
        state.params["embedding"], other_state.params["embedding"], rtol=1e-2, atol=1e-4
    )


def test_the_metrics_are_what_they_say(plain):
    _, metrics, program = plain
    state, batch = program.init(), make_batch(0)
    loss, tokens = program.eval_step(state.params, state.fixed, jax.tree.map(jnp.asarray, batch))
    assert float(tokens) == batch.mask.sum()
    np.testing.assert_allclose(metrics[0]["loss"], loss / tokens, rtol=1e-5)
    np.testing.assert_allclose(metrics[0]["lr"], 0.1 * BASE.learning_rate, rtol=1e-5)
    assert metrics[3]["lr"] == 0.0, "the step behind an exact one re-warms from zero"
    of_mean = jax.jit(jax.grad(lambda p: program.eval_step(p, {}, batch)[0] / tokens))
    gradient = of_mean(state.params)
    np.testing.assert_allclose(metrics[0]["grad_norm"], optax.tree.norm(gradient), rtol=1e-4)


def test_clipping_bounds_the_gradient_but_not_what_is_reported(plain):
    """Adam's first direction does not see a gradient's scale; its epsilon does."""
    _, metrics, _ = plain
    clipped = steps(dataclasses.replace(BASE, clip_norm=1e-7), 1)[1]
    np.testing.assert_allclose(clipped[0]["grad_norm"], metrics[0]["grad_norm"], rtol=1e-5)
    assert clipped[0]["update_norm"] < 0.1 * metrics[0]["update_norm"]


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ("loro", "float32"),
        pytest.param("loro", "bfloat16", marks=pytest.mark.slow),
        pytest.param("lowrank", "float32", marks=pytest.mark.slow),
        pytest.param("full", "float32", marks=pytest.mark.slow),
    ],
)
def test_every_method_learns_a_batch_by_heart(method, dtype):
    model = dataclasses.replace(BASE.model, dtype=dtype, param_dtype=dtype)
    config = dataclasses.replace(BASE, method=method, model=model, exact_every=20)
    program, _ = compile_program(make_program(config), make_mesh(config.mesh))
    state, losses = program.init(), []
    for _ in range(50):
        state, row = program.train_step(state, make_batch())
        losses.append(float(row["loss"]))
    assert losses[-1] < 0.7 * losses[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(dtype)}


@pytest.mark.slow
def test_lowrank_is_adam_with_one_learning_rate():
    """Against optax.adam, which adds epsilon to the corrected root: the same at a tiny epsilon."""
    config = dataclasses.replace(BASE, method="lowrank", eps=1e-30)
    state, _, program = steps(config, 1)
    start = program.init()
    batch = make_batch(0)
    grads = jax.grad(lambda p: program.eval_step(p, {}, batch)[0] / batch.mask.sum())(start.params)
    tx = optax.adam(0.1 * config.learning_rate, eps=1e-30)
    updates, _ = tx.update(grads, tx.init(start.params))
    expected = optax.apply_updates(start.params, updates)
    used = np.asarray(grads["blocks"]["mlp"]["up"]["B"]) != 0
    np.testing.assert_allclose(
        np.asarray(state.params["blocks"]["mlp"]["up"]["B"])[used],
        np.asarray(expected["blocks"]["mlp"]["up"]["B"])[used],
        rtol=1e-4,
        atol=1e-6,
    )
