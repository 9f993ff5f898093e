import dataclasses
import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest

from loro_jax.errors import TrainingError
from loro_jax.memory import count_parameters
from loro_jax.training.config import Config
from loro_jax.training.config_differences import differences, field_names
from loro_jax.training.mesh import make_mesh
from loro_jax.training.methods import METHODS, make_schedule
from loro_jax.training.step import compile_program, make_program
from models import Batch, LlamaConfig
from tests.helpers import some_fast

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
FILES = (path.relative_to(CONFIGS).with_suffix("") for path in CONFIGS.rglob("*.py"))
RUNS = sorted(path.as_posix() for path in FILES if path.name not in ("paper", "__init__"))

# What the paper says of each run: (steps, warm-up, rank, learning rate, K).
PAPER = {
    "llama_60m": (10_000, 1_000, 128, 0.01, 500),
    "llama_130m": (20_000, 2_000, 256, 0.01, 500),
    "llama_350m": (60_000, 6_000, 256, 0.01, 500),
    "llama_1b": (100_000, 10_000, 512, 0.005, 200),
}


# The examples of other methods' repositories, in the words of their scripts.
EXAMPLES = {
    "peers/galore_60m": {"galore_scale": 0.25},
    "peers/fira_60m": {"alpha": 0.25, "gamma": 1.01},
}


def load(name):
    spec = importlib.util.spec_from_file_location(pathlib.Path(name).name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def test_every_run_of_the_paper_has_its_config():
    assert {"default", "tiny", *PAPER, *EXAMPLES} <= set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_every_config_is_valid_and_makes_json(name):
    config = load(name)
    if config.model.num_layers == 0:  # those of init_from, which a user names
        config.model.num_layers = 1
    config.validate()
    assert json.loads(config.to_json())["model"]["rank"] == config.model.rank


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_settings(name):
    config = load(name)
    found = (
        config.steps,
        config.warmup_steps,
        config.model.rank,
        config.learning_rate,
        config.exact_every,
    )
    assert found == PAPER[name]
    assert config.batch_size == 512
    assert config.sequence_length == 256
    assert config.batch_size * config.sequence_length == 131_072


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_settings_of_the_examples(name):
    """Of the scripts for 60M in the authors' repositories, and their programs' defaults."""
    config, own = load(name), dict(EXAMPLES[name])
    script = {
        "optimizer": f"{config.method}_adamw",
        "lr": config.learning_rate,
        "rank": config.model.rank,
        "update_proj_gap": config.exact_every,
        "batch_size": config.batch_size // config.gradient_accumulation,
        "total_batch_size": config.batch_size,
        "max_length": config.sequence_length,
        "num_training_steps": config.steps,
        "warmup_steps": config.warmup_steps,
        "min_lr_ratio": config.final_lr_ratio,
        "weight_decay": config.weight_decay,
        "grad_clipping": config.clip_norm,
        "dtype": config.model.param_dtype,
        "eval_every": config.eval_every,
        "vocab_size": config.model.vocab_size,
    }
    assert script == {
        "optimizer": name.removeprefix("peers/").replace("60m", "adamw"),
        "lr": 0.01,
        "rank": 128,
        "update_proj_gap": 200,
        "batch_size": 256,
        "total_batch_size": 512,
        "max_length": 256,
        "num_training_steps": 10_000,
        "warmup_steps": 1_000,
        "min_lr_ratio": 0.1,
        "weight_decay": 0.0,
        "grad_clipping": 0.0,
        "dtype": "bfloat16",
        "eval_every": 1_000,
        "vocab_size": 32_000,
    }
    assert (config.b1, config.b2, config.eps) == (0.9, 0.999, 1e-6)
    assert config.method_options.pop("scale") == own.pop("galore_scale", own.pop("alpha", None))
    assert config.method_options == own
    schedule = make_schedule(config)
    np.testing.assert_allclose([schedule(0), schedule(500)], [0, 0.005], rtol=1e-6)
    assert config.model_config.scope == "none"


def small_batch(config):
    tokens = np.random.default_rng(0).integers(config.model.vocab_size, size=(2, 17))
    tokens = tokens.astype(np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], np.ones((2, 16), np.float32))


# Those of a RoBERTa train in test_glue.py: their batches are of rows.
LANGUAGE = [name for name in RUNS if name != "roberta_glue"]


