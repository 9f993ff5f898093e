"""The command that looks inside models: tables, files, lines, comparisons, bad input."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx

from loro_jax.commands.compare import main as compare
from loro_jax.commands.evaluate import main as evaluate
from loro_jax.commands.inspect import main
from loro_jax.study.over import over_field
from loro_jax.text.tokenizers.tokenizer import load_tokenizer
from loro_jax.training.config import Config
from models import Llama, preset
from models.huggingface import write_model
from tests.training import runs

FIGURES = ("conditions.png", "norms.png", "stable_ranks.png", "spectra.png")
TEXT = "one two three four\n\nfive six seven\n\neight"


def write(folder, seed, keep_factors, **changes):
    model = Llama(preset("tiny", vocab_size=259, **changes), nnx.Rngs(seed))
    files = load_tokenizer("bytes").files()
    ids = {"eos_token_id": 1, "pad_token_id": 0}
    write_model(model, folder, keep_factors=keep_factors, files=files, token_ids=ids)
    return model


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A model with factors and a dense one of the same architecture, and a text."""
    folder = tmp_path_factory.mktemp("models")
    write(folder / "pairs", 0, True)
    write(folder / "dense", 1, False, scope="none")
    (folder / "text.txt").write_text(TEXT)
    return folder


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_models_in_hugging_face_s_format(directories, tmp_path, capsys):
    names = [str(directories / name) for name in ("pairs", "dense")]
    assert main([*names, f"--out={tmp_path / 'out'}"]) == 0
    out = capsys.readouterr().out
    assert out.count("| attention/q ") == 4  # B A, B, A; W
    assert all(is_png(tmp_path / "out" / name) for name in FIGURES)
    found = json.loads((tmp_path / "out" / "inspect.json").read_text())["found"]
    assert [one["directory"] for one in found] == names
    model = Llama(preset("tiny", vocab_size=259), nnx.Rngs(0))
    B, A = (np.asarray(factor[...], np.float64) for factor in model.blocks.mlp.down.factors())
    for matrix in found[0]["checkpoints"][0]["matrices"]:
        if (matrix["name"], matrix["part"]) == ("mlp/down", "B A"):
            values = np.linalg.svd(B[matrix["layer"]] @ A[matrix["layer"]], compute_uv=False)
            np.testing.assert_allclose(matrix["singular_values"], values[: B.shape[2]], rtol=1e-5)
            assert matrix["condition"] == pytest.approx(values[0] / values[B.shape[2] - 1])


