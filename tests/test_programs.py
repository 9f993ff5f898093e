"""Steps inside the programs that users write around them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from loro_jax import LowRank, exact_update, initialise, loro, orthogonal, with_restarts
from loro_jax.pair_parallel import shardings_on_mesh
from loro_jax.pairs import pairs_of
from loro_jax.schedules import warmup_cosine
from tests.helpers import run_module, some_fast

PAIR = LowRank(*initialise(jax.random.key(0), 6, 5, 2))
PARAMS = {"w": PAIR, "b": jnp.ones(4)}


def step_from(tx, params=PARAMS, grads=None, update=None):
    state = tx.init(params)
    return (update or tx.update)(params if grads is None else grads, state, params)


def test_sam_chooses_between_states_by_arithmetic():
    tx = optax.contrib.sam(loro(0.01, exact_every=2), optax.sgd(0.01), sync_period=2)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(params, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), length=4)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(params))


@pytest.mark.parametrize("options", some_fast([{}, {"basis": "nearest"}], [{"basis": "nearest"}]))
def test_checkify_accepts_a_step_and_finds_nothing(options):
    tx = loro(0.01, exact_every=1, **options)
    checked = jax.jit(checkify.checkify(tx.update, errors=checkify.float_checks))
    error, (updates, _) = checked(PARAMS, tx.init(PARAMS), PARAMS)
    assert error.get() is None
    expected, _ = step_from(tx, update=jax.jit(tx.update))
    np.testing.assert_allclose(updates["w"].B, expected["w"].B, atol=1e-5)


def test_the_third_step_outside_of_a_program_compiles_nothing():
    tx = loro(0.01, exact_every=2)
    state, compiled = tx.init(PARAMS), []

    def listen(event, _, **__):
        if "backend_compile" in event:
            compiled.append(event)

    for step in range(6):
        if step == 4:
            jax.monitoring.register_event_duration_secs_listener(listen)
        updates, state = tx.update(PARAMS, state, PARAMS)
    jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == []
    assert bool(state.stale)
    assert bool(jnp.isfinite(updates["w"].B).all())


@pytest.mark.parametrize("method", ["graph", "svd"])
@pytest.mark.parametrize("basis", ["singular", "nearest"])
def test_ranks_are_not_promoted(method, basis):
    stack = jax.tree.map(lambda x: jnp.stack([x, x]), PAIR)
    tx = loro(0.01, exact_every=2, exact_method=method, basis=basis, damping=0.1, max_move=0.1)
    spectral = loro(0.01, exact_every=None, direction=orthogonal())
    with jax.numpy_rank_promotion("raise"):
        for params in (PARAMS, {"w": stack}):
            jax.jit(tx.update).lower(params, tx.init(params), params)
            jax.jit(spectral.update).lower(params, spectral.init(params), params)


def test_numbers_of_steps_beyond_int32_are_never():
    largest = np.iinfo(np.int32).max
    for every in (largest, largest + 1, 10**10, np.int64(10**12), lambda step: 10**10):
        _, state = step_from(loro(0.01, exact_every=every))
        assert not state.stale
    at = jnp.int32(7)
    assert float(with_restarts(0.5, every=10**10)(at)) == 0.5
    assert float(with_restarts(1.0, every=5, warmup_steps=10**10)(at)) < 1e-9
    assert float(warmup_cosine(1.0, 10**10, 10**9)(at)) == pytest.approx(0.1)
    assert float(warmup_cosine(1.0, 10**10, 7)(at)) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="exact_every"):
        loro(0.01, exact_every=np.int64(0))


def test_python_numbers_may_be_leaves():
    params = {"w": PAIR, "scale": 2.0, "table": np.ones(3)}
    expected = {"w": PAIR, "scale": jnp.float32(2.0), "table": jnp.ones(3)}
    tx = loro(0.01, exact_every=1, weight_decay=0.1)
    updates, state = step_from(tx, params, update=jax.jit(tx.update))
    right, right_state = step_from(tx, expected, update=jax.jit(tx.update))
    found, wanted = (
        [x.dtype for x in jax.tree.leaves(t)] for t in ((updates, state), (right, right_state))
    )
    assert found == wanted
    assert float(updates["scale"]) == float(right["scale"])


def test_a_step_has_a_derivative_unless_it_may_be_exact():
    def moved(rate, every):
        updates, _ = step_from(loro(rate, exact_every=every))
        return jnp.sum(updates["w"].B ** 2)

    slope = jax.jit(jax.grad(lambda rate: moved(rate, None)))(0.1)
    assert float(slope) == pytest.approx(2 * float(moved(0.1, None)) / 0.1, rel=1e-4)
    with pytest.raises(NotImplementedError, match="exact step has no derivative"):
        jax.jit(jax.grad(lambda rate: moved(rate, 1)))(0.1)
    with pytest.raises(NotImplementedError, match="exact step has no derivative"):
        jax.jvp(lambda B: exact_update(B, PAIR.A, PAIR.B, PAIR.A, 0.1), (PAIR.B,), (PAIR.B,))


def test_balancing_has_a_derivative():
    def size(B):
        return jnp.sum(LowRank(B, PAIR.A).balance().product() ** 2)

    expected = jax.grad(lambda B: jnp.sum((B @ PAIR.A) ** 2))(PAIR.B)
    np.testing.assert_allclose(jax.grad(size)(PAIR.B), expected, rtol=1e-3, atol=1e-3)


def test_flax_serialization_brings_back_the_same_leaves():
    serialization = pytest.importorskip("flax.serialization")
    content = (PARAMS, loro(0.01).init(PARAMS))
    blank = jax.tree.map(jnp.zeros_like, content)
    again = serialization.from_bytes(blank, serialization.to_bytes(content))
    chex.assert_trees_all_equal(again, content)
    by_names = serialization.to_bytes({"w": {"B": PAIR.B, "A": PAIR.A}})
    np.testing.assert_array_equal(serialization.from_bytes({"w": PAIR}, by_names)["w"].A, PAIR.A)
    with pytest.raises(ValueError, match="B and A"):
        serialization.from_state_dict(PAIR, {"B": PAIR.B})


def test_shardings_that_name_no_mesh_divide_nothing():
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    on_mesh, alone = NamedSharding(mesh, PartitionSpec()), SingleDeviceSharding(jax.devices()[0])
    pairs = pairs_of(PARAMS)
    for tree in (
        jax.tree.map(lambda _: alone, PARAMS),
        jax.tree.map(lambda _: None, PARAMS),
        {"b": on_mesh, "w": alone},
        alone,
    ):
        found, shardings = shardings_on_mesh(tree, PARAMS, pairs)
        assert found.empty
        assert shardings is None
    found, shardings = shardings_on_mesh({"b": alone, "w": on_mesh}, PARAMS, pairs)
    assert (found, shardings) == (mesh, [(on_mesh, on_mesh)])
    _, shardings = shardings_on_mesh(
        {"b": None, "w": LowRank.tree_unflatten(None, (on_mesh, on_mesh))}, PARAMS, pairs
    )
    assert shardings == [(on_mesh, on_mesh)]
    spec = PartitionSpec("d")
    with jax.set_mesh(mesh):
        found, shardings = shardings_on_mesh(spec, PARAMS, pairs)
    assert [sharding.spec for sharding in shardings[0]] == [spec, spec]
    with pytest.raises(ValueError, match="no mesh is set"):
        shardings_on_mesh(spec, PARAMS, pairs)
    with pytest.raises(ValueError, match="a str"):
        shardings_on_mesh(jax.tree.map(lambda _: "d", PARAMS), PARAMS, pairs)
    with pytest.raises(ValueError, match="3 shardings"):
        shardings_on_mesh([on_mesh], PARAMS, pairs)


def test_a_transformation_after_loro_is_warned_about():
    tx = loro(0.01)
    optax.chain(optax.clip(1.0), tx).init(PARAMS)
    optax.chain(optax.clip(1.0), optax.chain(optax.clip(1.0), tx)).init(PARAMS)
    optax.named_chain(("clip", optax.clip(1.0)), ("loro", tx)).init(PARAMS)
    for bad in (
        optax.chain(tx, optax.scale(0.5)),
        optax.chain(optax.chain(optax.clip(1.0), tx), optax.scale(0.5)),
        optax.named_chain(("loro", tx), ("scale", optax.scale(0.5))),
        optax.chain(optax.MultiSteps(tx, 2).gradient_transformation(), optax.scale(0.5)),
    ):
        with pytest.warns(UserWarning, match="1 transformation comes after it"):
            bad.init(PARAMS)


@pytest.mark.slow
def test_a_program_for_six_shapes_is_no_larger_than_six_programs():
    def size(count):
        params = {
            f"w{i}": LowRank(*initialise(jax.random.key(i), 8 + i, 7, 2)) for i in range(count)
        }
        tx = loro(0.01, exact_every=2)
        return len(jax.jit(tx.update).lower(params, tx.init(params), params).as_text())

    assert size(6) <= 6 * size(1)


@pytest.mark.slow
def test_export_for_several_platforms():
    params = {"w": PAIR}
    tx = loro(0.01, exact_every=1)
    with jax.enable_x64(True):
        exported = jax.export.export(jax.jit(tx.update), platforms=["cpu", "cuda", "tpu"])(
            params, tx.init(params), params
        )
    updates, _ = exported.call(params, tx.init(params), params)
    expected, _ = step_from(tx, params, update=jax.jit(tx.update))
    np.testing.assert_allclose(updates["w"].B, expected["w"].B, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shard_map", "explicit"])
def test_members_of_an_ensemble_train_as_each_does_alone(kind):
    run_module("tests.ensembles", kind)
