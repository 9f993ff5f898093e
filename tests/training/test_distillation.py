"""Distillation: its terms by their definitions, its steps, its runs, and what is refused."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loro_jax.compress import compress
from loro_jax.errors import TrainingError
from loro_jax.memory import count_bytes
from loro_jax.planning.plan import make_plan
from loro_jax.text.config import DataConfig
from loro_jax.text.tokenizers.tokenizer import load_tokenizer
from loro_jax.training.config import AdapterConfig, Config, DistillationConfig
from loro_jax.training.distillation import (
    layer_outputs,
    next_token_and_features,
    pair_penalty,
    teacher_config,
)
from loro_jax.training.glue_config import GlueRun
from loro_jax.training.loop import train
from loro_jax.training.mesh import make_mesh
from loro_jax.training.report import final_report
from loro_jax.training.step import compile_program, make_program
from loro_jax.training.teacher import check_teacher, load_teacher
from models import Batch, next_token_loss, preset
from models.crossing import nothing_below
from models.huggingface import read_model, write_model
from models.llama import Llama
from tests.helpers import run_module

MODEL = preset("tiny", vocab_size=264)
DENSE = dataclasses.replace(MODEL.dense(), tie_embeddings=True)
BOTH = DistillationConfig("unread", features=1.0, penalty=0.5, tolerance=0.01)


def config(distillation=BOTH, **changes):
    fields = {
        "method": "lowrank",
        "batch_size": 4,
        "sequence_length": 16,
        "steps": 60,
        "warmup_steps": 0,
        "learning_rate": 1e-3,
        "model": MODEL,
        "distillation": distillation,
    }
    return Config(**{**fields, **changes})


def batch(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, 260, (4, 17)).astype(np.int32)
    mask = (np.arange(16) < rng.integers(4, 17, (4, 1))).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], mask)


def parameters(model):
    return nnx.to_pure_dict(nnx.state(model))


@pytest.fixture(scope="module")
def teacher():
    return Llama(DENSE, nnx.Rngs(1))


def compiled(run):
    mesh = make_mesh(run.mesh)
    return compile_program(make_program(run, mesh), mesh)[0]


def outputs_by_hand(model, tokens):
    """The output of every block, applied one after another."""
    x = model.embedding[...][tokens]
    graphdef, stacked = nnx.split(model.blocks)
    found = []
    for layer in range(model.config.num_layers):
        block = nnx.merge(graphdef, jax.tree.map(lambda p, layer=layer: p[layer], stacked))
        x, _ = block(x, nothing_below(model.config, x))
        found.append(np.asarray(x, np.float64))
    return found


def test_the_feature_error_is_that_of_the_layers_outputs(teacher):
    student, text = Llama(MODEL, nnx.Rngs(0)), batch()
    features = layer_outputs(teacher, text.inputs)
    loss, error = next_token_and_features(student, text, features)
    pairs = list(
        zip(*(outputs_by_hand(model, text.inputs) for model in (student, teacher)), strict=True)
    )
    assert len(pairs) == 2
    squares = np.mean([np.mean((x - y) ** 2, axis=-1) for x, y in pairs], axis=0)
    np.testing.assert_allclose(error, np.sum(squares * text.mask), rtol=1e-5)
    np.testing.assert_array_equal(loss, next_token_loss(student, text))
    assert float(next_token_and_features(teacher, text, features)[1]) == 0


def pairs_and_weights(seed=0, layers=3, shapes=((6, 9), (9, 6)), rank=2):
    rng = np.random.default_rng(seed)
    params, weights = {"norm": jnp.ones(4)}, {"norm": jnp.ones(4)}
    for number, (m, n) in enumerate(shapes):
        sides = ((layers, m, rank), (layers, rank, n))
        B, A = (jnp.asarray(rng.normal(size=side)) for side in sides)
        params[f"p{number}"] = {"B": B, "A": A}
        weights[f"p{number}"] = {"W": B @ A + jnp.asarray(rng.normal(size=(layers, m, n)))}
    return params | {"head": {"W": jnp.ones((2, 2))}}, weights


def test_the_penalty_and_its_gradient_are_those_of_the_largest_differences(x64):
    params, weights = pairs_and_weights()

    def by_definition(params):
        terms = []
        for name in ("p0", "p1"):
            difference = params[name]["B"] @ params[name]["A"] - weights[name]["W"]
            terms.append((jnp.abs(difference).max((1, 2)) - 0.3) ** 2)
        return jnp.mean(jnp.concatenate(terms))

    found = jax.value_and_grad(pair_penalty)(params, weights, 0.3)
    expected = jax.value_and_grad(by_definition)(params)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("tolerance", [0.0, 0.1])
def test_the_penalty_is_zero_at_equality_and_within_the_tolerance(x64, tolerance):
    params, _ = pairs_and_weights()
    equal = {
        name: {"W": pair["B"] @ pair["A"] + 0.99 * tolerance}
        for name, pair in params.items()
        if name.startswith("p")
    }
    value, grads = jax.value_and_grad(pair_penalty)(params, equal, tolerance)
    assert float(value) < 1e-25
    assert all(float(jnp.abs(leaf).max()) < 1e-12 for leaf in jax.tree.leaves(grads))


@pytest.fixture(scope="module")
def stepped(teacher):
    """Five steps with both terms, by the compiled program, on one batch."""
    program = compiled(config())
    held = parameters(teacher)
    state, rows = program.init(), []
    for _ in range(5):
        state, metrics = program.train_step(state, batch(), held)
        rows.append({name: float(value) for name, value in metrics.items()})
    return program, held, rows


def test_a_step_lowers_the_feature_error_and_the_rest(stepped):
    _, _, rows = stepped
    for name in ("loss", "feature_error", "pair_error"):
        assert rows[1][name] < rows[0][name], name
    assert rows[4]["feature_error"] < 0.9 * rows[0]["feature_error"]


def test_the_terms_are_reported_without_weights_and_the_loss_alone(stepped, teacher):
    _, _, rows = stepped
    student, text = Llama(MODEL, nnx.Rngs(0)), batch()
    features = layer_outputs(teacher, text.inputs)
    loss, error = next_token_and_features(student, text, features)
    tokens = np.sum(text.mask)
    np.testing.assert_allclose(rows[0]["loss"], loss / tokens, rtol=1e-5)
    np.testing.assert_allclose(rows[0]["feature_error"], error / tokens, rtol=1e-5)
    penalty = pair_penalty(parameters(student), parameters(teacher), 0.01)
    np.testing.assert_allclose(rows[0]["pair_error"], penalty, rtol=1e-5)


def test_the_step_compiles_once_and_keeps_the_teacher(stepped, teacher):
    program, held, _ = stepped
    assert program.train_step._cache_size() == 1
    for mine, original in zip(
        jax.tree.leaves(held), jax.tree.leaves(parameters(teacher)), strict=True
    ):
        assert not mine.is_deleted()
        np.testing.assert_array_equal(mine, original)


@pytest.mark.slow
def test_micro_batches_have_the_gradient_of_the_whole(stepped, teacher):
    _, held, rows = stepped
    program = compiled(config(gradient_accumulation=2))
    _, metrics = program.train_step(program.init(), batch(), held)
    for name in ("loss", "feature_error", "pair_error", "grad_norm", "update_norm"):
        np.testing.assert_allclose(metrics[name], rows[0][name], rtol=1e-4, err_msg=name)


@pytest.mark.slow
def test_bfloat16_and_rematerialisation(teacher):
    model = dataclasses.replace(MODEL, dtype="bfloat16", param_dtype="bfloat16", remat="full")
    program = compiled(config(model=model, learning_rate=5e-3))
    held = jax.tree.map(lambda x: x.astype(jnp.bfloat16), parameters(teacher))
    state, errors = program.init(), []
    for _ in range(6):
        state, metrics = program.train_step(state, batch(), held)
        errors.append(float(metrics["feature_error"]))
    assert errors[-1] < errors[0]
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(state.params))
    assert program.train_step._cache_size() == 1


def test_without_a_teacher_nothing_is_added():
    program = make_program(config(DistillationConfig()))
    assert program.teacher is None
    state = jax.eval_shape(program.init)
    _, metrics = jax.eval_shape(program.train_step, state, batch())
    assert not {"feature_error", "pair_error"} & metrics.keys()


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A dense model, its pairs by an SVD, and a text."""
    folder = tmp_path_factory.mktemp("healing")
    dense = Llama(MODEL.dense(), nnx.Rngs(1))
    files = load_tokenizer("bytes").files()
    ids = {"eos_token_id": 1, "pad_token_id": 0}
    write_model(dense, folder / "dense", files=files, token_ids=ids)
    pairs = compress(dense, "svd", rank=8).model
    write_model(pairs, folder / "pairs", keep_factors=True, files=files, token_ids=ids)
    words = "\n\n".join(
        f"The {word} of the sea is number {i}." for i, word in enumerate("abcd" * 9)
    )
    (folder / "text.txt").write_text(words)
    return folder


