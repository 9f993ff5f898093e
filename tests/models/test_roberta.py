"""RoBERTa computes what transformers does, reads and writes its directories, and factorises."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from loro_jax.layers import factorise
from loro_jax.layers.adapters import AdapterSpec, adapt
from models.huggingface import CheckpointError
from models.roberta import (
    Roberta,
    RobertaClassifier,
    RobertaConfig,
    read_classifier,
    read_roberta,
    write_roberta,
)
from models.roberta.adapters import write_classifier_adapter
from models.roberta.names import leaves, stored_name

SMALL = RobertaConfig(
    vocab_size=60,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    intermediate_size=48,
    max_position_embeddings=24,
    initializer_range=0.2,
)
IDS = np.array([[0, 7, 8, 9, 2, 2, 11, 12, 2], [0, 21, 22, 2, 1, 1, 1, 1, 1]])


def written(path, head=True, **changes):
    """A small model and the directory that it is written to."""
    config = dataclasses.replace(SMALL, **changes)
    model = (RobertaClassifier if head else Roberta)(config, nnx.Rngs(0))
    write_roberta(model, path)
    return model


def edited(path, **changes):
    """Changes fields of a directory's config.json; one that is ... is left out."""
    content = json.loads((path / "config.json").read_text()) | changes
    content = {name: value for name, value in content.items() if value is not ...}
    (path / "config.json").write_text(json.dumps(content))
    return path


def counterpart(path, name="RobertaForSequenceClassification", **fields):
    """Transformers' model with random weights, written to a directory."""
    torch = pytest.importorskip("torch", reason="the counterpart needs torch")
    transformers = pytest.importorskip("transformers", reason="the counterpart needs transformers")
    torch.manual_seed(0)
    usual = {
        "vocab_size": 60,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 24,
        "initializer_range": 0.3,
    }
    model = getattr(transformers, name)(transformers.RobertaConfig(**usual | fields)).eval()
    with torch.no_grad():  # biases and norms are zeros and ones at first
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return torch, model


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_act": "gelu", "type_vocab_size": 1, "layer_norm_eps": 1e-5},
        {"hidden_act": "gelu_new", "type_vocab_size": 2, "num_labels": 1},
        {"hidden_act": "relu", "pad_token_id": 3, "num_labels": 3, "hidden_dropout_prob": 0.0},
    ],
    ids=lambda fields: fields["hidden_act"],
)
def test_hidden_states_and_logits_are_those_of_transformers(tmp_path, fields):
    torch, theirs = counterpart(tmp_path, **fields)
    model, notes = read_classifier(tmp_path)
    assert notes == []
    pad = fields.get("pad_token_id", 1)
    ids = np.where(IDS == 1, pad, IDS)
    mask = (ids != pad).astype(np.int32)
    types = None
    if model.config.type_vocab_size == 2:
        types = np.cumsum(ids == 2, axis=1).clip(0, 1)
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    with torch.no_grad():
        wanted = theirs(
            **{name: torch.tensor(value) for name, value in given.items() if value is not None},
            output_hidden_states=True,
        )

    @jax.jit
    def both(ids, mask):
        hidden = model.hidden_states(ids, mask=mask, token_types=types)
        return hidden, model.classifier(hidden), model(ids, mask=mask, token_types=types)

    hidden, logits, called = both(ids, mask)
    np.testing.assert_allclose(hidden, wanted.hidden_states[-1].numpy(), atol=1e-5)
    np.testing.assert_allclose(logits, wanted.logits.numpy(), atol=1e-5)
    np.testing.assert_array_equal(logits, called)
    assert logits.shape == (2, fields.get("num_labels", 2))


def test_gradients_are_those_of_transformers(tmp_path):
    torch, theirs = counterpart(tmp_path, type_vocab_size=1, num_labels=3)
    model, _ = read_classifier(tmp_path)
    mask, labels = (IDS != 1).astype(np.int32), np.array([2, 0])
    inputs = {"input_ids": IDS, "attention_mask": mask, "labels": labels}
    theirs(**{name: torch.tensor(value) for name, value in inputs.items()}).loss.backward()

    @nnx.jit
    def gradient(model):
        def loss(model):
            log_p = jax.nn.log_softmax(model(IDS, mask=mask))
            return -jnp.mean(log_p[jnp.arange(2), labels])

        return nnx.grad(loss)(model)

    grads = nnx.to_pure_dict(gradient(model))
    compared = 0
    for path, grad in leaves(grads):
        for layer in range(2) if path[0] == "blocks" else (None,):
            name = stored_name(path, layer or 0)
            wanted = theirs.get_parameter(name).grad.numpy()
            found = grad if layer is None else grad[layer]
            np.testing.assert_allclose(found, wanted, atol=2e-5, err_msg=name)
            compared += 1
    assert compared == len(list(theirs.parameters()))


