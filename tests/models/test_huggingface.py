"""Directories of Hugging Face's format: what is written is read, here and by transformers."""

import dataclasses
import json
import resource
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from models import Llama, preset
from models.huggingface import CheckpointError, read_model, write_model
from models.rope import RopeScaling
from tests.helpers import outputs

CONFIG = preset("tiny", num_layers=3, max_sequence_length=64)
KINDS = ("low_rank", "cola", "lora", "switchlora", "sltrain", "lost", "scaffold")


def make(seed=0, **changes):
    """A model whose every array is far from its initial value, as after training."""
    model = Llama(dataclasses.replace(CONFIG, **changes), nnx.Rngs(seed))
    graphdef, state = nnx.split(model)
    rng = np.random.default_rng(seed)

    def stir(x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return (x + rng.normal(scale=0.1, size=x.shape)).astype(x.dtype)

    return nnx.merge(graphdef, jax.tree.map(stir, state))


def assert_same(one, other):
    one, other = (nnx.to_pure_dict(nnx.state(model)) for model in (one, other))
    chex.assert_trees_all_equal(one, other, strict=True)


TOKENS = jnp.array(np.random.default_rng(0).integers(CONFIG.vocab_size, size=(2, 40)))


@pytest.mark.parametrize(
    "kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sst", "osft"))]
)
def test_factors_come_back_bit_for_bit(kind, tmp_path):
    model = make(projection=kind)
    write_model(model, tmp_path / "out", keep_factors=True)
    again, errors = read_model(tmp_path / "out")
    assert not errors
    assert again.config == model.config
    assert_same(model, again)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scope": "attn"},
        {"scope": "mlp", "tie_embeddings": True, "num_kv_heads": 2, "head_dim": 12},
        {"projection": "lora"},
        {"projection": "switchlora"},
        {"projection": "sltrain"},
        pytest.param({"projection": "sst"}, marks=pytest.mark.slow),
        pytest.param({"projection": "osft"}, marks=pytest.mark.slow),
        {"scope": "none", "rope_scaling": RopeScaling("llama3", 8.0, original_length=16)},
    ],
)
def test_merged_projections_compute_the_same(changes, tmp_path):
    model = make(**changes)
    write_model(model, tmp_path / "out")
    again, _ = read_model(tmp_path / "out")
    assert again.config.scope == "none"
    expected = outputs(model, TOKENS)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(again(TOKENS), expected, atol=1e-4)
    # What needs no merging is the same to the last bit.
    for name in ("embedding", "norm"):
        one, other = (nnx.to_pure_dict(nnx.state(m))[name] for m in (model, again))
        chex.assert_trees_all_equal(one, other)


@pytest.mark.parametrize("kind", ["cola", "lost"])
def test_projections_with_an_activation_can_not_be_merged(kind, tmp_path):
    with pytest.raises(CheckpointError, match="--keep_factors"):
        write_model(make(projection=kind), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_of_the_files(dtype, tmp_path):
    model = make(param_dtype=dtype, dtype=dtype)
    size = write_model(model, tmp_path / "out", dtype=dtype, keep_factors=True)
    assert size == sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    again, _ = read_model(tmp_path / "out")
    assert_same(model, again)
    wider, _ = read_model(tmp_path / "out", dtype="float32")
    np.testing.assert_array_equal(wider.embedding[...], model.embedding[...].astype(jnp.float32))


def test_large_models_are_split_and_read_again(tmp_path):
    model = make()
    write_model(model, tmp_path / "out", keep_factors=True, shard_bytes=20_000)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(names) > 3
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == names
    assert_same(model, read_model(tmp_path / "out")[0])


def test_a_dense_model_is_factorised_by_the_best_approximation(tmp_path):
    model = make(scope="none")
    write_model(model, tmp_path / "out")
    small, errors = read_model(tmp_path / "out", rank=5)
    assert len(errors) == 3 * 7
    found = {error.name: error for error in errors}["model.layers.2.mlp.down_proj"]
    W = np.asarray(model.blocks.mlp.down.W[...][2], np.float64)
    U, s, Vt = np.linalg.svd(W)
    assert found.error == pytest.approx(np.sqrt(np.sum(s[5:] ** 2) / np.sum(s**2)), rel=1e-4)
    B, A = (np.asarray(x[...][2]) for x in (small.blocks.mlp.down.B, small.blocks.mlp.down.A))
    np.testing.assert_allclose(B @ A, (U[:, :5] * s[:5]) @ Vt[:5], atol=1e-5)
    np.testing.assert_allclose(B.T @ B, A @ A.T, atol=1e-5)
    full, _ = read_model(tmp_path / "out", rank=32)
    np.testing.assert_allclose(outputs(full, TOKENS), outputs(model, TOKENS), atol=1e-3)


def edit_config(path, **changes):
    content = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(content))


def drop(path, name):
    tensors = load_file(path / "model.safetensors")
    del tensors[name]
    save_file(tensors, path / "model.safetensors")


def add(path, name, value):
    save_file(load_file(path / "model.safetensors") | {name: value}, path / "model.safetensors")


