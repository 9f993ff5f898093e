"""Methods that choose the ranks of adapters, from single steps to tasks in sequence."""

import json
import shutil

import jax
import numpy as np
import pytest

from loro_jax.errors import TrainingError
from loro_jax.training.config import AdapterConfig, Config
from loro_jax.training.mesh import make_mesh
from loro_jax.training.step import compile_program, make_program
from loro_jax.training.trained import load_run, load_state
from models import Batch, preset
from tests.helpers import some_fast
from tests.training import runs

STEPS = 12
RANK = 4
# Two layers, two projections of each.
RANKS = 2 * 2 * RANK
OPTIONS = {
    "adalora": {"target": 0.5, "initial": 0.1, "final": 0.3, "prune_every": 2},
    "increlora": {"target": 0.5, "grow_from": 0, "grow_every": 2},
    "sora": {"threshold": 0.05},
    "codyra": {"threshold": 0.2, "stages": 4},
}


def batch():
    tokens = (np.arange(17)[None] * 3 + np.arange(4)[:, None]) % 64
    ids = tokens.astype(np.int32)
    return Batch(ids[:, :-1], ids[:, 1:], np.ones((4, 16), np.float32))


def config(method, **changes):
    fields = {
        "method": method,
        "method_options": OPTIONS.get(method, {}),
        "batch_size": 4,
        "sequence_length": 16,
        "steps": STEPS,
        "warmup_steps": 2,
        "learning_rate": 0.02,
        "model": preset("tiny"),
        "adapter": AdapterConfig(rank=RANK, targets="q,v"),
    }
    return Config(**{**fields, **changes})


def gates(params, name):
    """The gates of all adapters, (projection, layer, rank)."""
    attention = params["blocks"]["attention"]
    return np.stack([np.asarray(attention[p]["adapter"][name]) for p in ("q", "v")])


@pytest.mark.parametrize("method", some_fast(OPTIONS, ["adalora"]))
def test_ranks_are_chosen_while_adapters_train(method):
    run = config(method)
    run.validate()
    devices = make_mesh(run.mesh)
    program, _ = compile_program(make_program(run, devices), devices)
    state = program.init()
    before = jax.tree.map(np.asarray, state.fixed)
    name = "gate" if method in ("sora", "codyra") else "E"
    live, found, losses = [], [], []
    for _ in range(STEPS):
        state, metrics = program.train_step(state, batch())
        live.append(int(metrics["live_ranks"]))
        found.append(gates(state.params, name))
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, state.fixed))
    counts = [int(np.count_nonzero(g)) for g in found]
    if method == "increlora":
        # Two ranks every two steps, from four to eight; what is open or in reserve is not zero.
        assert live == [4, 4, 6, 6, *[8] * 8]
        assert counts[1] == 8
        assert counts[-1] == 8
        return
    if method == "adalora":
        # The budget at steps 2, 4, 6 and 8, and its target; between two prunes all are trained.
        for t in (2, 4, 6, 8):
            assert live[t] == live[t + 1] == counts[t] == int(8 + 8 * (1 - (t - 1) / 7) ** 3)
        assert live[:2] == counts[:2] == [RANKS] * 2
        assert counts[3] == RANKS
        assert live[9:] == counts[9:] == [8] * 3
        return
    assert live == counts
    assert live[-1] < live[0] == RANKS
    if method == "codyra":
        assert live[6] == RANKS


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        (
            "adalora",
            {"method_options": {"initial": 0.6, "final": 0.4}},
            r"method_options.initial \+ method_options.final must be below 1.*are 0.6 and 0.4",
        ),
        ("sora", {"method_options": {"target": 0.5}}, r"has no such option; it has penalty, thr"),
        ("sora", {"adapter": AdapterConfig(kind="adalora")}, r"method 'sora' does not train such"),
        ("loro", {"adapter": AdapterConfig(kind="gated")}, r"a method among lowrank, sora, codyra"),
        ("increlora", {"adapter": AdapterConfig(rank=64)}, r"adapter.rank must be at most 32"),
    ],
)
def test_bad_settings_are_one_line(method, changes, message):
    with pytest.raises(TrainingError, match=message) as caught:
        config(method, **changes).validate()
    assert "\n" not in str(caught.value)