def test_an_encoder_without_prefix_has_its_pooler(tmp_path):
    torch, theirs = counterpart(tmp_path, "RobertaModel")
    assert "encoder.layer.0.output.dense.bias" in load_file(tmp_path / "model.safetensors")
    model = read_roberta(tmp_path)
    with torch.no_grad():
        wanted = theirs(torch.tensor(IDS))
    hidden = model.hidden_states(IDS)  # without a mask, padding is attended to
    np.testing.assert_allclose(hidden, wanted.last_hidden_state.numpy(), atol=1e-5)
    np.testing.assert_allclose(model.pooled(hidden), wanted.pooler_output.numpy(), atol=1e-5)
    # Its pooler is not the head of a classifier, which gets a new one.
    classifier, (note,) = read_classifier(tmp_path, num_labels=3, seed=5)
    assert "has no head" in note
    assert "3 output(s)" in note
    other, _ = read_classifier(tmp_path, num_labels=3, seed=6)
    head, others = (nnx.state(m.classifier) for m in (classifier, other))
    assert not np.array_equal(head["out_proj"]["W"][...], others["out_proj"]["W"][...])
    np.testing.assert_array_equal(classifier.hidden_states(IDS), hidden)


def test_the_head_of_pretraining_is_ignored(tmp_path):
    _, theirs = counterpart(tmp_path, "RobertaForMaskedLM")
    stored = load_file(tmp_path / "model.safetensors")
    assert any(name.startswith("lm_head.") for name in stored)
    model, notes = read_classifier(tmp_path, num_labels=1)
    assert len(notes) == 1
    assert model(IDS).shape == (2, 1)
    word = theirs.roberta.embeddings.word_embeddings.weight.detach().numpy()
    np.testing.assert_array_equal(model.embeddings.word[...], word)


def test_transformers_reads_what_is_written(tmp_path):
    torch = pytest.importorskip("torch", reason="the counterpart needs torch")
    transformers = pytest.importorskip("transformers", reason="the counterpart needs transformers")
    config = dataclasses.replace(SMALL, num_labels=3)
    model = RobertaClassifier(config, nnx.Rngs(1))
    out = tmp_path / "out"
    write_roberta(model, out, labels=("no", "maybe", "yes"), shard_bytes=10_000)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    theirs, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        out, output_loading_info=True
    )
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    mask = (IDS != 1).astype(np.int32)
    with torch.no_grad():
        wanted = theirs.eval()(torch.tensor(IDS), attention_mask=torch.tensor(mask)).logits
    np.testing.assert_allclose(model(IDS, mask=mask), wanted.numpy(), atol=1e-5)
    again, _ = read_classifier(out)
    assert again.config == config
    np.testing.assert_array_equal(again(IDS, mask=mask), model(IDS, mask=mask))


def test_projections_factorise_at_full_rank_without_a_change(tmp_path):
    model = RobertaClassifier(SMALL, nnx.Rngs(0))
    wanted = model(IDS, mask=IDS != 1)
    where = ("blocks/attention/query", "blocks/attention/value", "blocks/mlp/*")
    low_rank = factorise(model, rank=32, init="svd", where=where)
    pairs = nnx.to_pure_dict(nnx.state(low_rank.blocks))
    assert set(pairs["attention"]["query"]) == {"A", "B", "bias"}
    assert set(pairs["attention"]["key"]) == {"W", "bias"}
    assert pairs["mlp"]["output"]["B"].shape == (2, 32, 32)
    np.testing.assert_allclose(low_rank(IDS, mask=IDS != 1), wanted, atol=1e-5)
    # What is written is the merged model.
    write_roberta(low_rank, tmp_path / "merged")
    merged, _ = read_classifier(tmp_path / "merged")
    np.testing.assert_allclose(merged(IDS, mask=IDS != 1), wanted, atol=1e-5)


def test_padding_changes_nothing():
    model = RobertaClassifier(SMALL, nnx.Rngs(0))
    short = IDS[1:, :4]
    wanted = model(short, mask=np.ones_like(short))
    np.testing.assert_allclose(model(IDS, mask=IDS != 1)[1:], wanted, atol=1e-5)


