import pytest

from loro_jax.training.errors import TrainingError
from loro_jax.training.tokenizer import load_tokenizer

TEXT = 'He said: "Aye, aye!"  —  twelve £5 notes\nand a parrot \u2028 (naïve) 日本 \U0001f99c'


@pytest.mark.parametrize("name", ["embedded", "bytes"])
def test_texts_come_back_whole(name):
    tokenizer = load_tokenizer(name)
    ids = tokenizer.encode([TEXT, ""])
    assert tokenizer.decode(ids[0]) == TEXT
    assert ids[1] == []
    assert max(ids[0]) < tokenizer.vocab_size
    assert tokenizer.eos_id not in ids[0]


def test_special_ids_vanish_in_decoding():
    for tokenizer in (load_tokenizer("embedded"), load_tokenizer("bytes")):
        ids = tokenizer.encode(["ship"])[0]
        assert tokenizer.decode([*ids, tokenizer.eos_id, tokenizer.pad_id]) == "ship"


def test_fingerprints_tell_tokenizers_apart():
    assert load_tokenizer("embedded").fingerprint != load_tokenizer("bytes").fingerprint


def test_t5_and_llama_models(shared_data):
    t5 = load_tokenizer(str(shared_data / "tokenizers" / "t5_spiece.model"))
    assert (t5.vocab_size, t5.pad_id, t5.eos_id) == (32_000, 0, 1)
    assert t5.decode(t5.encode(["The quick brown fox."])[0]) == "The quick brown fox."
    llama = load_tokenizer(str(shared_data / "tokenizers" / "mistral_v1_32000.model"))
    assert (llama.vocab_size, llama.eos_id) == (32_000, 2)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TrainingError, match=r"nowhere\.model.*No such file"):
        load_tokenizer(str(tmp_path / "nowhere.model"))


def test_a_file_of_something_else_is_named(tmp_path):
    path = tmp_path / "bad.model"
    path.write_text("not a model")
    with pytest.raises(TrainingError, match="is not a SentencePiece model"):
        load_tokenizer(str(path))
