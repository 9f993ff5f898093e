"""The table of compressed models before and after training."""

import json

import pytest
from flax import nnx

from loro_jax.commands.compress import main as compress
from loro_jax.commands.evaluate import main as evaluate
from loro_jax.commands.healing import main
from loro_jax.text.tokenizers.tokenizer import load_tokenizer
from loro_jax.training.metrics import read_rows
from models import Llama, preset
from models.huggingface import write_model
from tests.training import runs

SHORT = {"steps": 4, "warmup_steps": 0}
TRAINING = {
    "0.9": SHORT,
    # Without exact steps, whose fields have their defaults.
    "0.5": {**SHORT, "method": "lowrank", "exact_every": 500, "exact_method": "graph"},
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense model in Hugging Face's format, beside a text."""
    folder = tmp_path_factory.mktemp("healing")
    (folder / "text.txt").write_text(runs.TEXT[:600])
    model = Llama(preset("tiny", vocab_size=259, scope="none"), nnx.Rngs(0))
    ids = {"eos_token_id": 1, "pad_token_id": 0}
    write_model(model, folder / "dense", files=load_tokenizer("bytes").files(), token_ids=ids)
    return folder / "dense"


def perplexity(directory, text, capsys):
    assert evaluate([str(directory), str(text), "--split=all", "--window=16", "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])["perplexity"]


@pytest.mark.slow
def test_every_size_before_and_after(dense, tmp_path, capsys):
    text = dense.parent / "text.txt"
    starts, trained = [], []
    for keep, fields in TRAINING.items():
        starts.append(tmp_path / f"keep{keep}")
        trained.append(tmp_path / f"run{keep}")
        assert compress([str(dense), str(starts[-1]), "--method=svd", f"--keep={keep}"]) == 0
        changes = {"init_from": starts[-1], "data.tokenizer": starts[-1], **fields}
        output = runs.run(*runs.flags(trained[-1], runs.corpus(tmp_path), **changes))
        assert output[0] == 0, output[1]
    out = tmp_path / "out"
    arguments = ["--window=16", "--decode=2", "--rounds=1", f"--out={out}"]
    assert main([str(dense), *map(str, trained), f"--text={text}", *arguments]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| loro adam K=10") == printed.count("| lowrank") == 1
    rows = json.loads((out / "healing.json").read_text())["rows"]
    assert (out / "healing.png").read_bytes().startswith(b"\x89PNG")
    assert [row["size"] for row in rows] == ["dense", *["keep0.9"] * 2, *["keep0.5"] * 2]
    directories = [dense, starts[0], trained[0], starts[1], trained[1]]
    for row, directory in zip(rows, directories, strict=True):
        assert row["perplexity"] == pytest.approx(perplexity(directory, text, capsys), rel=1e-4)
        assert row["decoding / dense"] > 0
    # Projections keep 0.9 and 0.5 of their parameters (ranks are rounded), all else stays.
    model = Llama(preset("tiny", vocab_size=259, scope="none"), nnx.Rngs(0))
    state = nnx.to_flat_state(nnx.state(model.blocks))
    blocks = sum(leaf.size for path, leaf in state if path[-1] == "W")
    for row, keep in ((rows[1], 0.9), (rows[3], 0.5)):
        lost = 1e6 * (rows[0]["parameters M"] - row["parameters M"])
        assert lost / blocks == pytest.approx(1 - keep, abs=0.03)
    # Adam holds two moments beside each weight and its gradient.
    assert rows[2]["memory MB"] == pytest.approx(16 * rows[2]["parameters M"], rel=0.01)
    last = read_rows(trained[0] / "metrics.jsonl")[-1]
    assert rows[2]["tokens"] == last["tokens"] > 0
    assert rows[1]["tokens"] is None


def test_bad_input_is_named_in_one_line(dense, tmp_path, capsys):
    text = f"--text={dense.parent / 'text.txt'}"
    run = tmp_path / "run"
    assert runs.run(*runs.flags(run, runs.corpus(tmp_path), steps=1, warmup_steps=0))[0] == 0
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, expected in (
        ([dense, dense, text], "expected a run"),
        ([dense, run, text], "config.init_from = None; expected a directory of"),
        ([run, run, text], "is no directory in Hugging Face's format"),
        ([dense, tmp_path / "none", text], "holds no config.json"),
        ([dense, run, text, "--decode=0"], "--decode=0: expected at least 1"),
        ([dense, run, text, f"--out={tmp_path / 'full'}"], "exists already"),
    ):
        assert main([str(one) for one in arguments]) == 1
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1
        assert expected in errors[0]