@pytest.mark.parametrize("name", some_fast(LANGUAGE, ("tiny", "llama_1b")))
def test_every_config_takes_a_step_on_a_small_batch(name):
    """With two layers. The large ones are traced: they differ from the smallest in sizes alone."""
    config = load(name)
    vocab_size = config.model.vocab_size or 2048  # 0: the tokenizer's, here the embedded one's
    model = dataclasses.replace(config.model, num_layers=2, vocab_size=vocab_size)
    # svd: the quickest to compile; the others are tested on all shapes of pairs elsewhere.
    config = dataclasses.replace(
        config,
        batch_size=2,
        gradient_accumulation=1,
        sequence_length=16,
        exact_method="svd",
        model=model,
    )
    program = make_program(config)
    if name not in ("default", "tiny"):
        state, metrics = jax.eval_shape(
            program.train_step, jax.eval_shape(program.init), small_batch(config)
        )
        assert metrics["loss"].shape == ()
        # Two layers, for the most part embedding and head; the examples' projections are dense.
        least = {"llama_7b": 4e8, "llama_60m": 3.2e7}.get(name, 3.9e7)
        assert count_parameters((state.params, state.fixed)) > least
        return
    program, _ = compile_program(program, make_mesh(config.mesh))
    state, metrics = program.train_step(program.init(), small_batch(config))
    np.testing.assert_allclose(metrics["loss"], np.log(config.model.vocab_size), rtol=0.05)
    assert np.isfinite(metrics["update_norm"])
    assert int(state.step) == 1
    jax.tree.map(lambda leaf: leaf.delete(), state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "sgd"}, "config.method must be one of loro, lowrank, .*full, but is 'sgd'"),
        ({"steps": 0}, "config.steps must be at least 1, but is 0"),
        *(
            ({"exact_every": 0, "method": method}, f'at least 1 with config.method = "{method}"')
            for method, entry in METHODS.items()
            if entry.periodic
        ),
        (
            {"method": "relora", "exact_every": 4},
            'restart_warmup_steps must be at most exact_every = 4 with config.method = "relora"',
        ),
        ({"direction": "muon"}, "config.direction must be one of adam, orthogonal, but is"),
        ({"direction": "tangent"}, "config.direction must be one of adam, orthogonal, but is"),
        (
            {"method": "spectron", "method_options": {"momentum": 1.0}},
            "config.method_options.momentum must be at least 0 and below 1, but is 1.0",
        ),
        ({"exact_every": -1}, "config.exact_every must be at least 0"),
        ({"learning_rate": -0.1}, "config.learning_rate must be above 0"),
        ({"learning_rate": float("nan")}, "config.learning_rate"),
        ({"b2": 1.0}, "config.b2 must be at least 0 and below 1"),
        ({"eps": 0.0}, "config.eps must be above 0"),
        ({"lr_scale": 0.0}, "config.lr_scale must be above 0"),
        ({"warmup_steps": 20_000}, "config.warmup_steps must be at most steps = 10000"),
        ({"steps": 20}, "but is 1000; say --config.warmup_steps=2, a tenth of the steps"),
        ({"seed": -1}, "config.seed must be between 0 and 4294967295, but is -1"),
        ({"seed": 2**32}, "config.seed must be between 0 and 4294967295"),
        ({"moments": "some"}, "config.moments must be one of auto, reset, reset_factors"),
        ({"steps": "many"}, "config.steps must be a whole number, at least 1, but is 'many'"),
        ({"model": LlamaConfig(initialiser="spectral")}, "config.model.initialiser must be one of"),
        ({"basis": "svd"}, "config.basis must be one of singular, nearest, but is .svd."),
        ({"batch_size": 10, "gradient_accumulation": 3}, "multiple of"),
        ({"sequence_length": 2048}, r"config.sequence_length = 2048 .* = 1024"),
        ({"model": LlamaConfig(rank=513)}, "config.model.attn_rank .* but is 513"),
        ({"model": LlamaConfig(scope="none")}, "needs factors"),
        ({"model": LlamaConfig(projection="cola")}, "config.exact_every = 500.* expected 0 "),
        ({"model": LlamaConfig(projection="lost")}, 'projection = "lost".* expected 0 '),
        ({"model": LlamaConfig(lost_gamma=1.5)}, "config.model.lost_gamma must be between 0 and 1"),
        ({"model": LlamaConfig(lost_channels=0.0)}, "config.model.lost_channels must be above 0"),
    ],
)
def test_bad_values_are_named_with_what_was_expected(changes, message):
    with pytest.raises(TrainingError, match=message):
        dataclasses.replace(Config(), **changes).validate()


def test_the_dense_twin_needs_no_rank():
    config = Config(method="full", model=LlamaConfig(rank=10_000))
    config.validate()
    assert config.model_config.scope == "none"


@pytest.mark.parametrize(
    ("kind", "exact_every"), [("cola", 0), ("lost", 0), ("sltrain", 500), ("scaffold", 500)]
)
def test_loro_also_trains_projections_of_other_kinds(kind, exact_every):
    config = Config(exact_every=exact_every, model=LlamaConfig(projection=kind))
    config.validate()
    assert config.model_config.projection == kind
    other = Config(method="lowrank", model=LlamaConfig(projection=kind))
    other.validate()
    assert other.model_config.projection == "low_rank"


def test_differences_name_fields_that_matter():
    stored = json.loads(Config().to_json())
    changed = dataclasses.replace(Config(), seed=1, keep_checkpoints=9, model=LlamaConfig(rank=64))
    found = differences(stored, changed)
    assert found == ["model.rank: 128 there, 64 now", "seed: 0 there, 1 now"]


def test_fields_that_others_rely_on_have_their_names():
    expected = {
        "steps",
        "seed",
        "batch_size",
        "sequence_length",
        "learning_rate",
        "method",
        "exact_every",
        "eval_every",
        "checkpoint_every",
        "data.source",
        "data.tokenizer",
        "mesh.data",
        "mesh.fsdp",
        "mesh.tensor",
    }
    assert expected <= set(field_names())
