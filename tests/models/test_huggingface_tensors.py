"""Tensors as they are found in the wild: which are read, in which form, and which are named."""

import json
import struct

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from models.huggingface import CheckpointError, read_config, read_model, write_model
from models.huggingface.casts import cast
from tests.models.checkpoints import (
    CONFIG,
    EMBEDDING,
    HEAD,
    UP,
    our_logits,
    tensors,
    their_logits,
    write,
)

INDEX = "model.safetensors.index.json"


def up(path, **keywords):
    return np.asarray(read_model(path, **keywords)[0].blocks.mlp.up.W[...][0])


def without(stored, *names):
    return {name: value for name, value in stored.items() if name not in names}


def tied(form):
    """Tensors of a tied model, stored in one of the forms that programs write."""
    stored = tensors()
    if form == "the embedding":
        return without(stored, HEAD)
    if form == "the head":
        return without(stored, EMBEDDING) | {HEAD: stored[EMBEDDING]}
    if form == "both":
        return stored | {HEAD: stored[EMBEDDING]}
    assert form == "the names of a model without a head"
    return {name.removeprefix("model."): value for name, value in without(stored, HEAD).items()}


FORMS = ("the embedding", "the head", "both", "the names of a model without a head")


@pytest.mark.parametrize("form", FORMS)
def test_a_tied_model_is_stored_in_several_ways(form, tmp_path):
    pytest.importorskip("transformers", reason="the counterpart needs transformers")
    path = write(tmp_path / "in", tied(form), tie_word_embeddings=True)
    theirs = their_logits(path)
    assert np.std(theirs) > 0.3
    np.testing.assert_allclose(our_logits(path), theirs, atol=1e-5)


def test_a_tied_model_of_two_matrices_is_named(tmp_path):
    path = write(tmp_path / "in", tensors(), tie_word_embeddings=True)
    for read in (read_model, read_config):
        with pytest.raises(CheckpointError, match=r"lm_head\.weight and .* differ") as caught:
            read(path)
    assert "tie_word_embeddings false" in str(caught.value)
    small = tensors() | {HEAD: tensors()[HEAD][:90]}
    with pytest.raises(CheckpointError, match="differ"):
        read_model(write(path, small, tie_word_embeddings=True))
    # What the message tells to do.
    ours = read_model(write(path, tensors()))[0]
    np.testing.assert_array_equal(ours.head.W[...], tensors()[HEAD])


def test_a_head_that_is_missing_is_named(tmp_path):
    path = write(tmp_path / "in", without(tensors(), HEAD))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        read_model(path)