def test_dropout_is_drawn_from_the_key_alone():
    model = RobertaClassifier(SMALL, nnx.Rngs(0))
    plain = model(IDS)
    np.testing.assert_array_equal(model(IDS), plain)
    one, again, other = (model(IDS, key=jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other)
    assert not np.allclose(one, plain)
    none = dataclasses.replace(SMALL, hidden_dropout=0.0, attention_dropout=0.0)
    without = RobertaClassifier(none, nnx.Rngs(0))
    np.testing.assert_array_equal(without(IDS, key=jax.random.key(0)), without(IDS))


def test_rows_have_dropout_of_their_own():
    model = RobertaClassifier(SMALL, nnx.Rngs(0))
    keys = jax.random.split(jax.random.key(0), 2)
    call = jax.jit(lambda ids, keys: model(ids, key=keys))
    both = call(IDS, keys)
    alone = [model(IDS[i : i + 1], key=keys[i : i + 1]) for i in range(2)]
    np.testing.assert_allclose(both, np.concatenate(alone), atol=1e-5)
    swapped = call(IDS[::-1], keys[::-1])
    np.testing.assert_allclose(swapped, both[::-1], atol=1e-5)
    assert not np.allclose(call(IDS, keys[::-1]), both)


@pytest.mark.slow
def test_rematerialised_gradients_are_the_same():
    def gradient(remat):
        model = RobertaClassifier(dataclasses.replace(SMALL, remat=remat), nnx.Rngs(0))
        key = jax.random.key(0)
        of = nnx.jit(nnx.grad(lambda m: jnp.sum(m(IDS, key=key) ** 2)))
        return nnx.to_pure_dict(of(model))

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), gradient("none"), gradient("full")
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type = 'bert'; expected \"roberta\""),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
        ({"is_decoder": True}, "is_decoder = True is not supported; expected False"),
        ({"hidden_act": "mish"}, "hidden_act = 'mish' is not supported; expected one of gelu,"),
        ({"hidden_size": "wide"}, "hidden_size = 'wide' is not supported; expected a whole number"),
        ({"num_attention_heads": 5}, "model.num_heads = 5 must divide model.hidden_size = 32"),
        ({"pad_token_id": 30}, "model.max_position_embeddings = 24 leaves no position"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"id2label": ["a"]}, "id2label = ['a']; expected names by number"),
        ({"num_hidden_layers": 3}, "encoder.layer.2.attention.output.LayerNorm.bias is missing"),
        ({"num_hidden_layers": 1}, "is not expected (and 15 more)"),
        (
            {"type_vocab_size": 2},
            "token_type_embeddings.weight has shape (1, 32); expected (2, 32)",
        ),
    ],
)
def test_what_cannot_be_read_is_an_error_of_one_line(tmp_path, changes, message):
    written(tmp_path / "model")
    edited(tmp_path / "model", **changes)
    with pytest.raises(CheckpointError) as raised:
        read_classifier(tmp_path / "model")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_stored_head_of_another_task_is_refused(tmp_path):
    written(tmp_path / "model", num_labels=3)
    with pytest.raises(CheckpointError, match=r"out_proj.weight has shape \(3, 32\)"):
        read_classifier(tmp_path / "model", num_labels=2)
    with pytest.raises(CheckpointError, match="is not a directory"):
        read_classifier(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        read_classifier(tmp_path / "empty")


def test_old_names_of_norms_and_buffers(tmp_path):
    model = written(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    stored = load_file(file)
    stored = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for name, value in stored.items()
    }
    stored["roberta.embeddings.position_ids"] = np.arange(24)
    save_file(stored, file)
    again, _ = read_classifier(tmp_path / "model")
    np.testing.assert_array_equal(again(IDS), model(IDS))


def test_nothing_half_written(tmp_path):
    model = RobertaClassifier(SMALL, nnx.Rngs(0))
    with pytest.raises(CheckpointError, match="1 labels for a model of 2 outputs"):
        write_roberta(model, tmp_path / "out", labels=("one",))
    model.embeddings.word[...] = model.embeddings.word[...] * jnp.nan
    with pytest.raises(CheckpointError, match="holds nan"):
        write_roberta(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_sequences_have_an_end():
    model = Roberta(SMALL, nnx.Rngs(0))
    with pytest.raises(ValueError, match="23 tokens is longer than the 22"):
        model.hidden_states(jnp.full((1, 23), 7))
    with pytest.raises(ValueError, match="has no pooler"):
        model.pooled(jnp.zeros((1, 2, 32)))


def adapted(names, trained=("classifier",), **spec):
    model = RobertaClassifier(SMALL, nnx.Rngs(0))
    where = [f"blocks/{name}" for name in names]
    return adapt(model, AdapterSpec(rank=4, **spec), where=where, trained=list(trained))


@pytest.mark.parametrize(
    ("names", "targets"),
    [
        (("attention/output", "mlp/output"), ["attention.output.dense", "output.dense"]),
        (("mlp/output",), r"roberta\.encoder\.layer\.\d+\.(output\.dense)"),
    ],
)
def test_adapters_and_head_are_written_by_pefts_names(names, targets, tmp_path):
    model = adapted(names, alpha=8)
    assert write_classifier_adapter(model, tmp_path / "out", base="roberta-base") > 0
    content = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert content["target_modules"] == targets
    assert (content["r"], content["lora_alpha"], content["task_type"]) == (4, 8, "SEQ_CLS")
    assert content["modules_to_save"] == ["classifier"]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * len(names) + 4
    A = tensors["base_model.model.roberta.encoder.layer.1.output.dense.lora_A.weight"]
    np.testing.assert_array_equal(A, model.blocks.mlp.output.adapter.A[1])
    head = tensors["base_model.model.classifier.out_proj.weight"]
    np.testing.assert_array_equal(head, model.classifier.out_proj.weight())


def test_adapters_that_are_not_the_whole_difference_are_refused(tmp_path):
    for model, message in (
        (RobertaClassifier(SMALL, nnx.Rngs(0)), "the model has no adapters"),
        (adapted(["attention/query"], ["blocks/*_norm"]), "was trained, too, which is part of"),
        (adapted(["attention/query"], kind="miss"), "have no counterpart in PEFT"),
    ):
        with pytest.raises(CheckpointError, match=message):
            write_classifier_adapter(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