def healing(directories, **distillation):
    settings = {"teacher": str(directories / "dense"), "features": 1.0, **distillation}
    data = DataConfig(str(directories / "text.txt"), tokenizer="bytes", max_eval_sequences=4)
    return config(
        DistillationConfig(**settings),
        init_from=str(directories / "pairs"),
        steps=4,
        batch_size=2,
        log_every=1,
        checkpoint_every=2,
        tensorboard=False,
        data=data,
    )


def rows_of(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    timed = ("tokens_per_second", "data_wait")
    return [
        {name: value for name, value in json.loads(line).items() if name not in timed}
        for line in lines
    ]


@pytest.mark.slow
def test_a_compressed_model_heals_and_a_resumed_run_is_the_same(directories, tmp_path, capsys):
    run = healing(directories, penalty=0.1)
    train(run, str(tmp_path / "run"))
    assert "distilled from " in capsys.readouterr().out
    rows = rows_of(tmp_path / "run")
    errors = [row["feature_error"] for row in rows if "feature_error" in row]
    assert len(errors) == 4
    assert all("pair_error" in row for row in rows if "loss" in row)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    train(run, str(tmp_path / "again"))
    assert "from step 2" in capsys.readouterr().out
    assert rows_of(tmp_path / "again") == rows
    with pytest.raises(TrainingError, match=r"distillation\.features: 1\.0 there, 2.0 now"):
        train(healing(directories, features=2.0, penalty=0.1), str(tmp_path / "run"))
    # A run as the teacher of another: its product is the teacher's weight.
    of_run = healing(directories, teacher=str(tmp_path / "run"), penalty=0.1)
    check_teacher(of_run)
    (held,), _ = load_teacher(of_run, make_mesh(of_run.mesh))
    assert held["blocks"]["mlp"]["up"]["W"].shape == (2, *MODEL.shapes("mlp")["up"])
    assert "head" not in held


def test_a_teacher_is_read_from_files_in_the_dtype_of_the_run(directories):
    run = healing(directories)
    run = dataclasses.replace(run, model=dataclasses.replace(MODEL, param_dtype="bfloat16"))
    check_teacher(run)
    (held,), lines = load_teacher(run, make_mesh(run.mesh))
    stored = read_model(directories / "dense")[0].blocks.attention.q.W[...]
    W = held["blocks"]["attention"]["q"]["W"]
    np.testing.assert_array_equal(W, stored.astype(jnp.bfloat16))
    assert len(lines) == 1


def test_the_teacher_is_dense_whatever_the_run_trains():
    run = config(model=dataclasses.replace(MODEL, projection="cola", remat="full"), method="loro")
    found = teacher_config(run)
    assert (found.scope, found.remat, found.tie_embeddings) == ("none", "none", True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"distillation": DistillationConfig(features=1.0)},
            r"distillation.features = 1.0 needs a directory in config.distillation.teacher",
        ),
        (
            {"distillation": DistillationConfig("dir")},
            r"distillation.teacher = 'dir' has no effect: .* expected one of them above 0",
        ),
        (
            {"distillation": DistillationConfig("dir", features=-1.0)},
            r"distillation.features must be at least 0, but is -1.0",
        ),
        ({"method": "full"}, r"distillation.penalty = 0.5: .*method 'full', has no pairs"),
        ({"method": "cola"}, r"distillation.penalty = 0.5: .*method 'cola', has no pairs"),
        (
            {"model": dataclasses.replace(MODEL, ranks="q=0,k=0,v=0,o=0,gate=0,up=0,down=0")},
            r"distillation.penalty = 0.5: .* no pairs",
        ),
        ({"adapter": AdapterConfig(kind="lora")}, r"distillation.penalty = 0.5: .* no pairs"),
    ],
)
def test_what_can_not_be_distilled_is_named(changes, message):
    with pytest.raises(TrainingError, match=f"^config.{message}") as error:
        config(**changes).validate()
    assert "\n" not in str(error.value)
    config(DistillationConfig("dir", features=1.0), method="full").validate()


