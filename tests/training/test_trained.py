"""Models of runs, taken out of their directories and put into new ones."""

import dataclasses
import importlib.resources
import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from loro_jax.__main__ import main
from loro_jax.commands.evaluate import main as evaluate
from loro_jax.errors import TrainingError
from loro_jax.text.config import DataConfig
from loro_jax.text.prepare import prepare
from loro_jax.text.sources import shares_text
from loro_jax.text.tokenizers.tokenizer import load_tokenizer
from loro_jax.training.config import DIRECTIONS, METHODS, Config
from loro_jax.training.config_differences import differences
from loro_jax.training.loop import train
from loro_jax.training.trained import load_config, load_model, load_run
from models import LlamaConfig, preset
from models.huggingface import read_model
from tests.training import runs

NOVEL = importlib.resources.files("loro_jax.text") / "corpus" / "valid.txt"
TEXT = NOVEL.read_text(encoding="utf-8")[10_000:10_120]


@pytest.fixture(scope="module")
def make_config(tmp_path_factory):
    source = runs.corpus(tmp_path_factory.mktemp("text"))

    def make(**changes):
        model = preset("tiny", vocab_size=0, max_sequence_length=64)
        fields = {
            "steps": 8,
            "batch_size": 4,
            "sequence_length": 32,
            "warmup_steps": 2,
            "exact_every": 4,
            "eval_every": 8,
            "checkpoint_every": 4,
            "tensorboard": False,
            "exact_method": "svd",  # the quickest to compile
            "model": model,
            "data": DataConfig(source=str(source), max_eval_sequences=4),
        }
        return Config(**{**fields, **changes})

    return make


@pytest.fixture(scope="module")
def run(make_config, tmp_path_factory):
    """A run's directory and its last validation perplexity."""
    workdir = tmp_path_factory.mktemp("run") / "run"
    return workdir, train(make_config(), str(workdir)).val_ppl


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The run's model, merged and with its factors."""
    folder = tmp_path_factory.mktemp("exported")
    assert main(["export", str(run[0]), str(folder / "merged")]) == 0
    assert main(["export", str(run[0]), str(folder / "factored"), "--keep_factors"]) == 0
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_last_model_of_a_run_and_an_earlier_one(run):
    before = contents(run[0])
    last, earlier = load_run(run[0]), load_run(run[0], step=4)
    assert (last.step, earlier.step) == (8, 4)
    assert not np.array_equal(last.model.embedding[...], earlier.model.embedding[...])
    assert last.tokenizer.vocab_size == 2048
    assert last.config == load_config(run[0] / "config.json")
    assert contents(run[0]) == before


