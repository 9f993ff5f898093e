import json
import pathlib
import subprocess
import sys

import pytest
import tokenizers

from configs.default import get_config
from loro_jax.errors import TrainingError
from loro_jax.text.config import DataConfig
from loro_jax.text.sources import source_parts
from loro_jax.text.tokenizers.tokenizer import load_tokenizer
from loro_jax.text.tokenizers.training import train_byte_level, train_sentencepiece
from loro_jax.training.config import Config
from loro_jax.training.vocabulary import resolve_vocabulary
from models import LlamaConfig
from tests.helpers import command

ROOT = pathlib.Path(__file__).parents[2]
TEXT = 'He said: "Aye, aye!"  —  twelve £5 notes\nand a parrot \u2028 (naïve) 日本 \U0001f99c'


@pytest.fixture(scope="module")
def novel():
    """Paragraphs of the embedded novels."""
    data = DataConfig()
    parts, _ = source_parts("embedded", data)
    from loro_jax.text.readers import Tally

    return list(parts[1].read(Tally("SOURCE", skip=True)))[:1500]


@pytest.fixture(scope="module")
def trained(novel, tmp_path_factory):
    """One tokenizer of either kind, trained on a part of a novel."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "t.json").write_text(train_byte_level(iter(novel), 600), encoding="utf-8")
    (folder / "t.model").write_bytes(train_sentencepiece(iter(novel), 600))
    return folder


@pytest.mark.parametrize("name", ["embedded", "bytes", "t.json", "t.model"])
def test_texts_come_back_whole(trained, name):
    tokenizer = load_tokenizer(str(trained / name) if "." in name else name)
    ids = tokenizer.encode([TEXT, ""])
    assert tokenizer.decode(ids[0]) == TEXT
    assert ids[1] == []
    assert max(ids[0]) < tokenizer.vocab_size
    assert tokenizer.eos_id not in ids[0]


@pytest.mark.parametrize("name", ["t.json", "t.model"])
def test_trained_tokenizers_have_learnt_the_text(trained, novel, name):
    tokenizer = load_tokenizer(str(trained / name))
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_id) == (600, 0, 1)
    ids = tokenizer.encode(novel)
    text_bytes = sum(len(text.encode()) for text in novel)
    assert sum(map(len, ids)) < 0.55 * text_bytes
    assert [tokenizer.decode(one) for one in ids] == novel


def test_special_ids_vanish_in_decoding(trained):
    for name in ("embedded", "bytes", str(trained / "t.json")):
        tokenizer = load_tokenizer(name)
        ids = tokenizer.encode(["ship"])[0]
        assert tokenizer.decode([*ids, tokenizer.eos_id, tokenizer.pad_id]) == "ship"


@pytest.mark.parametrize("name", ["embedded", "t.json", "t.model"])
def test_text_that_looks_like_a_special_token_is_text(trained, name):
    tokenizer = load_tokenizer(str(trained / name) if "." in name else name)
    (ids,) = tokenizer.encode(["before</s>after<pad>"])
    assert not {tokenizer.eos_id, tokenizer.pad_id} & set(ids)
    assert tokenizer.decode(ids) == "before</s>after<pad>"


def test_fingerprints_tell_tokenizers_apart(trained):
    names = ["embedded", "bytes", str(trained / "t.json"), str(trained / "t.model")]
    assert len({load_tokenizer(name).fingerprint for name in names}) == 4


def test_t5_and_llama_models(shared_data):
    t5 = load_tokenizer(str(shared_data / "tokenizers" / "t5_spiece.model"))
    assert (t5.vocab_size, t5.pad_id, t5.eos_id) == (32_000, 0, 1)
    assert t5.decode(t5.encode(["The quick brown fox."])[0]) == "The quick brown fox."
    llama = load_tokenizer(str(shared_data / "tokenizers" / "mistral_v1_32000.model"))
    assert (llama.vocab_size, llama.eos_id) == (32_000, 2)


def check_files(tokenizer, folder, texts):
    """The files that it writes give the same ids and special tokens."""
    folder.mkdir()
    for name, data in tokenizer.files().items():
        (folder / name).write_bytes(data)
    again = load_tokenizer(str(folder))
    assert again.encode(texts) == tokenizer.encode(texts)
    assert (again.eos_id, again.vocab_size) == (tokenizer.eos_id, tokenizer.vocab_size)
    return again


SPACES = ["", " ", "  two  spaces ", "lines\n\n\ttab", "a \u2581 b"]


@pytest.mark.parametrize("name", ["embedded", "bytes", "t.json", "t.model"])
def test_the_files_for_other_programs_give_the_same_ids(trained, novel, name, tmp_path):
    tokenizer = load_tokenizer(str(trained / name) if "." in name else name)
    again = check_files(tokenizer, tmp_path / "out", [*novel[:200], TEXT, *SPACES])
    assert again.decode(again.encode([TEXT])[0]) == TEXT


@pytest.mark.parametrize("name", ["t5_spiece.model", "mistral_v1_32000.model"])
def test_the_files_of_known_models_give_the_same_ids(shared_data, novel, name, tmp_path):
    tokenizer = load_tokenizer(str(shared_data / "tokenizers" / name))
    check_files(tokenizer, tmp_path / "out", [*novel[:200], TEXT, *SPACES])


def test_transformers_reads_the_same_ids(trained):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(trained / "t.json"))
    ours = load_tokenizer(str(trained / "t.json"))
    assert ours.encode([TEXT])[0] == theirs.encode(TEXT, add_special_tokens=False)


class TestSpecialIds:
    def write(self, folder, tokens, beside=None):
        """A tokenizer of bytes with these special tokens, alone or in a model's directory."""
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=300,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(["text"], trainer)
        tokenizer.add_special_tokens(tokens)
        # What a fine-tuned model's file may ask for must not cut or fill documents.
        tokenizer.enable_truncation(4)
        tokenizer.enable_padding(length=9)
        tokenizer.save(str(folder / "tokenizer.json"))
        if beside is not None:
            (folder / "tokenizer_config.json").write_text(json.dumps(beside))
        return str(folder)

    def test_from_the_config_beside(self, tmp_path):
        beside = {"eos_token": {"content": "<stop>", "special": True}, "pad_token": "<fill>"}
        path = self.write(tmp_path, ["</s>", "<fill>", "<stop>"], beside)
        tokenizer = load_tokenizer(path)
        assert tokenizer.decode([tokenizer.encode(["a"])[0][0], tokenizer.eos_id]) == "a"
        assert tokenizer.eos_id == tokenizer.vocab_size - 1
        assert tokenizer.pad_id == tokenizer.vocab_size - 2
        assert len(tokenizer.encode(["twelve and more"])[0]) > 9

    def test_by_their_usual_names(self, tmp_path):
        tokenizer = load_tokenizer(self.write(tmp_path, ["<|endoftext|>"]))
        assert tokenizer.eos_id == tokenizer.pad_id == tokenizer.vocab_size - 1

    def test_by_number(self, tmp_path):
        path = self.write(tmp_path, ["<unusual>"])
        with pytest.raises(TrainingError, match=r"does not say which token ends.*data\.eos_id"):
            load_tokenizer(path)
        assert load_tokenizer(path, eos_id=256).eos_id == 256
        tokenizer = load_tokenizer(path, eos_id=256, pad_id=7)
        assert (tokenizer.eos_id, tokenizer.pad_id) == (256, 7)
        assert load_tokenizer("bytes", eos_id=2).eos_id == 2
        assert load_tokenizer("bytes").eos_id == 1

    @pytest.mark.parametrize("field", ["eos_id", "pad_id"])
    @pytest.mark.parametrize("value", [-1, 259])
    def test_outside_the_vocabulary(self, field, value):
        with pytest.raises(
            TrainingError, match=rf"data\.{field} = {value} is outside .* \(0 to 258"
        ):
            load_tokenizer("bytes", **{field: value})

    def test_a_config_beside_that_is_none(self, tmp_path):
        path = self.write(tmp_path, ["</s>"])
        (tmp_path / "tokenizer_config.json").write_text("oops")
        with pytest.raises(TrainingError, match="next to the tokenizer, can't be read as JSON"):
            load_tokenizer(path)


