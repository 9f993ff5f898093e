"""Fine-tuning by adapters, from the command to the merged model."""

import json
import re
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loro_jax.errors import TrainingError
from loro_jax.text import load_corpus, train_iterator
from loro_jax.text.tokenizers.tokenizer import load_tokenizer
from loro_jax.training.batch import to_batch
from loro_jax.training.config import AdapterConfig, Config
from loro_jax.training.method_options import MethodOptions
from loro_jax.training.methods import make_optimizer
from loro_jax.training.network import base_of, make_network
from loro_jax.training.step import joined, make_program
from loro_jax.training.trained import load_model, load_run, load_state
from models import Llama, preset
from models.huggingface import read_model, write_model
from tests.training import runs

SHORT = {"steps": 8, "eval_every": 8, "checkpoint_every": 4, "exact_every": 4}
ADAPTER = {"adapter.kind": "lora", "adapter.rank": 4, "adapter.targets": "q,v,down"}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense run to start from, and its text."""
    folder = tmp_path_factory.mktemp("dense")
    source = runs.corpus(folder)
    changes = {"method": "full", "exact_every": 500, "exact_method": "graph"}
    status, output = runs.run(*runs.flags(folder / "run", source, **{**SHORT, **changes}))
    assert status == 0, output
    return folder / "run", source


def tune(dense, workdir, **changes):
    run, source = dense
    fields = {**SHORT, "init_from": run, **ADAPTER, **changes}
    return runs.run(*runs.flags(workdir, source, **fields))


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_only_adapters_change_and_the_run_is_merged_where_it_is_read(dense, tmp_path):
    status, output = tune(dense, tmp_path / "tuned")
    assert status == 0, output
    assert "lora adapters (loro)" in output
    _, _, before = load_state(dense[0])
    config, _, after = load_state(tmp_path / "tuned")
    flat = jax.tree_util.tree_leaves_with_path(after.params)
    assert {path[-2].key for path, _ in flat} == {"adapter"}
    assert {path[-3].key for path, _ in flat} == {"q", "v", "down"}
    # The base is the dense run's, bit for bit.
    base = base_of(joined(after.params, after.fixed))
    chex.assert_trees_all_equal(base, before.params)
    assert config.adapter.targets == "q,v,down"
    # What reads a model gets a plain one: W + s B A.
    model, _ = load_model(tmp_path / "tuned")
    q = after.params["blocks"]["attention"]["q"]["adapter"]
    W = before.params["blocks"]["attention"]["q"]["W"] + 4.0 * q["B"] @ q["A"]
    np.testing.assert_allclose(model.blocks.attention.q.W[...], W, atol=1e-5)
    assert type(model) is Llama


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lowrank", "spectron", "preconditioned"])
def test_other_methods_train_adapters(dense, tmp_path, method):
    changes = {"method": method, "exact_every": 500, "exact_method": "graph", "steps": 40}
    status, output = tune(dense, tmp_path / "tuned", **changes, learning_rate=0.003)
    assert status == 0, output
    found = losses(tmp_path / "tuned")
    assert np.mean(found[-5:]) < np.mean(found[:5])


@pytest.mark.slow
def test_it_resumes_exactly(dense, tmp_path):
    status, output = tune(dense, tmp_path / "whole", log_every=1)
    assert status == 0, output
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    # The last checkpoint goes; the run repeats the steps after the one before it.
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "8")
    status, output = tune(dense, tmp_path / "parts", log_every=1)
    assert status == 0, output
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_tasks_in_sequence_merge_and_start_new_adapters(dense, tmp_path):
    status, output = tune(dense, tmp_path / "first")
    assert status == 0, output
    second = tmp_path / "first", dense[1]
    status, output = tune(second, tmp_path / "second", **{"adapter.rank": 2})
    assert status == 0, output
    merged = load_run(tmp_path / "first").model
    _, _, state = load_state(tmp_path / "second")
    np.testing.assert_array_equal(
        state.fixed["blocks"]["mlp"]["down"]["base"]["W"], merged.blocks.mlp.down.W[...]
    )


@pytest.mark.slow
def test_a_low_rank_run_is_merged_into_the_base(dense, tmp_path):
    status, output = runs.run(*runs.flags(tmp_path / "pairs", dense[1], **SHORT))
    assert status == 0, output
    status, output = tune((tmp_path / "pairs", dense[1]), tmp_path / "tuned")
    assert status == 0, output
    _, _, pairs = load_state(tmp_path / "pairs")
    _, _, tuned = load_state(tmp_path / "tuned")
    own = pairs.params["blocks"]["attention"]["o"]
    found = tuned.fixed["blocks"]["attention"]["o"]["W"]
    np.testing.assert_allclose(found, own["B"] @ own["A"], atol=1e-5)


def test_it_starts_from_a_hugging_face_directory(dense, tmp_path):
    model = load_run(dense[0]).model
    write_model(model, tmp_path / "hf")
    changes = {"init_from": tmp_path / "hf", "method": "lowrank", "exact_every": 500}
    status, output = tune(
        dense, tmp_path / "tuned", **changes, exact_method="graph", learning_rate=1e-9
    )
    assert status == 0, output
    stored, _ = read_model(tmp_path / "hf")
    found, _ = load_model(tmp_path / "tuned")
    np.testing.assert_allclose(
        found.blocks.mlp.down.W[...], stored.blocks.mlp.down.W[...], atol=1e-6
    )
    np.testing.assert_array_equal(found.embedding[...], stored.embedding[...])


@pytest.mark.slow
def test_factors_that_are_not_zero_start_as_the_run(dense, tmp_path):
    changes = {"adapter.initialiser": "xavier", "learning_rate": 1e-9, "steps": 1}
    status, output = tune(dense, tmp_path / "tuned", **changes, warmup_steps=0, exact_every=0)
    assert status == 0, output
    _, _, state = load_state(tmp_path / "tuned")
    assert float(abs(state.params["blocks"]["mlp"]["down"]["adapter"]["B"]).min()) > 0
    found, stored = load_run(tmp_path / "tuned").model, load_run(dense[0]).model
    np.testing.assert_allclose(
        found.blocks.mlp.down.W[...], stored.blocks.mlp.down.W[...], atol=1e-6
    )


def test_the_rest_can_be_trained_too():
    model = preset("tiny")
    adapter = AdapterConfig(kind="lora", trained="norms,head")
    config = Config(method="lowrank", model=model, adapter=adapter)
    config.validate()
    state = nnx.eval_shape(lambda: make_network(config))
    paths = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(state, nnx.Param))}
    rest = {path for path in paths if "adapter" not in path}
    assert rest == {
        "blocks/attention_norm/scale",
        "blocks/mlp_norm/scale",
        "head/W",
        "norm/scale",
    }


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("full", {}, r"adapter.kind = 'lora': method 'full' does not train such adapters"),
        ("galore", {}, r"expected a method among loro, lowrank"),
        ("loro", {"targets": "q,kk"}, r"adapter.targets must be all, or names among q, k"),
        ("loro", {"trained": "heads"}, r"adapter.trained must be names among embedding, head"),
        ("loro", {"rank": 64}, r"adapter.rank must be at most 32, the smaller side of 'q'"),
        ("loro", {"kind": "miss"}, r"method 'loro' does not train such adapters.*among lowrank"),
        ("loro", {"kind": "lorra"}, r"adapter.kind must be one of none, lora.*is 'lorra'"),
    ],
)
def test_bad_adapters_are_one_line(method, changes, message):
    adapter = AdapterConfig(**{"kind": "lora", **changes})
    with pytest.raises(TrainingError, match=message) as caught:
        Config(method=method, model=preset("tiny"), adapter=adapter).validate()
    assert "\n" not in str(caught.value)


def test_fields_of_adapters_need_a_kind(tmp_path):
    status, output = runs.run("--config.adapter.rank=4", f"--workdir={tmp_path / 'run'}")
    assert status == 1
    assert "config.adapter.rank is for adapters, but config.adapter.kind = 'none'" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("adapter.alpha=8.0", r"alpha: adapters of kind 'miss' do not use it; .* among lora"),
        ("method_options.b_ratio=16.0", r"b_ratio = 16.0: adapters of kind 'miss' have no factors"),
    ],
)
def test_fields_without_effect_are_refused(tmp_path, field, message):
    kind = ("--config.method=lowrank", "--config.adapter.kind=miss", f"--config.{field}")
    status, output = runs.run(*kind, f"--workdir={tmp_path / 'run'}")
    assert status == 1
    assert re.search(message, output), output
    assert not (tmp_path / "run").exists()


KINDS = ("miss", "bone", "randlora", "lora_sb")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_and_resumes_exactly(dense, tmp_path, kind):
    changes = {"method": "lowrank", "exact_every": 500, "exact_method": "graph", "log_every": 1}
    changes |= {"adapter.kind": kind, "steps": 30, "checkpoint_every": 15, "learning_rate": 0.003}
    if kind == "lora_sb":
        changes["adapter.start_sequences"] = 20
    status, output = tune(dense, tmp_path / "whole", **changes)
    assert status == 0, output
    found = losses(tmp_path / "whole")
    assert np.mean(found[-5:]) < np.mean(found[:5])
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "30")
    status, output = tune(dense, tmp_path / "parts", **changes)
    assert status == 0, output
    assert losses(tmp_path / "parts") == found


@pytest.mark.slow
def test_lora_sb_starts_from_the_gradient_of_the_text(dense, tmp_path):
    changes = {"method": "lowrank", "exact_every": 500, "exact_method": "graph"}
    changes |= {"adapter.kind": "lora_sb", "adapter.start_sequences": 10}
    status, output = tune(dense, tmp_path / "tuned", **changes)
    assert status == 0, output
    assert "lora_sb adapters start from the mean gradient of 16 sequences" in output
    _, _, state = load_state(tmp_path / "tuned")
    config, _, before = load_state(dense[0])
    # The gradient of the first two batches, in the dense run.
    corpus = load_corpus(
        config.data,
        config.sequence_length,
        load_tokenizer(config.data.tokenizer, config.data.eos_id, config.data.pad_id),
    )
    sizes = {"batch_size": config.batch_size, "sequence_length": config.sequence_length}
    rows = train_iterator(config.data, corpus, **sizes, seed=config.seed, rows=range(8))
    loss_and_gradient = jax.jit(make_program(config).loss_and_gradient)
    G = 0.0
    for _ in range(2):
        row = next(rows)
        _, grads = loss_and_gradient(before.params, {}, to_batch(row["tokens"], row["mask"]))
        G = G + np.asarray(grads["blocks"]["mlp"]["down"]["W"])
    fixed = state.fixed["blocks"]["mlp"]["down"]["adapter"]
    for layer in range(len(G)):
        # The spaces hold as much of the signs as the best ones do.
        D, B, A = np.sign(G[layer]), fixed["B"][layer], fixed["A"][layer]
        best = np.linalg.norm(np.linalg.svd(D, compute_uv=False)[:4])
        np.testing.assert_allclose(np.linalg.norm(B.T @ D @ A.T), best, rtol=0.01)


def test_lora_plus_moves_B_faster():
    params = {"q": {"B": jnp.ones((6, 2)), "A": jnp.ones((2, 4))}, "norm": jnp.ones(3)}
    grads = jax.tree.map(jnp.ones_like, params)

    def first_step(**options):
        config = Config(method="lowrank", warmup_steps=0, method_options=MethodOptions(options))
        tx = make_optimizer(config)
        return tx.update(grads, tx.init(params), params)[0]

    plain, plus = first_step(), first_step(b_ratio=16.0)
    chex.assert_trees_all_close(plus["q"]["B"], 16 * plain["q"]["B"], rtol=1e-6)
    chex.assert_trees_all_equal(plus["q"]["A"], plain["q"]["A"])
    chex.assert_trees_all_equal(plus["norm"], plain["norm"])


@pytest.mark.slow
def test_the_fine_tuning_config_takes_network_and_tokenizer_from_a_run(dense, tmp_path):
    run, source = dense
    fields = {"init_from": run, "data.source": source, "steps": 2, "batch_size": 4}
    fields |= {"sequence_length": 32, "warmup_steps": 1, "eval_every": 2, "tensorboard": False}
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    config = f"--config={runs.ROOT}/configs/finetune_llama.py"
    status, output = runs.run(config, f"--workdir={tmp_path / 'run'}", *flags)
    assert status == 0, output
    tuned, there = load_run(tmp_path / "run").config, load_run(run).config
    assert tuned.model.num_layers == there.model.num_layers
    assert tuned.data.tokenizer == there.data.tokenizer
    status, output = runs.run(config, f"--workdir={tmp_path / 'none'}")
    assert status == 1
    assert "config.data.tokenizer = 'init_from' needs a directory in config.init_from" in output