def test_what_follows_from_the_config_may_be_stored(tmp_path):
    more = {
        "model.rotary_emb.inv_freq": np.ones(4, np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
        "model.layers.0.self_attn.rotary_emb.cos_cached": np.ones((1, 1, 9, 8), np.float32),
    }
    half = {name: value.astype(np.float16) for name, value in tensors().items()}
    path = write(tmp_path / "in", half | more)
    assert read_config(path).param_dtype == "float16"
    np.testing.assert_array_equal(up(path), half[UP])


def shards(path, stored, index, names=("model-00001-of-00002", "model-00002-of-00002")):
    """Two files, each with half of the tensors, and an index; None: the right one."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    ordered = sorted(stored)
    weight_map = {}
    for name, part in zip(names, (ordered[:5], ordered[5:]), strict=True):
        save_file({n: stored[n] for n in part}, path / f"{name}.safetensors")
        weight_map |= dict.fromkeys(part, f"{name}.safetensors")
    right = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (path / INDEX).write_text(index(right) if callable(index) else json.dumps(index or right))
    return path


@pytest.mark.parametrize(
    "index",
    [
        None,
        lambda right: json.dumps(right | {"metadata": None}),
        lambda right: json.dumps({"weight_map": right["weight_map"]}),
        # Names that no file holds, as a tied head's.
        lambda right: json.dumps(
            {"weight_map": right["weight_map"] | {"x": next(iter(right["weight_map"].values()))}}
        ),
    ],
)
def test_an_index_says_where_tensors_are(index, tmp_path):
    path = shards(tmp_path / "in", tensors(), index)
    np.testing.assert_array_equal(up(path), tensors()[UP])


def test_of_two_files_with_a_tensor_the_index_chooses(tmp_path):
    path = shards(tmp_path / "in", tensors(), None)
    index = json.loads((path / INDEX).read_text())["weight_map"]
    (other,) = set(index.values()) - {index[UP]}
    part = {name: value for name, value in tensors().items() if index[name] == other}
    save_file(part | {UP: tensors(seed=1)[UP]}, path / other)
    np.testing.assert_array_equal(up(path), tensors()[UP])


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (lambda right: "", f"{INDEX} can't be read as JSON"),
        (lambda right: "null", f"{INDEX} holds no JSON object"),
        (lambda right: "[]", f"{INDEX} holds no JSON object"),
        (lambda right: '{"metadata": {}}', f"{INDEX}: weight_map is missing"),
        (lambda right: '{"weight_map": null}', f"{INDEX}: weight_map is missing"),
        (lambda right: '{"weight_map": {}}', f"{INDEX}: weight_map is missing"),
        (lambda right: '{"weight_map": ["a"]}', f"{INDEX}: weight_map is missing"),
        (lambda right: '{"weight_map": {"a": 3}}', "the file of a is 3; expected a file name"),
        (lambda right: '{"weight_map": {"a": "b.safetensors"}}', r"b\.safetensors is missing"),
        (lambda right: "\ufeff\x00", "can't be read as JSON"),
    ],
)
@pytest.mark.parametrize("single", [False, True])
def test_an_index_that_is_damaged_is_named(index, message, single, tmp_path):
    path = shards(tmp_path / "in", tensors(), index)
    if single:
        write(path, tensors())
    with pytest.raises(CheckpointError, match=message) as caught:
        read_model(path)
    assert "\n" not in str(caught.value)


def test_of_two_models_in_a_directory_the_one_is_read_that_transformers_reads(tmp_path):
    pytest.importorskip("transformers", reason="the counterpart needs transformers")
    path = shards(tmp_path / "in", tensors(seed=1), None)
    write(path, tensors(seed=0))
    np.testing.assert_array_equal(up(path), tensors(seed=0)[UP])
    np.testing.assert_allclose(our_logits(path), their_logits(path), atol=1e-5)


def test_links_are_followed_and_other_formats_named(tmp_path):
    path = write(tmp_path / "blobs", tensors())
    (path / "model.safetensors").rename(path / "blob")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "config.json").symlink_to(path / "config.json")
    (snapshot / "model.safetensors").symlink_to(path / "blob")
    np.testing.assert_array_equal(up(snapshot), tensors()[UP])
    (path / "blob").unlink()
    with pytest.raises(CheckpointError, match=r"holds no model: expected model\.safetensors"):
        read_model(snapshot)
    (path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"index\.json, not pytorch_model\.bin\."):
        read_model(path)
    (path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors can't be read"):
        read_model(path)


def test_metadata_that_is_null(tmp_path):
    path = write(tmp_path / "in", tensors())
    data = (path / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size]) | {"__metadata__": None}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    whole = struct.pack("<Q", len(text)) + text + data[8 + size :]
    (path / "model.safetensors").write_bytes(whole)
    np.testing.assert_array_equal(up(path), tensors()[UP])


# Of the matrices and of all else; what they are read as.
DTYPES = {
    ("float64", "float64"): "float32",
    ("float32", "float32"): "float32",
    ("float16", "float16"): "float16",
    ("bfloat16", "bfloat16"): "bfloat16",
    ("bfloat16", "float32"): "float32",
    ("float32", "bfloat16"): "float32",
    ("float16", "bfloat16"): "float32",
    ("float8_e4m3fn", "bfloat16"): "bfloat16",
    ("float8_e5m2", "float16"): "float16",
    ("float8_e4m3fn", "float32"): "float32",
    ("float8_e4m3fn", "float8_e4m3fn"): "bfloat16",
}


@pytest.mark.parametrize(("matrices", "rest"), DTYPES)
def test_every_float_of_the_format_is_read(matrices, rest, tmp_path):
    torch = pytest.importorskip("torch", reason="writes them")
    from safetensors.torch import save_file as save_torch

    stored = {
        name: torch.tensor(value).to(getattr(torch, matrices if value.ndim == 2 else rest))
        for name, value in tensors().items()
    }
    path = write(tmp_path / "in", tensors())
    save_torch(stored, path / "model.safetensors")
    model, _ = read_model(path)
    assert model.config.param_dtype == DTYPES[matrices, rest]
    pairs = {
        UP: model.blocks.mlp.up.W[...][0],
        EMBEDDING: model.embedding[...],
        "model.norm.weight": model.norm.scale[...],
    }
    for name, value in pairs.items():
        assert value.dtype == model.config.param_dtype
        wanted = stored[name].float().numpy()
        np.testing.assert_array_equal(np.asarray(value, np.float32), wanted, err_msg=name)
    full = np.asarray(read_model(path, dtype="float32")[0].blocks.mlp.up.W[...][0])
    np.testing.assert_array_equal(full, stored[UP].float().numpy())


@pytest.mark.parametrize("kind", ["int8", "uint8", "int32", "bool", "complex64"])
def test_what_is_no_float_is_named(kind, tmp_path):
    torch = pytest.importorskip("torch", reason="writes them")
    from safetensors.torch import save_file as save_torch

    stored = {name: torch.tensor(value) for name, value in tensors().items()}
    stored[UP] = torch.ones(48, 32).to(getattr(torch, kind))
    path = write(tmp_path / "in", tensors())
    save_torch(stored, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj\.weight is stored as") as caught:
        read_model(path)
    assert "expected floating-point numbers" in str(caught.value)


def test_scales_of_quantised_matrices_are_not_left_out(tmp_path):
    path = write(tmp_path / "in", tensors() | {f"{UP}_scale_inv": np.ones((1, 1), np.float32)})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight_scale_inv is not expected"):
        read_model(path)


def changed(value, at=(3, 5), name=UP):
    stored = tensors()
    stored[name][at] = value
    return stored


def test_numbers_that_a_dtype_can_not_hold_are_named(tmp_path):
    path = write(tmp_path / "in", changed(1e5))
    for read in (
        lambda: read_model(path, dtype="float16"),
        lambda: write_model(read_model(path)[0], tmp_path / "out", dtype="float16"),
    ):
        with pytest.raises(CheckpointError, match=r"up_proj\.weight holds 1e\+05, more than float"):
            read()
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    assert np.isfinite(up(path, dtype="bfloat16").astype(np.float32)).all()
    # The largest number that is still rounded to a finite one.
    assert up(write(path, changed(65519.0)), dtype="float16")[3, 5] == 65504.0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [UP, EMBEDDING])
def test_numbers_that_are_none_are_named(value, name, tmp_path):
    path = write(tmp_path / "in", changed(value, name=name))
    with pytest.raises(
        CheckpointError, match=rf"{name} holds {value} at \[3, 5\] \(1 of"
    ) as caught:
        read_model(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="holds"):
        read_model(path, rank=4)


def test_numbers_that_are_none_are_not_written(tmp_path):
    model, _ = read_model(write(tmp_path / "in", tensors()))
    model.norm.scale[...] = model.norm.scale[...].at[2].set(jnp.nan)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds nan at \[2\]"):
        write_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (3.4e38, ml_dtypes.bfloat16, "more than bfloat16 can hold"),
        (1e39, np.float32, "more than float32 can hold"),
        (1e-9, np.float16, "all of which are 0 in float16"),
        (1e-60, np.float32, "all of which are 0 in float32"),
    ],
)
def test_casts_to_narrower_ranges(value, dtype, message):
    wide = np.array([value, 0.0])
    with pytest.raises(CheckpointError, match=f"norm holds .*{message}"):
        cast(wide, dtype, "norm")
    # Numbers that are small beside others are rounded, like all.
    mixed = cast(np.array([1e-9, 0.5]), np.float16, "norm")
    np.testing.assert_array_equal(mixed, np.array([0, 0.5], np.float16))


def test_a_matrix_of_zeros_has_factors_of_zeros_and_is_named(tmp_path):
    stored = tensors() | {UP: np.zeros((48, 32), np.float32)}
    path = write(tmp_path / "in", stored)
    assert not up(path).any()
    model, errors = read_model(path, rank=4)
    (zero,) = [error for error in errors if error.zero]
    assert (zero.name, zero.error) == ("model.layers.0.mlp.up_proj", 0.0)
    assert all(np.isfinite(error.error) for error in errors)
    assert not np.asarray(model.blocks.mlp.up.B[...]).any()