@pytest.mark.parametrize("name", ["nowhere.model", "nowhere.json"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(TrainingError, match=rf"{name}.*No such file"):
        load_tokenizer(str(tmp_path / name))


@pytest.mark.parametrize("content", ["not a model", ""])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("bad.model", "a SentencePiece model"),
        ("bad.json", "a tokenizer.json"),
        ("BAD.JSON", "a tokenizer.json"),
    ],
)
def test_a_file_of_something_else_is_named(tmp_path, name, kind, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(TrainingError, match=f"is not {kind}"):
        load_tokenizer(str(tmp_path / name))


def test_the_models_vocabulary_is_the_tokenizers_rounded_up():
    tokenizer = load_tokenizer("bytes")
    config = Config(model=LlamaConfig(vocab_size=0), data=DataConfig(tokenizer="bytes"))
    config.validate()
    assert resolve_vocabulary(config, tokenizer)[0].model.vocab_size == 384
    config.data.vocab_multiple = 7
    resolved, line = resolve_vocabulary(config, tokenizer)
    assert resolved.model.vocab_size == 259
    assert line.endswith("model: 259 ids (a multiple of 7)")
    config.model.vocab_size = 300
    assert resolve_vocabulary(config, tokenizer)[0].model.vocab_size == 300
    config.model.vocab_size = 100
    with pytest.raises(TrainingError, match=r"vocab_size = 100 .* 259 ids"):
        resolve_vocabulary(config, tokenizer)


def test_the_default_config_takes_the_vocabulary_of_any_tokenizer(trained):
    for name, size in (("embedded", 2048), ("bytes", 384), (str(trained / "t.json"), 640)):
        config = get_config()
        config.data.tokenizer = name
        config.validate()
        assert resolve_vocabulary(config, load_tokenizer(name))[0].model.vocab_size == size


def train(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "loro_jax", "tokenizer", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["own.json", "own.model"])
def test_the_command_trains_on_ones_own_files(tmp_path, novel, name):
    (tmp_path / "a.txt").write_text("\n\n".join(novel), encoding="utf-8")
    status, output = train(
        tmp_path / "*.txt", f"--out={tmp_path / name}", "--vocab_size=400", "--documents=800"
    )
    assert status == 0, output
    assert f"{name}: 400 ids, end of text 1, padding 0" in output
    assert load_tokenizer(str(tmp_path / name)).vocab_size == 400


def test_errors_of_the_command(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree")
    source = tmp_path / "a.txt"
    for arguments, message in (
        ((source, f"--out={tmp_path / 'a.bpe'}"), "ends in .json or .model"),
        ((source, f"--out={tmp_path / 'no' / 'a.json'}"), "there is no directory"),
        ((source, f"--out={tmp_path / 'a.json'}", "--vocab_size=99"), "at least 260"),
        ((tmp_path / "b*", f"--out={tmp_path / 'a.json'}"), "error: SOURCE = "),
        ((source, f"--out={tmp_path / 'a.model'}"), "--vocab_size=32000 does not suit"),
    ):
        status, output = command("tokenizer", *arguments)
        assert status == 1, output
        assert message in output
        assert "Traceback" not in output
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    status, output = command(
        "tokenizer", source, f"--out={tmp_path / 'a.json'}", "--vocab_size=300"
    )
    assert (status, "fewer than --vocab_size=300" in output) == (0, True)
