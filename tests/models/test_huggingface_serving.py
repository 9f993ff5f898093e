"""Exports are what other programs read, and imports carry what goes with a model."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx

from loro_jax.__main__ import main
from loro_jax.commands.weights import _token_ids
from loro_jax.text.tokenizers.tokenizer import load_tokenizer
from models import Llama, preset
from models.huggingface import CheckpointError, read_model, write_model
from models.rope import RopeScaling
from tests.models.checkpoints import CONFIG, UP, tensors, write


def export(out, tokenizer="embedded", **changes):
    """A model that begins to say something, written with a tokenizer."""
    chosen = load_tokenizer(tokenizer)
    config = preset(
        "tiny",
        vocab_size=chosen.vocab_size,
        num_layers=1,
        max_sequence_length=64,
        initializer_range=0.3,
    )
    model = Llama(dataclasses.replace(config, **changes), nnx.Rngs(0))
    write_model(model, out, files=chosen.files(), token_ids=_token_ids(chosen))
    return model, chosen


TEXT = "Call me Ishmael."


@pytest.mark.parametrize("tokenizer", ["embedded", "bytes"])
def test_transformers_generates_from_an_export(tokenizer, tmp_path):
    torch = pytest.importorskip("torch", reason="the counterpart needs torch")
    transformers = pytest.importorskip("transformers", reason="the counterpart needs transformers")
    model, ours = export(tmp_path / "out", tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    inputs = read(TEXT, return_tensors="pt")
    ids = ours.encode([TEXT])[0]
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["input_ids"].tolist() == [ids]
    found = theirs.generate(**inputs, max_new_tokens=3, do_sample=False)[0].tolist()
    logits = np.asarray(model(jnp.array([found[:-1]])))[0, len(ids) - 1 :]
    assert found == ids + np.argmax(logits, -1).tolist()
    # Padding, the end of a text and its beginning are the run's.
    assert read.pad_token_id == theirs.generation_config.pad_token_id == ours.pad_id
    assert read.eos_token_id == theirs.generation_config.eos_token_id == ours.eos_id
    assert read.bos_token_id == theirs.generation_config.bos_token_id == theirs.config.bos_token_id
    with torch.no_grad():  # from nothing
        assert theirs.generate(max_new_tokens=1, do_sample=False).shape == (1, 2)


@pytest.mark.parametrize("tokenizer", ["embedded", "bytes"])
def test_the_files_of_an_export_say_all_that_other_programs_ask(tokenizer, tmp_path):
    _, ours = export(tmp_path / "out", tokenizer)
    content = {p.name: json.loads(p.read_text()) for p in (tmp_path / "out").glob("*.json")}
    config = content["tokenizer_config.json"]
    # Transformers 4 adds token_type_ids unless told otherwise, and generate() refuses them.
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    # CTranslate2 does not load a model whose bos_token is null.
    vocabulary = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for role in ("bos", "eos", "pad"):
        one = content["config.json"][f"{role}_token_id"]
        assert vocabulary.id_to_token(one) == config[f"{role}_token"]
        assert content["generation_config.json"][f"{role}_token_id"] == one
    assert not config.get("add_bos_token")
    assert vocabulary.encode(TEXT).ids == ours.encode([TEXT])[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_kv_heads": 2},
        {"rope_theta": 5e5, "tie_embeddings": True},
        {"rope_theta": 3e4, "rope_scaling": RopeScaling("linear", 4.0)},
    ],
)
def test_ctranslate2_computes_our_logits(changes, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2", reason="the counterpart needs ctranslate2")
    pytest.importorskip("transformers", reason="its converter needs transformers")
    model, ours = export(tmp_path / "out", **changes)
    ids = ours.encode([TEXT])
    made = str(tmp_path / "made")
    ctranslate2.converters.TransformersConverter(str(tmp_path / "out")).convert(made)
    found = np.array(ctranslate2.Generator(made, device="cpu").forward_batch(ids))
    assert np.std(found) > 0.3
    np.testing.assert_allclose(found, model(jnp.array(ids)), atol=1e-4)


def test_a_tokenizer_with_several_ends_and_a_beginning():
    tokenizer = load_tokenizer("bytes")
    wanted = {"eos_token_id": 1, "pad_token_id": 0}
    assert {name: _token_ids(tokenizer)[name] for name in wanted} == wanted
    tokenizer.eos_ids, tokenizer.bos_id = (1, 5), 2
    wanted = {"bos_token_id": 2, "eos_token_id": [1, 5], "pad_token_id": 0}
    assert _token_ids(tokenizer) == wanted


def test_a_list_of_ends_is_written(tmp_path):
    model = Llama(preset("tiny", num_layers=1), nnx.Rngs(0))
    write_model(model, tmp_path / "out", token_ids={"eos_token_id": [5, 7], "pad_token_id": None})
    for name in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / "out" / name).read_text())
        assert (content["eos_token_id"], content["bos_token_id"]) == ([5, 7], 5)
    own = {"generation_config.json": b'{"eos_token_id": 3}'}
    write_model(model, tmp_path / "own", token_ids={"eos_token_id": 5}, files=own)
    assert (tmp_path / "own" / "generation_config.json").read_bytes() == own.popitem()[1]


COMPANIONS = {
    "tokenizer.json": "{}",
    "tokenizer.model": "a model",
    "tokenizer_config.json": "{}",
    "special_tokens_map.json": "{}",
    "added_tokens.json": "{}",
    "vocab.json": "{}",
    "merges.txt": "a b",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "generation_config.json": '{"eos_token_id": [2, 3], "temperature": 0.6}',
}


def imported(path, out, *more):
    return main(["import", str(path), str(out), *more])


def test_an_import_carries_what_goes_with_a_model(tmp_path):
    ids = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": -1}
    path = write(tmp_path / "in", tensors(), **ids)
    for name, content in COMPANIONS.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(content)
    (path / "README.md").write_text("of the model it was")
    # Folders and links with the names of files.
    (path / "tokenizer").mkdir()
    (path / "tokenizer_files.json").mkdir()
    (path / "tokenizer.old").symlink_to("nowhere")
    assert imported(path, tmp_path / "out") == 0
    files = {p.relative_to(tmp_path / "out").as_posix(): p for p in (tmp_path / "out").rglob("*.*")}
    assert files.keys() == COMPANIONS.keys() | {"config.json", "model.safetensors"}
    assert {name: files[name].read_text() for name in COMPANIONS} == COMPANIONS
    config = json.loads(files["config.json"].read_text())
    assert {name: config[name] for name in ids} == ids | {"pad_token_id": None}
    # And again, factored.
    assert imported(path, tmp_path / "small", "--rank=4") == 0
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["eos_token_id"] == [2, 3]


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, {}),
        ({"eos_token_id": 2}, {"bos_token_id": 1, "eos_token_id": 2}),
        ({"eos_token_id": None, "bos_token_id": 0}, {"bos_token_id": 0, "eos_token_id": None}),
        ({"eos_token_id": [2], "bos_token_id": None}, {"bos_token_id": None, "eos_token_id": [2]}),
    ],
)
def test_ids_of_an_import_are_those_of_its_source(fields, wanted, tmp_path):
    path = write(tmp_path / "in", tensors(), **fields)
    assert imported(path, tmp_path / "out") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {k: v for k, v in config.items() if k.endswith("_token_id")} == wanted


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("generation_config.json", "{", "generation_config.json can't be read as JSON"),
        ("generation_config.json", "null", "generation_config.json holds no JSON object"),
        ("config.json", json.dumps(CONFIG | {"eos_token_id": "</s>"}), "eos_token_id = '</s>'"),
        ("config.json", json.dumps(CONFIG | {"eos_token_id": [2, "x"]}), "eos_token_id = [2, 'x']"),
        ("config.json", json.dumps(CONFIG | {"bos_token_id": [1]}), "bos_token_id = [1]"),
    ],
)
def test_companions_that_are_damaged_are_named(name, content, message, tmp_path, capsys):
    path = write(tmp_path / "in", tensors())
    (path / name).write_text(content)
    assert imported(path, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


def test_the_command_names_a_tensor_that_does_not_fit_and_one_of_zeros(tmp_path, capsys):
    stored = tensors() | {UP: np.zeros((48, 32), np.float32)}
    path = write(tmp_path / "in", stored)
    assert imported(path, tmp_path / "dense") == 0
    assert f"note: {UP} is all zeros.\n" in capsys.readouterr().out
    assert imported(path, tmp_path / "small", "--rank=4") == 0
    printed = capsys.readouterr().out
    assert "| model.layers.0.mlp.up_proj | 48 x 32 | 4 | 0.0000 |" in printed
    assert "note: model.layers.0.mlp.up_proj is all zeros, and so are its factors" in printed
    stored[UP][1, 2] = -7e4
    write(path, stored)
    assert imported(path, tmp_path / "half", "--dtype=float16") == 1
    assert f"{UP} holds 7e+04, more than float16 can hold" in capsys.readouterr().err
    assert not (tmp_path / "half").exists()


def test_ranks_of_grouped_queries(tmp_path, capsys):
    path = write(tmp_path / "in", tensors(kv_heads=1), num_key_value_heads=1)  # k and v: 8 x 32
    assert imported(path, tmp_path / "clipped", "--rank=16") == 0
    assert "attention is factored at rank 8, not 16: keys and values" in capsys.readouterr().out
    model, errors = read_model(path, rank=16)
    ranks = {error.name.split(".")[-1]: error.rank for error in errors}
    wanted = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), 8)
    assert ranks == wanted | dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 16)
    assert read_model(tmp_path / "clipped")[0].config == model.config
    found = {error.name: error.error for error in errors}
    s = np.linalg.svd(tensors(kv_heads=1)["model.layers.0.self_attn.q_proj.weight"].astype(float))[
        1
    ]
    wanted = np.sqrt(np.sum(s[8:] ** 2) / np.sum(s**2))
    assert found["model.layers.0.self_attn.q_proj"] == pytest.approx(wanted, rel=1e-4)
    assert found["model.layers.0.self_attn.k_proj"] < 1e-5  # all of it
    # Asked for.
    assert imported(path, tmp_path / "asked", "--rank=16", "--attn_rank=4") == 0
    assert "note" not in capsys.readouterr().out
    config = read_model(tmp_path / "asked")[0].config
    assert (config.group_rank("attn"), config.group_rank("mlp")) == (4, 16)
    for name, group, other in (("attn", "attn", "mlp"), ("mlp", "mlp", "attn")):
        config = read_model(path, **{f"{name}_rank": 6})[0].config
        assert (config.group_rank(group), config.group_rank(other)) == (6, None)
    for keywords in ({"attn_rank": 9}, {"rank": 33}, {"rank": 0}, {"rank": 4, "mlp_rank": 33}):
        with pytest.raises(CheckpointError, match=r"does not fit .* must be between 1 and"):
            read_model(path, **keywords)
