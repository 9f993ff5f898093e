"""Compressed models: what is stored, and that everything that reads models reads them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from loro_jax.__main__ import main
from loro_jax.compress import compress
from loro_jax.errors import TrainingError
from loro_jax.peers.trp import truncated
from loro_jax.text.config import DataConfig
from loro_jax.text.tokenizers.tokenizer import load_tokenizer
from loro_jax.training.config import Config
from loro_jax.training.loop import train
from loro_jax.training.trained import load_run
from models.decoding import generate
from models.huggingface import CheckpointError, read_model, write_model
from models.llama import Llama, LlamaConfig
from models.sampling import GREEDY
from tests.helpers import outputs

CONFIG = LlamaConfig(
    vocab_size=264,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    max_sequence_length=64,
    scope="none",
)
TEXT = "\n\n".join(f"The {word} of the sea is number {i}." for i, word in enumerate("abcdefgh" * 9))
ids = np.random.default_rng(1).integers(3, 259, (2, 16))


@pytest.fixture(scope="module")
def dense():
    """A model whose matrices have spectra that fall, at another speed in each layer."""
    graphdef, state = nnx.split(Llama(CONFIG, nnx.Rngs(0)))
    rng = np.random.default_rng(0)

    def fall(W):
        if W.ndim < 3:
            return W
        U, S, Vt = np.linalg.svd(rng.normal(size=W.shape), full_matrices=False)
        speeds = rng.uniform(0.05, 0.4, (len(W), 1))
        S = np.exp(-np.arange(S.shape[1]) * speeds)
        return jnp.asarray((U * S[:, None]) @ Vt, W.dtype)

    return nnx.merge(graphdef, jax.tree.map(fall, state))


@pytest.fixture(scope="module")
def directory(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "model"
    files = load_tokenizer("bytes").files() | {"chat_template.jinja": b"x"}
    write_model(dense, folder, files=files, token_ids={"eos_token_id": 1, "pad_token_id": 0})
    (folder.parent / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def small(directory, tmp_path_factory):
    """The directory after the command, with ranks that differ by layer."""
    out = tmp_path_factory.mktemp("small") / "out"
    assert main(["compress", str(directory), str(out), "--method=welore", "--keep=0.5"]) == 0
    return out


def logits(model):
    return outputs(model, ids)


@pytest.mark.parametrize("method", ["svd", "welore", "asvd", "lord", "lord_welore"])
def test_half_of_the_parameters_are_kept(dense, method):
    found = compress(dense, method, keep=0.5, tokens_NxL=ids)
    kept = sum(one.parameters for one in found.matrices)
    whole = sum(one.shape[0] * one.shape[1] for one in found.matrices)
    # Ranks of matrices this small are coarse.
    assert kept / whole == pytest.approx(0.5, abs=0.02)
    for one in found.matrices:
        part = found.model.blocks.attention if one.name in "qkvo" else found.model.blocks.mlp
        pair = getattr(part, one.name)
        B, A = np.asarray(pair.B[...][one.layer]), np.asarray(pair.A[...][one.layer])
        assert not B[:, one.rank :].any()
        assert not A[one.rank :].any()
        before = dense.blocks.attention if one.name in "qkvo" else dense.blocks.mlp
        W = np.asarray(getattr(before, one.name).W[...][one.layer])
        assert one.error == pytest.approx(
            np.linalg.norm(W - B @ A) / np.linalg.norm(W), rel=1e-3, abs=1e-6
        )


def test_of_equal_ranks_lord_has_the_smaller_errors_of_outputs(dense):
    lord, svd = (
        compress(dense, method, rank=8, tokens_NxL=ids).matrices for method in ("lord", "svd")
    )
    for one, other in zip(lord, svd, strict=True):
        assert (one.layer, one.name, one.rank) == (other.layer, other.name, other.rank)
        assert one.output_error <= other.output_error + 1e-6
        assert one.error >= other.error - 1e-6


def test_the_full_rank_is_exact(dense):
    for method in ("svd", "lord"):
        found = compress(dense, method, rank=32, tokens_NxL=ids)
        assert {one.rank for one in found.matrices} == {16, 32}, "k and v have 16 rows"
        assert max(one.error for one in found.matrices) < 1e-5
        np.testing.assert_allclose(logits(found.model), logits(dense), atol=1e-4)


@pytest.mark.parametrize("energy", [0.8, 0.95])
def test_ranks_hold_a_share_of_the_energy(dense, energy):
    matrices = compress(dense, "svd", energy=energy).matrices
    pairs = [one for one in matrices if one.rank is not None]
    assert len({one.rank for one in pairs}) > 1
    for one in pairs:
        assert one.error**2 <= 1 - energy + 1e-6
        part = dense.blocks.attention if one.name in "qkvo" else dense.blocks.mlp
        s = np.linalg.svd(getattr(part, one.name).W[...][one.layer], compute_uv=False)
        # The squared error is the sum of the tail's squares; with one value less it is too large.
        assert one.error**2 == pytest.approx(np.sum(s[one.rank :] ** 2) / np.sum(s**2), rel=1e-3)
        assert np.sum(s[one.rank - 1 :] ** 2) > (1 - energy) * np.sum(s**2)


def test_truncated_matrices_have_pairs_of_their_ranks_without_loss(dense):
    """As the steps of TRP leave them: an energy of 1 finds the ranks again."""
    graphdef, state = nnx.split(dense)
    ranks = {}

    def low_rank(path, W):
        if W.ndim < 3:
            return W
        found = truncated(W, 0.9)
        ranks[path[2]] = found.rank.tolist()
        return found.W

    params = nnx.to_pure_dict(state)
    state.replace_by_pure_dict(
        jax.tree_util.tree_map_with_path(
            lambda path, W: low_rank([entry.key for entry in path], W), params
        )
    )
    model = nnx.merge(graphdef, state)
    found = compress(model, "svd", energy=1.0)
    assert all(one.rank == ranks[one.name][one.layer] for one in found.matrices)
    assert max(one.error for one in found.matrices) < 1e-5
    np.testing.assert_allclose(logits(found.model), logits(model), atol=1e-4)


@pytest.mark.slow
def test_a_run_of_trp_becomes_pairs_without_loss(directory, tmp_path, capsys):
    config = Config(
        method="trp",
        exact_every=2,
        init_from=str(directory),
        steps=4,
        warmup_steps=0,
        batch_size=2,
        sequence_length=16,
        learning_rate=1e-3,
        log_every=1,
        tensorboard=False,
        model=CONFIG,
        data=DataConfig(
            source=str(directory.parent / "text.txt"), tokenizer="bytes", max_eval_sequences=4
        ),
    )
    train(config, str(tmp_path / "run"))
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ranks = [row["mean_rank"] for row in map(json.loads, rows) if "mean_rank" in row]
    assert ranks[0] == 0
    assert ranks[1] == ranks[2]
    assert 0 < ranks[3] < 16
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "dense")]) == 0
    command = ["compress", str(tmp_path / "dense"), str(tmp_path / "pairs"), "--method=svd"]
    capsys.readouterr()
    assert main([*command, "--energy=1", "--json"]) == 0
    matrices = json.loads(capsys.readouterr().out)["matrices"]
    assert np.mean([one["rank"] for one in matrices]) == pytest.approx(ranks[3])
    assert max(one["error"] for one in matrices) < 1e-5
    np.testing.assert_allclose(
        logits(read_model(tmp_path / "pairs")[0]),
        logits(read_model(tmp_path / "dense")[0]),
        atol=1e-4,
    )


def test_a_projection_that_does_not_compress_stays_dense(dense):
    found = compress(dense, "welore", keep=0.95)
    ranks = {name: found.model.config.projection_rank(name) for name in "qkvo"}
    assert None in ranks.values()
    assert any(ranks.values())
    name = next(name for name, rank in ranks.items() if rank is None)
    before, after = (getattr(one.blocks.attention, name).W[...] for one in (dense, found.model))
    np.testing.assert_array_equal(before, after)


def test_files_hold_each_pair_at_its_own_rank(dense, small):
    found = compress(dense, "welore", keep=0.5)
    tensors = load_file(small / "model.safetensors")
    stored = read_model(small)[0]
    assert stored.config == found.model.config
    ranks = {one.rank for one in found.matrices if one.name == "q"}
    assert len(ranks) > 1
    for one in found.matrices:
        part = "self_attn" if one.name in "qkvo" else "mlp"
        B = tensors[f"model.layers.{one.layer}.{part}.{one.name}_proj.B"]
        assert B.shape == (one.shape[0], one.rank)
    np.testing.assert_array_equal(logits(stored), logits(found.model))
    assert (small / "chat_template.jinja").read_bytes() == b"x"
    assert (small / "tokenizer.json").exists()


def test_pairs_of_two_ranks_in_one_file_are_named(small, tmp_path):
    from safetensors.numpy import save_file

    for path in small.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(small / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.A"
    save_file(tensors | {name: tensors[name][1:].copy()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"q_proj.B has shape .* but its A has shape"):
        read_model(tmp_path)
    too_many = np.zeros((40, 32), np.float32)
    save_file(tensors | {name: too_many}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"q_proj.A has shape \(40, 32\); conf"):
        read_model(tmp_path)


def test_a_compressed_model_is_merged_for_other_programs(small, tmp_path, capsys):
    assert main(["export", str(small), str(tmp_path / "merged")]) == 0
    merged = read_model(tmp_path / "merged")[0]
    assert merged.config.scope == "none"
    np.testing.assert_allclose(logits(merged), logits(read_model(small)[0]), atol=1e-5)
    assert json.loads((tmp_path / "merged/config.json").read_text())["model_type"] == "llama"
    assert main(["export", str(small), str(tmp_path / "other"), "--step=3"]) == 1
    assert "is not a run directory" in capsys.readouterr().err


def test_a_compressed_model_generates_with_every_cache(small):
    model = read_model(small)[0]
    assert model.config.projection_rank("k") != model.config.projection_rank("v")
    texts = [
        [tokens.tolist() for tokens in generate(model, [[5, 6, 7]], 6, GREEDY, cache=cache)]
        for cache in ("full", "values", "latent")
    ]
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.slow
def test_training_continues_from_it_and_keeps_the_padding(small, directory, tmp_path):
    config = Config(
        method="lowrank",
        init_from=str(small),
        steps=2,
        warmup_steps=0,
        batch_size=2,
        sequence_length=16,
        tensorboard=False,
        model=dataclasses.replace(CONFIG, scope="all", rank=8),
        data=DataConfig(
            source=str(directory.parent / "text.txt"), tokenizer="bytes", max_eval_sequences=4
        ),
    )
    train(config, str(tmp_path / "run"))
    trained = load_run(tmp_path / "run").model
    start = read_model(small)[0]
    assert trained.config.ranks == start.config.ranks
    before, after = (one.blocks.attention.q for one in (start, trained))
    padding = ~np.asarray(before.B[...]).any(axis=1)
    assert padding.any()
    assert not np.asarray(after.B[...]).swapaxes(1, 2)[padding].any()
    assert not np.asarray(after.A[...])[padding].any()
    assert not np.array_equal(before.B[...], after.B[...])


def test_the_command_prints_every_matrix_and_the_perplexities(directory, tmp_path, capsys):
    text = str(directory.parent / "text.txt")
    options = ["--method=lord", "--keep=0.6", "--tokens=600", "--window=32", f"--text={text}"]
    options += [f"--evaluate={text}", "--evaluate_tokens=200"]
    assert main(["compress", str(directory), str(tmp_path / "a"), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| ") for line in lines) == 2 + 3 * 7
    assert lines[0].split("|")[1].strip() == "layer"
    assert any(line.startswith("perplexity of 199 tokens: ") for line in lines)
    assert main(["compress", str(directory), str(tmp_path / "b"), *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["matrices"]) == 21
    assert found["calibration_tokens"] == 576
    assert found["evaluated_tokens"] == 199
    assert found["projections"] == sum(one["parameters"] for one in found["matrices"])
    state = nnx.state(read_model(tmp_path / "b")[0])
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == found["parameters"]
    evaluated = ["evaluate", str(tmp_path / "b"), text, "--window=32", "--max_tokens=200", "--json"]
    assert main([*evaluated, "--split=all"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] == pytest.approx(
        found["perplexity"], rel=1e-4
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--method=lord", "--keep=0.5"],
            "--method=lord needs a calibration text; expected --text",
        ),
        (["--method=svd"], "expected one of --keep, --rank and --energy"),
        (["--method=svd", "--keep=0.5", "--rank=3"], "expected one of --keep, --rank and --energy"),
        (["--method=svd", "--energy=1.5"], "--energy=1.5: expected a share above 0 and at most 1"),
        (["--method=welore", "--energy=0.9"], "--method 'welore' chooses the ranks; expected keep"),
        (["--method=svd", "--keep=1.5"], "--keep=1.5: expected a fraction above 0 and below 1"),
        (["--method=svd", "--keep=0.001"], "--keep=0.001 can't be met: pairs of rank 1"),
        (["--method=welore", "--keep=0.01"], "--keep=0.01 can't be met: pairs of rank 1"),
        (["--method=svd", "--rank=33"], "--rank=33: expected between 1 and 32"),
        (["--method=welore", "--rank=8"], "--method 'welore' chooses the ranks; expected keep"),
        (["--method=svd", "--keep=0.5", "--tokens=0"], "--tokens=0: expected at least 1"),
        (["--keep=0.5", "--text=EMPTY"], "--text="),
        (["--keep=0.5", "--text=nowhere/*.txt"], "the text 'nowhere/*.txt' matches no file"),
    ],
)
def test_what_can_not_be_compressed_is_named(directory, tmp_path, capsys, options, message):
    (tmp_path / "empty.txt").write_text(" \n")
    options = [one.replace("EMPTY", str(tmp_path / "empty.txt")) for one in options]
    assert main(["compress", str(directory), str(tmp_path / "out"), *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("*out*"))


def test_directories_that_hold_no_dense_llama_are_named(small, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for source, message in (
        (small, "the projections have factors already; expected a dense model"),
        (tmp_path / "empty", "config.json"),
        (tmp_path / "none", "is not a directory"),
    ):
        out = tmp_path / "out"
        assert main(["compress", str(source), str(out), "--method=svd", "--keep=0.5"]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not out.exists()
    assert main(["compress", str(small), str(small), "--method=svd", "--keep=0.5"]) == 1
    assert "exists already" in capsys.readouterr().err


def test_library_errors_name_the_value(dense):
    with pytest.raises(TrainingError, match="method 'asvd' needs a calibration text"):
        compress(dense, "asvd", keep=0.5)
    for ranks in ("q=33", "x=3", "q=", "q=-1"):
        with pytest.raises(ValueError, match=r"model.ranks must be NAME=RANK,... "):
            dataclasses.replace(CONFIG, scope="all", rank=8, ranks=ranks).validate()