FLAGS = {
    "steps": STEPS,
    "eval_every": STEPS,
    "checkpoint_every": 4,
    "exact_every": 500,
    "exact_method": "graph",
    "learning_rate": 0.02,
    "adapter.rank": RANK,
    "adapter.targets": "q,v",
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense run to start from, and its text."""
    folder = tmp_path_factory.mktemp("dense")
    source = runs.corpus(folder)
    flags = {name: value for name, value in FLAGS.items() if not name.startswith("adapter")}
    status, output = runs.run(*runs.flags(folder / "run", source, **flags, method="full"))
    assert status == 0, output
    return folder / "run", source


def tune(start, source, workdir, method, **changes):
    options = {f"method_options.{name}": value for name, value in OPTIONS[method].items()}
    fields = {**FLAGS, **options, "init_from": start, "method": method, **changes}
    status, output = runs.run(*runs.flags(workdir, source, **fields))
    assert status == 0, output
    return output


def metrics(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row["live_ranks"]) for row in rows if "loss" in row]


def change(state, projection):
    """dW of an adapter of a run, by its formula."""
    own = state.params["blocks"]["attention"][projection]["adapter"]
    g = own["gate"] if "gate" in own else own["E"]
    scale = 16 / (RANK + (0 if "gate" in own else 1e-5))
    return scale * (own["B"] * g[..., None, :]) @ own["A"]


@pytest.mark.slow
@pytest.mark.parametrize("method", OPTIONS)
def test_it_resumes_exactly_and_merges(dense, tmp_path, method):
    start, source = dense
    output = tune(start, source, tmp_path / "whole", method)
    last = metrics(tmp_path / "whole")[-1][1]
    assert f"live ranks: {int(last)} of {RANKS}" in output
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    # The last checkpoint goes; the run repeats the steps after the one before it.
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / str(STEPS))
    tune(start, source, tmp_path / "parts", method)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert len(metrics(tmp_path / "whole")) == STEPS
    _, _, base = load_state(start)
    _, _, state = load_state(tmp_path / "whole")
    model = load_run(tmp_path / "whole").model
    for projection in ("q", "v"):
        W = base.params["blocks"]["attention"][projection]["W"]
        found = getattr(model.blocks.attention, projection).W[...]
        np.testing.assert_allclose(found, W + change(state, projection), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["codyra", "adalora"])
def test_tasks_in_sequence_merge_and_start_new_adapters(dense, tmp_path, method):
    start, source = dense
    tune(start, source, tmp_path / "first", method)
    tune(tmp_path / "first", source, tmp_path / "second", method)
    _, _, first = load_state(tmp_path / "first")
    _, _, second = load_state(tmp_path / "second")
    for projection in ("q", "v"):
        base = first.fixed["blocks"]["attention"][projection]["base"]["W"]
        found = second.fixed["blocks"]["attention"][projection]["base"]["W"]
        np.testing.assert_allclose(found, base + change(first, projection), atol=1e-6)
    # All ranks are there again, and the first step is that of a new run.
    assert metrics(tmp_path / "second")[0][1] == RANKS
    assert metrics(tmp_path / "first")[-1][1] < RANKS
    # With the optimizer's state the first task continues.
    tune(
        *(tmp_path / "first", source, tmp_path / "longer", method),
        **{"steps": STEPS + 4, "init_optimizer": "copied"},
    )
    _, _, longer = load_state(tmp_path / "longer")
    jax.tree.map(np.testing.assert_array_equal, longer.fixed, first.fixed)
    assert len(metrics(tmp_path / "longer")) == 4


@pytest.mark.slow
def test_sora_continues_its_gates(dense, tmp_path):
    """As in the authors' sweep, with a higher threshold on the gates of the run before."""
    start, source = dense
    tune(start, source, tmp_path / "first", "sora")
    tune(
        *(tmp_path / "first", source, tmp_path / "second", "sora"),
        **{"method_options.threshold": 0.1, "steps": 1, "warmup_steps": 0},
        **{"learning_rate": 1e-6},
    )
    _, _, first = load_state(tmp_path / "first")
    _, _, second = load_state(tmp_path / "second")
    old, new = gates(first.params, "gate"), gates(second.params, "gate")
    rest = np.maximum(np.abs(old) - 0.1, 0)
    np.testing.assert_allclose(np.abs(new), np.where(rest < 0.1, 0, rest), atol=1e-5)
    assert np.count_nonzero(new) < np.count_nonzero(old)