def test_a_stored_config_is_read_as_it_was(make_config, tmp_path):
    config = make_config(lr_scale=0.5, model=LlamaConfig(num_kv_heads=4, rank=3))
    (tmp_path / "config.json").write_text(config.to_json())
    assert load_config(tmp_path / "config.json") == config
    content = json.loads(config.to_json())
    del content["init_from"], content["model"]["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert load_config(tmp_path / "config.json") == config
    for bad in ("{", "[]", '{"stpes": 3}'):
        (tmp_path / "config.json").write_text(bad)
        with pytest.raises(TrainingError, match=r"config\.json can't be read"):
            load_config(tmp_path / "config.json")


def test_what_is_no_run_is_named(run, tmp_path):
    with pytest.raises(TrainingError, match="is not a run directory"):
        load_run(tmp_path)
    with pytest.raises(TrainingError, match="no checkpoint of step 5; expected one of 4, 8"):
        load_run(run[0], step=5)
    shutil.copy(run[0] / "config.json", tmp_path)
    with pytest.raises(TrainingError, match="holds no checkpoint"):
        load_run(tmp_path)
    shutil.copytree(run[0] / "checkpoints", tmp_path / "checkpoints")
    for path in (tmp_path / "checkpoints" / "8").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 0xFF
            path.write_bytes(data)
    with pytest.raises(TrainingError, match="checkpoints/8 can't be read"):
        load_run(tmp_path)


@pytest.mark.slow
def test_a_run_on_chats(make_config, tmp_path, capsys):
    """Trained, exported with its template, and answering messages."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    (tmp_path / "chat.jinja").write_text(template)
    answers = [f"{number} ships." for number in ("One", "Two", "Ten", "No", "All", "Six")]
    rows = [
        [{"role": "user", "content": f"How many? {i}"}, {"role": "assistant", "content": answer}]
        for i, answer in enumerate(answers)
    ]
    for name, some in (("train", rows[:4]), ("held_out", rows[4:])):
        lines = "".join(json.dumps({"messages": row}) + "\n" for row in some)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    data = DataConfig(
        source=str(tmp_path / "train.jsonl"),
        validation=str(tmp_path / "held_out.jsonl"),
        format="chat",
        chat_template=str(tmp_path / "chat.jinja"),
        shape="padded",
    )
    changes = {"steps": 2, "warmup_steps": 0, "method": "full", "batch_size": 2}
    trained = train(make_config(data=data, **changes), str(tmp_path / "run"))
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert trained.val_ppl > 1
    tokenizer = load_run(tmp_path / "run").tokenizer
    most = max(len(ids) + 1 for ids in tokenizer.encode(answers))
    assert all(0 < row["tokens"] <= 4 * most for row in rows if "loss" in row)
    assert not tokenizer.adds_bos
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/chat_template.jinja").read_text() == template
    prompts = [["--prompt=user: Why?</s>assistant: "], ["--chat", "--prompt=Why?"]]
    texts = []
    for prompt in prompts:
        capsys.readouterr()
        options = ["--temperature=0", "--max_new_tokens=4", *prompt]
        assert main(["generate", str(tmp_path / "run"), *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].endswith(texts[1])


def test_transformers_computes_what_the_run_does_from_text_to_logits(run, exported):
    torch = pytest.importorskip("torch", reason="the counterpart needs torch")
    transformers = pytest.importorskip("transformers", reason="the counterpart needs transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported / "merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported / "merged")
    ours = load_run(run[0])
    assert tokenizer.eos_token_id == theirs.config.eos_token_id == ours.tokenizer.eos_id
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert ids == ours.tokenizer.encode([TEXT])[0]
    assert tokenizer.decode(ids) == TEXT
    with torch.no_grad():
        logits = theirs(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(logits, ours.model(jnp.array([ids])), atol=1e-4)


@pytest.mark.parametrize(
    ("form", "method"),
    [
        ("merged", "loro"),
        pytest.param("merged", "full", marks=pytest.mark.slow),
        pytest.param("factored", "lowrank", marks=pytest.mark.slow),
        pytest.param("merged", "lora", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_from_exported_weights(run, exported, make_config, tmp_path, form, method):
    # The products have the rank of the run, so a truncated SVD of that rank leaves nothing out.
    config = make_config(
        method=method,
        init_from=str(exported / form),
        steps=1,
        learning_rate=1e-12,
        warmup_steps=0,
        eval_every=1,
        model=LlamaConfig(rank=8),  # all else is taken from the directory
    )
    outcome = train(config, str(tmp_path / "run"))
    assert outcome.val_ppl == pytest.approx(run[1], rel=1e-4)
    stored = load_config(tmp_path / "run" / "config.json")
    assert stored.model.hidden_size == 32
    assert train(config, str(tmp_path / "run")).val_ppl == outcome.val_ppl  # resumes


@pytest.mark.parametrize("form", ["run", "merged", "factored"])
def test_the_command_evaluates_as_the_run_did(run, exported, make_config, tmp_path, capsys, form):
    directory = run[0] if form == "run" else exported / form
    source = make_config().data.source
    tokens = 4 * 32 + 1  # of the run's validation set
    arguments = [str(directory), source, "--window=32", f"--max_tokens={tokens}"]
    # A run knows its own source; of other files all is taken.
    split = [] if form == "run" else ["--split=validation"]
    assert evaluate([*arguments, *split, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == tokens - 1
    assert found["perplexity"] == pytest.approx(run[1], rel=1e-5)
    assert evaluate([*arguments, "--split=all", "--stride=8"]) == 0
    assert "windows of 32 every 8" in capsys.readouterr().out
    for bad in (["--window=65"], ["--stride=33"], ["--batch_size=0"], ["--max_tokens=-1"]):
        assert evaluate([*arguments, *bad]) == 1
    (tmp_path / "empty.txt").write_text("")
    assert evaluate([str(directory), str(tmp_path / "empty.txt")]) == 1
    errors = capsys.readouterr().err
    assert errors.count("error: ") == errors.count("\n") == 5


def evaluated(capsys, *arguments):
    """Tokens and perplexity that the command says."""
    assert evaluate([*map(str, arguments), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    return row["tokens"], row["perplexity"]


@pytest.mark.parametrize("form", ["run", "merged"])
def test_all_of_a_file_of_the_users_own_is_evaluated(run, exported, tmp_path, capsys, form):
    directory = run[0] if form == "run" else exported / form
    texts = [f"Text number {i}, of my own." for i in range(3)]  # too few for one in a hundred
    (tmp_path / "a.txt").write_text("\r\n\r\n".join(texts) + "\r\n")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    _, tokenizer = load_model(directory)
    tokens = sum(len(ids) + 1 for ids in tokenizer.encode(texts))
    named = evaluated(capsys, directory, tmp_path / "a.txt")
    assert named[0] == tokens - 1
    assert evaluated(capsys, directory, tmp_path / "a.*")[0] == 2 * tokens - 1
    assert evaluated(capsys, directory, tmp_path / "a.jsonl", "--split=all") == named
    assert evaluate([str(directory), str(tmp_path / "a.txt"), "--split=validation"]) == 1
    assert "0 tokens of --split=validation; expected" in capsys.readouterr().err


def test_the_runs_own_source_keeps_its_split_however_it_is_named(run, make_config, tmp_path):
    source = pathlib.Path(make_config().data.source)
    link = tmp_path / "link.txt"
    link.symlink_to(source)
    for name in (str(source), f"{source.parent}/*.txt", str(link), f"{link},1;none/*.txt,2"):
        assert shares_text(name, str(source))
    assert not shares_text(str(tmp_path / "other.txt"), str(source))
    prepare(DataConfig(source=str(source)), load_run(run[0]).tokenizer, str(tmp_path / "out"))
    assert shares_text(str(source), f"{tmp_path / 'out'},1;embedded,1")


def test_no_padding_token_said_as_minus_one(exported, tmp_path):
    directory = tmp_path / "old"
    shutil.copytree(exported / "merged", directory)
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(content | {"pad_token_id": -1}))
    assert load_model(directory)[1].pad_id >= 0


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_end_of_text_that_the_tokenizer_lacks_is_named_by_its_file(exported, tmp_path, name):
    directory = tmp_path / "there"
    shutil.copytree(exported / "merged", directory)
    path = directory / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | {"eos_token_id": [1, 5000]}))
    with pytest.raises(TrainingError) as caught:
        load_model(directory)
    message = str(caught.value)
    assert message.startswith(f"eos_token_id of {path} = 5000 is outside the vocabulary of ")
    assert message.endswith("(0 to 2047).")


def test_an_end_of_text_from_the_run_to_start_from_is_named_by_it(run, make_config, tmp_path):
    directory = tmp_path / "there"
    shutil.copytree(run[0], directory)
    stored = json.loads((directory / "config.json").read_text())
    stored["data"]["eos_id"] = 5000
    (directory / "config.json").write_text(json.dumps(stored))
    data = make_config().data
    same = dataclasses.replace(data, tokenizer="init_from")
    with pytest.raises(TrainingError) as caught:
        train(make_config(init_from=str(directory), data=same), str(tmp_path / "run"))
    assert str(caught.value).startswith(f"data.eos_id of {directory / 'config.json'} = 5000 is out")
    given = dataclasses.replace(data, eos_id=6000)
    with pytest.raises(TrainingError, match=r"^config\.data\.eos_id = 6000 is outside"):
        train(make_config(init_from=str(directory), data=given), str(tmp_path / "run"))


BAD_STARTS = {
    "nothing": ({"init_from": "nowhere"}, "config.init_from: nowhere is not a directory"),
    "another rank": (
        {"model": LlamaConfig(rank=4)},
        r"q_proj\.A has shape \(8, 32\); expected \(4, 32\)",
    ),
    "factors for a dense model": ({"method": "full"}, "q_proj is stored as A, B; expected"),
    "a larger tokenizer, with an end of text beyond theirs": (
        {"data": DataConfig(tokenizer="embedded", eos_id=2000)},
        "config.data.tokenizer = 'embedded' has 2048 ids, but .* has 259",
    ),
    "another tokenizer": (
        {"data": DataConfig(tokenizer="bytes")},
        "config.data.tokenizer = 'bytes' has 259 ids, but .* has 2048",
    ),
}


@pytest.mark.parametrize("case", BAD_STARTS)
def test_starts_that_do_not_fit_are_named(exported, make_config, tmp_path, case):
    changes, message = BAD_STARTS[case]
    config = make_config(init_from=str(exported / "factored"))
    if "larger" in case:
        directory = tmp_path / "there"
        shutil.copytree(exported / "factored", directory)
        for path in directory.glob("tokenizer*"):
            path.unlink()
        for name, content in load_tokenizer("bytes").files().items():
            (directory / name).write_bytes(content)
        config = dataclasses.replace(config, init_from=str(directory))
    if "data" in changes:
        changes = {"data": dataclasses.replace(changes["data"], source=config.data.source)}
    with pytest.raises(TrainingError, match=message) as caught:
        train(dataclasses.replace(config, **changes), str(tmp_path / "run"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_command_imports_and_prints_errors(exported, tmp_path, capsys):
    arguments = [str(exported / "merged"), str(tmp_path / "small"), "--rank=4"]
    assert main(["import", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "| projection | shape | rank | relative error |" in printed
    assert "| model.layers.1.mlp.down_proj | 32 x 48 | 4 |" in printed
    model, _ = read_model(tmp_path / "small")
    assert model.config.rank == 4
    assert (tmp_path / "small" / "tokenizer.json").exists()
    assert main(["import", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert main(["export", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "is not a run directory" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "size"), [("5GB", 5e9), ("200MB", 2e8), ("1.5k", 1500)])
def test_sizes_of_files(exported, tmp_path, text, size):
    from loro_jax.commands.weights import _size

    assert _size(text) == size
    with pytest.raises(SystemExit):
        main(["import", str(exported), str(tmp_path / "out"), "--shard_bytes=large"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_stored_config_is_read_again(method, direction, tmp_path):
    direction = direction if "direction" in METHODS[method].uses else "adam"
    config = Config(method=method, direction=direction, exact_every=10, restart_warmup_steps=2)
    path = tmp_path / "config.json"
    path.write_text(config.to_json(), encoding="utf-8")
    assert differences(json.loads(config.to_json()), load_config(path)) == []


def test_an_option_that_only_factors_use_is_read_at_its_default(tmp_path):
    """Earlier versions stored it in the configs of dense runs."""
    content = json.loads(Config(method="full", direction="orthogonal").to_json())
    content["method_options"]["damping"] = 1e-3
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    assert load_config(path).method == "full"