def test_classifiers_have_no_teacher():
    with pytest.raises(
        TrainingError, match=r"distillation\.teacher = 'dir' is for language models"
    ):
        GlueRun(method="full", distillation=DistillationConfig("dir", features=1.0)).validate()


def test_teachers_that_do_not_fit_are_named_before_anything_is_written(directories, tmp_path):
    other = Llama(dataclasses.replace(DENSE, hidden_size=64), nnx.Rngs(0))
    write_model(other, tmp_path / "wide")
    vocabulary = Llama(dataclasses.replace(DENSE, vocab_size=300), nnx.Rngs(0))
    write_model(vocabulary, tmp_path / "words")
    (tmp_path / "empty").mkdir()
    for source, message in (
        (tmp_path / "none", "none"),
        (tmp_path / "empty", "config.json"),
        (tmp_path / "wide", "has hidden_size = 64; expected that of this run, 32"),
        (tmp_path / "words", "has vocab_size = 300; expected that of this run, 264"),
        (directories / "pairs", "q_proj is stored as A, B; expected weight"),
    ):
        run = healing(directories, teacher=str(source))
        with pytest.raises(TrainingError, match=r"^config\.distillation\.teacher") as error:
            train(run, str(tmp_path / "run"))
        assert message in str(error.value)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_plan_counts_the_teacher():
    plans = [make_plan(config(one), 1) for one in (BOTH, DistillationConfig())]
    assert plans[0].state_bytes - plans[1].state_bytes == bytes_of_a_teacher()


def test_the_report_counts_the_teacher():
    with_one, without = (
        final_report(config(one), 9.0, None, "runs/x", "python train.py")
        for one in (BOTH, DistillationConfig())
    )
    (added,) = set(with_one) - set(without)
    assert added == f"its teacher, while it trains: {bytes_of_a_teacher() / 1e6:.1f} MB more"


def bytes_of_a_teacher():
    return count_bytes(nnx.state(nnx.eval_shape(lambda: Llama(DENSE, nnx.Rngs(0)))))


@pytest.mark.slow
def test_the_teacher_is_sharded_as_a_dense_model():
    rows = {row["mesh"]: row for row in run_module("tests.training.eight_devices_teacher")}
    one, several = rows["1x1x1"], rows["2x2x2"]
    for name in ("loss", "feature_error", "pair_error"):
        np.testing.assert_allclose(several[name], one[name], rtol=1e-3, err_msg=name)
    assert one["loss"][-1] < one["loss"][0]
    # Of eight devices, four share each matrix.
    assert several["teacher_bytes"] < 0.3 * one["teacher_bytes"]
