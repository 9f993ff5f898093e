"""Every method trains a model, holds what is counted, and does to it what it says."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from loro_jax.errors import TrainingError
from loro_jax.memory import count_bytes
from loro_jax.peers.sst import Spectral
from loro_jax.planning.flops import flops_per_token
from loro_jax.planning.memory_table import held_by
from loro_jax.training.config import Config
from loro_jax.training.mesh import make_mesh
from loro_jax.training.methods import METHODS, make_optimizer
from loro_jax.training.report import run_footprint
from loro_jax.training.step import compile_program, make_program
from models import Batch, preset
from tests.helpers import some_fast

MODEL = preset("tiny")
EVERY = 4


def config(method, **changes):
    fields = {
        "method": method,
        "batch_size": 4,
        "sequence_length": 16,
        "steps": 60,
        "warmup_steps": 2,
        "exact_every": EVERY,
        "restart_warmup_steps": 2,
        "exact_method": "svd",  # the quickest to compile
        "model": MODEL,
    }
    return Config(**{**fields, **changes})


def batch():
    tokens = (np.arange(17)[None] * 3 + np.arange(4)[:, None]) % 64
    ids = tokens.astype(np.int32)
    return Batch(ids[:, :-1], ids[:, 1:], np.ones((4, 16), np.float32))


@pytest.fixture(scope="module")
def train():
    """Trains by a method for some steps: its compiled step and all states, kept for other tests."""
    known = {}

    def run(method, steps=12, options=None):
        key = method, *(options or {}).items()
        if key not in known:
            run = config(method, method_options=options or {})
            run.validate()
            devices = make_mesh(run.mesh)
            program, abstract = compile_program(make_program(run, devices), devices)
            compiled = program.train_step.lower(abstract, batch()).compile()
            state, states, losses = program.init(), [], []
            for _ in range(steps):
                states.append(jax.tree.map(np.asarray, state))
                state, metrics = compiled(state, batch())
                losses.append(float(metrics["loss"]))
            known[key] = compiled, states, losses
        return known[key]

    return run


# Beside a fixed random network, changes that start as products of three small factors, E zero.
SLOW_STARTS = {"adalora": 0.02, "increlora": 0.0005}


@pytest.mark.parametrize("method", some_fast(METHODS, ("loro", "full", "relora")))
def test_the_loss_falls_and_the_step_holds_what_is_counted(train, method):
    compiled, states, losses = train(method)
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0] - SLOW_STARTS.get(method, 0.3)
    held = held_by(config(method))
    arguments = compiled.memory_analysis().argument_size_in_bytes - count_bytes(batch())
    assert arguments == pytest.approx(held.weights + held.optimizer, rel=0.01)
    shapes = [[leaf.shape for leaf in jax.tree.leaves(state)] for state in states]
    assert all(other == shapes[0] for other in shapes)


def adapters(state, name):
    """An array of all projections, from params or fixed."""
    blocks = state.params["blocks"] if name in ("B", "A", "S") else state.fixed["blocks"]
    return [
        np.asarray(projection[name], np.float64)
        for group in ("attention", "mlp")
        for projection in blocks[group].values()
    ]


def products(state, scale):
    triples = (adapters(state, name) for name in ("W", "B", "A"))
    return [W + scale * B @ A for W, B, A in zip(*triples, strict=True)]


def test_lora_leaves_its_fixed_weights_alone(train):
    _, states, _ = train("lora")
    for first, last in zip(adapters(states[0], "W"), adapters(states[-1], "W"), strict=True):
        np.testing.assert_array_equal(first, last)


def test_relora_merges_every_k_steps_and_moves_nothing(train):
    _, states, _ = train("relora")
    scale = MODEL.alpha / MODEL.rank
    for step, (before, after) in enumerate(itertools.pairwise(states), 1):
        merged = any(
            not np.array_equal(a, b)
            for a, b in zip(adapters(before, "W"), adapters(after, "W"), strict=True)
        )
        assert merged == (step % EVERY == 0)
        if merged:
            assert all(not B.any() for B in adapters(after, "B"))
            kept = [np.count_nonzero(nu) for nu in jax.tree.leaves(after.opt_state.factors.nu)]
            assert max(kept) <= 2
            # The function moved by the step alone, as by any other: nothing jumped.
            moves = [
                np.linalg.norm(a - b) / np.linalg.norm(b)
                for a, b in zip(products(after, scale), products(before, scale), strict=True)
            ]
            assert max(moves) < 1.0


@pytest.mark.slow
def test_switchlora_switches_and_freezes(train):
    _, states, _ = train("switchlora")
    assert all(state.fixed["blocks"]["mlp"]["up"]["switched"].shape == (2,) for state in states)
    switched = [int(state.fixed["blocks"]["mlp"]["up"]["switched"].sum()) for state in states]
    assert switched == sorted(switched)
    assert switched[-1] > 0
    frozen = [state.fixed["blocks"]["mlp"]["up"]["frozen_B"].max() for state in states]
    assert 0 < max(frozen) <= 5


@pytest.mark.slow
def test_sst_trains_some_vectors_a_round_and_its_rounds_move_nothing(train):
    _, states, _ = train("sst")

    def weights(state):
        parts = zip(*(adapters(state, name) for name in Spectral._fields), strict=True)
        return [
            np.asarray(Spectral(*arrays, active.astype(np.int32)).astype(np.float32).weight())
            for *arrays, active in parts
        ]

    for step, (before, after) in enumerate(itertools.pairwise(states), 1):
        assert all((S >= 0).all() for S in adapters(after, "S"))
        for B, A in zip(adapters(after, "B"), adapters(after, "A"), strict=True):
            np.testing.assert_allclose(np.linalg.norm(B, axis=-2), 1, atol=1e-5)
            np.testing.assert_allclose(np.linalg.norm(A, axis=-1), 1, atol=1e-5)
        same = [
            np.array_equal(one, other)
            for one, other in zip(*(jax.tree.leaves(s.fixed) for s in (before, after)), strict=True)
        ]
        assert not any(same) if step % EVERY == 0 else all(same)
        # Also at the end of a round the weights move by the step alone.
        for one, other in zip(weights(before), weights(after), strict=True):
            assert 0 < np.linalg.norm(one - other) < 0.5 * np.linalg.norm(one)


@pytest.mark.slow
def test_trp_truncates_every_k_steps_and_its_ranks_are_those_of_the_weights(train):
    _, states, _ = train("trp", options={"energy": 0.5})
    for step, (before, after) in enumerate(itertools.pairwise(states), 1):
        for name in ("q", "o"):
            W = np.asarray(after.params["blocks"]["attention"][name]["W"])
            rank = after.opt_state.rank["blocks"]["attention"][name]["W"]
            was = before.opt_state.rank["blocks"]["attention"][name]["W"]
            if step % EVERY == 0:
                np.testing.assert_array_equal(rank, np.linalg.matrix_rank(W, rtol=1e-5))
                assert (rank < 32).all()
            else:
                np.testing.assert_array_equal(rank, was)
                assert (np.linalg.matrix_rank(W, rtol=1e-5) == 32).all()


@pytest.mark.slow
def test_restarts_balance_the_factors(train):
    for method in ("lowrank_restarts", "svd_projection"):
        _, states, _ = train(method)
        for B, A in zip(adapters(states[EVERY], "B"), adapters(states[EVERY], "A"), strict=True):
            gram = np.swapaxes(B, 1, 2) @ B
            np.testing.assert_allclose(gram, A @ np.swapaxes(A, 1, 2), atol=1e-4)


def test_projected_methods_hold_less_state_than_adam():
    full = held_by(config("full"))
    for method in ("galore", "fira", "adarankgrad", "frugal", "dct_adamw", "gradnormlorp"):
        held = held_by(config(method))
        assert held.total == full.total
        assert held.optimizer < 0.8 * full.optimizer


# Two layers of four matrices 32 x 32 and three 32 x 48, at rank 8 and half of the layers.
MOMENTS_OF_GALORE = 2 * 4 * 2 * 8 * (4 * 32 + 3 * 48)
MOMENTS_OF_FRUGAL = 2 * 4 * (4 * 32 * 32 + 3 * 32 * 48)


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("galore", {"basis": "svd"}, MOMENTS_OF_GALORE + 4 * 2 * 7 * 32 * 8),
        ("galore", {"basis": "dct"}, MOMENTS_OF_GALORE + 4 * 2 * 7 * 8),
        ("frugal", {"density": 0.5}, MOMENTS_OF_FRUGAL + 4 * 7),
        ("frugal", {"density": 0.0}, 4 * 3 * 7),
        ("frugal", {"density": 0.5, "basis": "columns"}, MOMENTS_OF_FRUGAL + 4 * 2 * 7 * 16),
        ("frugal", {"density": 1.0, "basis": "dct"}, 2 * MOMENTS_OF_FRUGAL + 4 * 2 * 7 * 32),
    ],
)
def test_what_each_basis_holds(method, options, expected):
    """Bytes of the projections' state; the other leaves have a placeholder each, and Adam's."""
    projections = 2 * 4 * 2 * (4 * 32 * 32 + 3 * 32 * 48)
    others = held_by(config("full")).optimizer - projections
    held = held_by(config(method, method_options=options))
    assert held.optimizer - others == pytest.approx(expected, abs=4 * 10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("galore", {"basis": "dct", "moments": "rotate"}),
        ("galore", {"basis": "blocks"}),
        ("fira", {"basis": "columns"}),
        ("frugal", {"basis": "svd"}),
        ("frugal", {"density": 0.0}),
    ],
)
def test_the_step_holds_what_is_counted_in_other_bases(train, method, options):
    run = config(method, method_options=options)
    compiled, _, losses = train(method, options=options)
    assert losses[-1] < losses[0] - 0.3
    held = held_by(run)
    arguments = compiled.memory_analysis().argument_size_in_bytes - count_bytes(batch())
    assert arguments == pytest.approx(held.weights + held.optimizer, rel=0.01)


def test_the_report_counts_fixed_arrays():
    for method in ("lora", "sst"):
        counted, held = run_footprint(config(method)), held_by(config(method))
        assert counted.parameters == held.total > held.trainable
        assert counted.total_bytes == held.weights + held.gradients + held.optimizer


def test_a_learning_rate_of_their_own_for_the_factors():
    """The plain low-rank arm at lr_scale = 0 trains all but its factors."""
    run = config("lowrank", lr_scale=1e-9)
    program = make_program(run)
    state = program.init()
    new, _ = jax.jit(program.train_step)(state, batch())
    up = (state.params["blocks"]["mlp"]["up"], new.params["blocks"]["mlp"]["up"])
    np.testing.assert_allclose(up[0]["B"], up[1]["B"], atol=1e-9)
    assert np.abs(state.params["embedding"] - new.params["embedding"]).max() > 1e-4


def test_flops_of_kinds():
    flops = {method: flops_per_token(config(method)) for method in METHODS}
    assert flops["galore"] == flops["full"]
    assert flops["cola"] == flops["lowrank"] == flops["loro"] < flops["full"]
    assert flops["full"] < flops["lora"] == flops["switchlora"]
    # A column of each projection, 6 m operations: a layer has five of 32 outputs and two of 48.
    assert flops["lost"] == flops["cola"] + 2 * 6 * (5 * 32 + 2 * 48)
    # Blocks of 8 x 8, 12 x 8 and 8 x 12: a quarter of each fixed matrix, forward and backward.
    scaffold = dataclasses.replace(MODEL, projection="scaffold", scaffold_block=8)
    more = flops_per_token(config("loro", model=scaffold)) - flops["loro"]
    assert more == 2 * 4 * (4 * 32 * 32 + 3 * 32 * 48) / 4
    dense = dataclasses.replace(MODEL, scope="none")
    per_layer = 4 * 32 * 32 + 3 * 32 * 48
    expected = 6 * (2 * per_layer + 260 * 32) + 2 * 6 * 16 * 32
    assert flops_per_token(config("full", model=dense)) == expected


def test_methods_that_need_factors_say_so():
    dense = dataclasses.replace(MODEL, scope="none")
    with pytest.raises(TrainingError, match="'cola' needs factors"):
        config("cola", model=dense).validate()
    config("galore", model=dense).validate()


@pytest.mark.parametrize("method", ["full", "lowrank"])
def test_projections_may_have_a_learning_rate_of_their_own(method):
    params = make_program(config(method)).init().params
    grads = jax.tree.map(np.ones_like, params)
    moves = []
    for scale in (None, 0.25):
        tx = make_optimizer(config(method, lr_scale=scale))
        updates, _ = tx.update(grads, tx.init(params), params)
        moves.append(updates)
    ratios = jax.tree_util.tree_map_with_path(
        lambda path, one, other: (path[-1].key, path[0].key, float(np.mean(other / one))), *moves
    )
    for leaf, group, ratio in jax.tree.leaves(ratios, is_leaf=lambda x: isinstance(x, tuple)):
        of_projection = group == "blocks" and leaf in ("W", "B", "A")
        assert ratio == pytest.approx(0.25 if of_projection else 1.0, rel=1e-5)


def test_the_dense_twin_by_muon_holds_one_moment_less():
    adam, muon = held_by(config("full")), held_by(config("full", direction="orthogonal"))
    projections = 2 * (4 * 32 * 32 + 3 * 32 * 48)
    assert adam.total == muon.total
    assert adam.optimizer - muon.optimizer == pytest.approx(4 * projections, abs=16)


def test_trion_holds_the_state_of_muon():
    """Its momentum is not of low rank, and the columns are not held."""
    muon, trion = held_by(config("full", direction="orthogonal")), held_by(config("trion"))
    assert (muon.total, muon.optimizer) == (trion.total, trion.optimizer)


def test_dct_adamw_holds_indices_in_place_of_projectors():
    galore, dct = held_by(config("galore")), held_by(config("dct_adamw"))
    # Seven matrices in each of two layers, whose smaller side is 32.
    indices, projectors = 14 * MODEL.rank, 14 * MODEL.rank * 32
    assert galore.optimizer - dct.optimizer == 4 * (projectors - indices)


def test_the_dense_twin_learns_by_muon():
    run = config("full", direction="orthogonal", clip_norm=1.0)
    run.validate()
    program = make_program(run)
    step, state, losses = jax.jit(program.train_step), program.init(), []
    for _ in range(12):
        state, metrics = step(state, batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5