@pytest.mark.slow
def test_the_ends_of_a_line_have_the_perplexities_of_the_models(directories, tmp_path, capsys):
    names = [str(directories / name) for name in ("pairs", "dense")]
    text = str(directories / "text.txt")
    arguments = ["--between", *names, f"--text={text}", "--window=16", f"--out={tmp_path / 'out'}"]
    assert main(arguments) == 0
    assert "dense weights between" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "inspect.json").read_text())["found"]
    assert [row["t"] for row in rows] == pytest.approx(np.linspace(0, 1, 11))
    assert is_png(tmp_path / "out" / "line.png")
    for name, row in zip(names, (rows[0], rows[-1]), strict=True):
        assert evaluate([name, text, "--split=all", "--window=16", "--json"]) == 0
        expected = json.loads(capsys.readouterr().out)["perplexity"]
        assert row["perplexity"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_runs_over_training_and_between(tmp_path, capsys):
    source = runs.corpus(tmp_path)
    changes = {"steps": 24, "keep_checkpoints": 9, "inspect_every": 8}
    ends = [str(tmp_path / name) for name in ("a", "b")]
    for seed, end in enumerate(ends):
        status, output = runs.run(*runs.flags(end, source, seed=seed, **changes))
        assert status == 0, output
    assert main([ends[0], f"--out={tmp_path / 'out'}"]) == 0
    out = capsys.readouterr().out
    assert "over training" in out
    (found,) = json.loads((tmp_path / "out" / "inspect.json").read_text())["found"]
    assert [one["step"] for one in found["checkpoints"]] == [11, 22, 24]
    assert [row["step"] for row in found["rows"]] == [0, 8, 16, 24]
    assert main(["--between", *ends, f"--out={tmp_path / 'line'}"]) == 0
    rows = json.loads((tmp_path / "line" / "inspect.json").read_text())["found"]
    for end, row in zip(ends, (rows[0], rows[-1]), strict=True):
        last = [row["val_ppl"] for row in runs.rows(end) if "val_ppl" in row][-1]
        assert row["perplexity"] == pytest.approx(last, rel=1e-4)


def comparison(folder, values):
    """The directory of a comparison of LORO with these K."""
    found = []
    for k, perplexities in values.items():
        for seed, perplexity in enumerate(perplexities):
            arm = f"k{k}"
            run = folder / arm / "lr0.01" / f"seed{seed}"
            run.mkdir(parents=True)
            config = dataclasses.replace(Config(), exact_every=k, seed=seed)
            (run / "config.json").write_text(config.to_json())
            row = {"arm": arm, "method": "loro", "changes": {"exact_every": k}, "seed": seed}
            found.append({**row, "learning_rate": 0.01, "perplexity": perplexity})
    (folder / "table.json").write_text(json.dumps({"runs": found}))
    return folder


def test_perplexity_over_a_field(tmp_path, capsys):
    folder = comparison(tmp_path / "compared", {100: [22.0, 24.0], 10: [20.0], 1000: [None]})
    rows = over_field(folder, "exact_every")
    assert [(row["arm"], row["exact_every"], row["perplexity"]) for row in rows] == [
        ("loro", 10, 20.0),
        ("loro", 100, 23.0),
        ("loro", 1000, None),
    ]
    assert [(row["spread"], row["seeds"], row["diverged"]) for row in rows] == [
        (0.0, 1, 0),
        (2.0, 2, 0),
        (None, 0, 1),
    ]
    assert main([str(folder), "--over=exact_every", f"--out={tmp_path / 'out'}"]) == 0
    assert "diverged" in capsys.readouterr().out
    assert is_png(tmp_path / "out" / "over.png")
    assert main([str(folder), "--over=model.rank"]) == 1
    assert "all runs have the same model.rank" in capsys.readouterr().err
    assert main([str(folder), "--over=model.rang"]) == 1
    assert "no such field" in capsys.readouterr().err


@pytest.mark.slow
def test_the_directory_that_compare_writes_is_read(tmp_path, capsys):
    source = runs.corpus(tmp_path)
    path = tmp_path / "c.py"
    fields = "steps=6, batch_size=4, sequence_length=32, warmup_steps=2, tensorboard=False"
    path.write_text(
        "from loro_jax.text.config import DataConfig\nfrom loro_jax.training.config import Config\n"
        f"from models import preset\n\n\ndef get_config():\n    return Config({fields}, "
        "exact_method='svd', model=preset('tiny', vocab_size=0), "
        f"data=DataConfig(source={str(source)!r}, tokenizer='bytes', max_eval_sequences=4))\n"
    )
    arms = ["--methods=", "--arm=a=loro,exact_every=2", "--arm=b=loro,exact_every=5"]
    assert compare([str(path), *arms, "--seeds=0", f"--out={tmp_path / 'out'}"]) == 0
    rows = over_field(tmp_path / "out", "exact_every")
    assert [(row["arm"], row["exact_every"]) for row in rows] == [("loro", 2), ("loro", 5)]
    assert all(row["perplexity"] > 1 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected at least one DIR"),
        (["{missing}"], "is not a run directory"),
        (["{dense}", "{missing}"], "is not a run directory"),
        (["{dense}", "--out={dense}"], "exists already"),
        (["--between", "{dense}", "{pairs}"], "there is no validation set; say --text"),
        (["{dense}", "--between", "{dense}", "{pairs}"], "takes no other DIR"),
        (["--between", "{dense}", "{pairs}", "--text={missing}"], "SOURCE = "),
        (["{dense}", "--text=a"], "--text is for --between"),
        (["{dense}", "--window=1"], "--window=1: expected at least 2"),
        (["{dense}", "{pairs}", "--over=seed"], "--over reads one DIR"),
        (["{dense}", "--over=seed"], "holds no table.json"),
    ],
)
def test_bad_input_is_one_line_and_no_file(directories, tmp_path, capsys, arguments, message):
    places = {name: str(directories / name) for name in ("pairs", "dense", "missing")}
    given = [argument.format(**places) for argument in arguments]
    if not any(one.startswith("--out") for one in given):
        given.append(f"--out={tmp_path / 'out'}")
    assert main(given) == 1
    error = capsys.readouterr().err
    assert message in error
    assert (error.count("\n"), error[:7]) == (1, "error: ")
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_checkpoints_is_named(tmp_path, capsys):
    (tmp_path / "config.json").write_text(Config().to_json())
    (tmp_path / "checkpoints").mkdir()
    assert main([str(tmp_path)]) == 1
    assert "holds no checkpoint" in capsys.readouterr().err