BAD = {
    "a cut file": (
        lambda p: (p / "model.safetensors").write_bytes(
            (p / "model.safetensors").read_bytes()[:-5]
        ),
        "model.safetensors can't be read as safetensors",
    ),
    "a missing tensor": (
        lambda p: drop(p, "model.layers.1.mlp.up_proj.weight"),
        r"model\.layers\.1\.mlp\.up_proj\.weight is missing\.",
    ),
    "a tensor too many": (
        lambda p: add(p, "model.layers.1.mlp.up_proj.bias", np.zeros(3, np.float32)),
        r"up_proj\.bias is not expected\.",
    ),
    "a wrong shape": (
        lambda p: add(p, "model.norm.weight", np.zeros(31, np.float32)),
        r"model\.norm\.weight has shape \(31,\); config\.json requires \(32,\)",
    ),
    "another architecture": (
        lambda p: edit_config(p, model_type="gpt2"),
        "model_type = 'gpt2'; expected \"llama\"",
    ),
    "biases": (
        lambda p: edit_config(p, attention_bias=True),
        "attention_bias = True is not supported; expected False",
    ),
    "an unknown field": (
        lambda p: edit_config(p, residual_multiplier=0.22),
        r"residual_multiplier = 0\.22 is not supported",
    ),
    "another rotary scaling": (
        lambda p: edit_config(p, rope_parameters={"rope_type": "yarn", "factor": 2.0}),
        "rope_type = 'yarn' is not supported",
    ),
    "a size that is missing": (
        lambda p: edit_config(p, hidden_size=None),
        "hidden_size is missing",
    ),
    "sizes that do not fit": (
        lambda p: edit_config(p, num_key_value_heads=3),
        r"num_kv_heads = 3 must divide",
    ),
    "no config": (lambda p: (p / "config.json").unlink(), r"config\.json is missing"),
    "a config that is no JSON": (
        lambda p: (p / "config.json").write_text("{"),
        r"config\.json can't be read as JSON",
    ),
    "no tensors": (
        lambda p: (p / "model.safetensors").unlink(),
        r"holds no model: expected model\.safetensors",
    ),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "out"
    write_model(make(), path)
    return path


@pytest.mark.parametrize("case", BAD)
def test_bad_directories_are_named(case, exported, tmp_path):
    path = tmp_path / "copy"
    path.mkdir()
    for file in exported.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    damage, message = BAD[case]
    damage(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_model(path)
    assert "\n" not in str(caught.value)


def test_a_rank_that_does_not_fit(exported, tmp_path):
    with pytest.raises(CheckpointError, match=r"rank 33 does not fit .* between 1 and 32"):
        read_model(exported, rank=33)
    write_model(make(), tmp_path / "factored", keep_factors=True)
    with pytest.raises(CheckpointError, match="the projections are factored"):
        read_model(tmp_path / "factored", rank=4)


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path):
    model = make()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("important")
    with pytest.raises(CheckpointError, match="exists already"):
        write_model(model, tmp_path / "out")
    with pytest.raises(CheckpointError, match="dtype must be one of"):
        write_model(model, tmp_path / "other", dtype="int8")
    with pytest.raises(TypeError):
        write_model(model, tmp_path / "other", files={"tokenizer.json": "not bytes"})
    # Beyond this size of a file the system refuses to write, as on a full disk.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="other can't be written"):
            write_model(model, tmp_path / "other")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_older_and_newer_configs_say_the_same(exported, tmp_path):
    content = json.loads((exported / "config.json").read_text())
    scaling = {"type": "linear", "factor": 2.0}
    for i, change in enumerate(
        (
            {"rope_theta": 5e5, "rope_scaling": scaling, "rope_parameters": None},
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}},
        )
    ):
        path = tmp_path / str(i)
        path.mkdir()
        (path / "model.safetensors").symlink_to(exported / "model.safetensors")
        (path / "config.json").write_text(json.dumps(content | change))
        config = read_model(path)[0].config
        assert (config.rope_theta, config.rope_scaling) == (5e5, RopeScaling("linear", 2.0))


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 500_000.0},
        {"num_kv_heads": 2},
        {"num_kv_heads": 1, "head_dim": 24, "tie_embeddings": True},
        {"rope_scaling": RopeScaling("linear", 4.0)},
        {"rope_scaling": RopeScaling("llama3", 8.0, original_length=16)},
        {"scope": "none"},
    ],
)
def test_transformers_computes_our_logits_and_writes_what_we_read(changes, tmp_path):
    torch = pytest.importorskip("torch", reason="the counterpart needs torch")
    transformers = pytest.importorskip("transformers", reason="the counterpart needs transformers")
    model = make(**changes)
    write_model(model, tmp_path / "out", shard_bytes=60_000)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        logits = theirs(torch.tensor(np.asarray(TOKENS))).logits.numpy()
    assert np.std(logits) > 0.5
    np.testing.assert_allclose(logits, outputs(model, TOKENS), atol=1e-4)
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    ours, _ = read_model(tmp_path / "theirs")
    assert ours.config.param_dtype == "bfloat16"
    kept = ("num_kv_heads", "head_dim", "rope_theta", "rope_scaling", "tie_embeddings")
    for name in kept:
        assert getattr(ours.config, name) == getattr(model.config, name)
    np.testing.assert_array_equal(
        np.asarray(ours.blocks.mlp.up.W[...][1], np.float32),
        theirs.model.layers[1].mlp.up_proj.weight.detach().float().numpy(),
    )
