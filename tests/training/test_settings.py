"""Settings by name: what they change, and that the recommended ones deserve it."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import pytest

from loro_jax import LowRank, initialise
from loro_jax.commands.arms import load_config
from loro_jax.errors import TrainingError
from loro_jax.training.config import Config
from loro_jax.training.config_differences import differences
from loro_jax.training.loop import train
from loro_jax.training.methods import METHODS, make_optimizer
from loro_jax.training.settings import SETTINGS
from tests.training.runs import ROOT

PAPER = ("llama_60m", "llama_130m", "llama_350m", "llama_1b")
SMALL = (
    "steps=60",
    "batch_size=8",
    "sequence_length=64",
    "warmup_steps=6",
    "eval_every=60",
    "checkpoint_every=60",
    "tensorboard=false",
    "exact_method=svd",  # the quickest to compile
    "data.max_eval_sequences=64",
    "model.hidden_size=64",
    "model.intermediate_size=96",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.rank=16",
)


def load(name, settings="", changes=()):
    return load_config(f"{ROOT}/configs/{name}.py{settings and ':'}{settings}", changes)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", ["default", "tiny", *PAPER, "llama_7b"])
def test_they_change_no_more_than_the_optimizer_and_the_projections(name, settings):
    config = load(name, settings)
    config.validate()
    found = {line.split(":")[0] for line in differences(json.loads(config.to_json()), load(name))}
    exact = {"exact_every", "basis", "moments", "restart_warmup_steps"}
    scaffold = {"method_options.row_moment", "model.cross_layer"} if settings == "scaffold" else ()
    assert found <= {"direction", "model.initialiser", "model.projection", *exact, *scaffold}


def test_the_default_is_recommended_and_the_papers_runs_are_the_papers():
    for name in ("default", "tiny"):
        assert load(name) == load(name, "recommended") != load(name, "paper")
    assert (load("default").direction, load("default").model.projection) == ("orthogonal", "cola")
    paper = [load(name) for name in PAPER]
    assert paper == [load(name, "paper") for name in PAPER]
    # Parity is what a config has where it says nothing.
    for config in [load("default", "paper"), *paper]:
        for field in ("direction", "moments", "damping", "max_move", "lr_scale", "weight_decay"):
            assert getattr(config, field) == getattr(Config(), field)
        assert config.exact_every >= 100
        assert config.model.initialiser == "xavier"


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_take_them_or_name_what_they_lack(method):
    config = dataclasses.replace(load("default"), method=method)
    if METHODS[method].periodic:
        with pytest.raises(TrainingError, match="exact_every must be at least 1"):
            config.validate()
        config = dataclasses.replace(config, exact_every=100)
    config.validate()


def test_orthogonalised_momentum_has_a_rate_of_its_own():
    params = {"w": LowRank(*initialise(jax.random.key(0), 12, 16, rank=4)), "bias": jnp.zeros(3)}
    gradient = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params)

    def step(**changes):
        tx = make_optimizer(dataclasses.replace(load("default"), **changes))
        return tx.update(gradient, tx.init(params), params)[0]

    chex.assert_trees_all_equal(step(), step(lr_scale=2.4))
    assert jnp.allclose(step()["w"].A, 2.4 * step(lr_scale=1.0)["w"].A, rtol=1e-5)


def test_unknown_ones_are_named_and_so_is_a_file_that_takes_none(tmp_path):
    with pytest.raises(TrainingError, match=r"no settings 'papers'; .* mergeable, paper"):
        load("default", "papers")
    (tmp_path / "mine.py").write_text("def get_config():\n    return 1\n")
    with pytest.raises(TrainingError, match=r"mine.py:paper.*takes 0 positional arguments"):
        load_config(f"{tmp_path}/mine.py:paper", [])


@pytest.mark.slow
def test_the_recommended_ones_are_ahead_on_real_text(tmp_path):
    perplexity = {
        settings: train(
            load("default", settings, SMALL + changes), str(tmp_path / settings)
        ).val_ppl
        for settings, changes in (
            ("paper", ("exact_every=20",)),
            ("recommended", ()),
            ("mergeable", ("exact_every=20",)),
        )
    }
    # 468, 250 and 254 when this was written.
    assert perplexity["recommended"] < 0.7 * perplexity["paper"]
    assert perplexity["mergeable"] < 0.7 * perplexity["paper"]
