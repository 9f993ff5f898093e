"""Special tokens in texts, prompts and configs, for every kind of tokenizer.json."""

import io
import json

import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from loro_jax.errors import TrainingError
from loro_jax.text.documents import Chunk, Position
from loro_jax.text.encoding import encode_chunks, encode_document
from loro_jax.text.tokenizers.tokenizer import SentencePieceTokenizer, load_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "[SEP]"]
LETTERS = sorted(set("<>/[]|spadunkSEPhelowrtxy .!\u2581\u0120"))
PIECES = ["he", "ll", "hell", "hello", "wo", "world", "the", "xy", "</", "s>"]


def unigram(byte_fallback=False):
    names = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256) if byte_fallback)]
    pieces = [(name, 0.0) for name in names]
    pieces += [(letter, -8.0) for letter in LETTERS] + [(piece, -5.0) for piece in PIECES]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, 0, byte_fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def word_level():
    names = [*SPECIAL, *PIECES, *LETTERS]
    model = models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def word_piece():
    names = [*SPECIAL, *PIECES, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    model = models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def bpe(ignore_merges=False, merged=False):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll")]
    names = [*SPECIAL, *alphabet, "he", "ll", "hell"]
    if merged:  # a merge that makes an end of text
        merges += [("<", "/"), ("s", ">"), ("</", "s>"), ("</s>", "x")]
        names += ["</", "s>", "</s>x"]
    ids = {name: i for i, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(models.BPE(ids, merges, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback():
    names = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), *LETTERS, "he", "ll"]
    model = models.BPE(
        {name: i for i, name in enumerate(names)},
        [("h", "e"), ("l", "l")],
        unk_token="<unk>",
        byte_fallback=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


KINDS = {
    "unigram": unigram,
    "unigram with bytes": lambda: unigram(byte_fallback=True),
    "words": word_level,
    "word pieces": word_piece,
    "bytes": bpe,
    "bytes, whole words first": lambda: bpe(ignore_merges=True),
    "bytes, merged": lambda: bpe(merged=True),
    "characters and bytes": byte_fallback,
}
FLAGS = {
    "not added": None,
    "special": {"special": True},
    "normalized": {"special": True, "normalized": True},
    "not called special": {"special": False},
    "with its spaces": {"special": True, "lstrip": True, "rstrip": True},
    "a word": {"special": True, "single_word": True},
}
TEXTS = [
    *("</s>", "hello </s> world", "hello</s>world", "x</s>x", "<s>hello</s>", "<pad>", " <pad> "),
    *("[SEP]", "hello [SEP] world", "</s></s>", "<unk>", "the <unk> ", "</s>\n<pad>", "<s> ]"),
]


def write(folder, tokenizer, flags=None, **beside):
    if flags is not None:
        tokenizer.add_tokens([AddedToken(name, **flags) for name in SPECIAL])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if beside:
        (folder / "tokenizer_config.json").write_text(json.dumps(beside))
    return str(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flags", FLAGS)
def test_special_tokens_in_documents_are_text(tmp_path, kind, flags):
    path = write(
        tmp_path, KINDS[kind](), FLAGS[flags], eos_token="</s>", pad_token="<pad>", bos_token="<s>"
    )
    tokenizer = load_tokenizer(path)
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id) == (2, 3, 1)
    control = {1, 2, 3, 4}
    for text, ids in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
        assert not control & set(ids), text
        assert len(ids) > 0
    assert list(encode_document("x</s>x", tokenizer)).count(2) == 1
    if "bytes" in kind and "unigram" not in kind:
        decoded = [tokenizer.decode(ids) for ids in tokenizer.encode(TEXTS)]
        assert decoded == TEXTS


@pytest.mark.parametrize("kind", KINDS)
def test_other_texts_have_the_librarys_ids(tmp_path, kind):
    made = KINDS[kind]()
    path = write(tmp_path, made, FLAGS["special"], eos_token="</s>")
    texts = ["hello world", "the hell xy!", "he <b> llll", "", " ", "\u00e9t\u00e9 \U0001f99c"]
    ids = [one.ids for one in made.encode_batch(texts, add_special_tokens=False)]
    assert load_tokenizer(path).encode(texts) == ids


def test_tokens_that_are_added_but_not_special_stay_tokens(tmp_path):
    made = bpe()
    made.add_tokens([AddedToken(name, special=True) for name in SPECIAL])
    made.add_tokens([AddedToken("<think>", special=False), AddedToken("    ", normalized=False)])
    made.add_special_tokens(["<|user|>"])
    path = write(tmp_path, made, eos_token="</s>")
    tokenizer = load_tokenizer(path)
    think, spaces, user = (made.token_to_id(name) for name in ("<think>", "    ", "<|user|>"))
    ids = tokenizer.encode(["<think>x    y<|user|>"])[0]
    assert think in ids
    assert spaces in ids
    assert user not in ids
    assert user in tokenizer.encode(["<|user|>"], special=True)[0]
    assert tokenizer.vocab_size == user + 1


def test_text_that_becomes_a_special_token_by_normalization_is_text(tmp_path):
    made = unigram()
    made.normalizer = normalizers.NFKC()
    path = write(tmp_path, made, FLAGS["normalized"], eos_token="</s>")
    (ids,) = load_tokenizer(path).encode(["x\uff1c/s\uff1ey"])
    assert not {1, 2, 3, 4} & set(ids)


def test_padding_with_a_character_leaves_it_in_texts(tmp_path):
    made = bpe()
    made.add_special_tokens(["!"])
    tokenizer = load_tokenizer(write(tmp_path, made, eos_token="</s>", pad_token="!"))
    assert tokenizer.decode(tokenizer.encode(["oh!"])[0]) == "oh!"


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_cut_filled_or_framed(tmp_path, kind):
    made = KINDS[kind]()
    plain = made.encode("hello world the world", add_special_tokens=False).ids
    made.enable_truncation(2)
    made.enable_padding(length=40, pad_id=3, pad_token="<pad>")
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer = load_tokenizer(write(tmp_path, made, FLAGS["special"], eos_token="</s>"))
    assert tokenizer.encode(["hello world the world"]) == [plain]
    assert tokenizer.encode_prompt("hello world the world") == [1, *plain]
    tokenizer.adds_bos = False
    for name, content in tokenizer.files().items():
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_bytes(content)
    again = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert again.encode("hello world the world").ids == plain


class TestPrompts:
    def test_begin_as_the_template_says(self, tmp_path):
        made = bpe()
        made.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single="[SEP] <s> $A", special_tokens=[("<s>", 1), ("[SEP]", 4)]
                ),
            ]
        )
        tokenizer = load_tokenizer(write(tmp_path, made, FLAGS["special"], eos_token="</s>"))
        (x,) = tokenizer.encode(["x"])
        assert (tokenizer.adds_bos, tokenizer.bos_ids) == (True, (4, 1))
        assert tokenizer.encode_prompt("x") == [4, 1, *x]
        assert tokenizer.encode_prompt("x", bos=False) == x
        assert tokenizer.encode_prompt("") == [4, 1]
        assert tokenizer.encode_prompt("[SEP]<s>x", special=True) == [4, 1, *x]

    @pytest.mark.parametrize("says", [True, False])
    def test_begin_as_the_config_says(self, tmp_path, says):
        beside = {"eos_token": "</s>", "bos_token": "<s>", "add_bos_token": says}
        tokenizer = load_tokenizer(write(tmp_path, bpe(), FLAGS["special"], **beside))
        (x,) = tokenizer.encode(["x"])
        assert tokenizer.encode_prompt("x") == ([1, *x] if says else x)
        assert tokenizer.encode_prompt("x", bos=True) == [1, *x]

    def test_of_a_tokenizer_without_a_beginning(self):
        tokenizer = load_tokenizer("bytes")
        assert tokenizer.encode_prompt("A") == [68]
        with pytest.raises(TrainingError, match="'bytes' has no beginning-of-text token"):
            tokenizer.encode_prompt("A", bos=True)

    def test_as_transformers_has_them(self, tmp_path):
        transformers = pytest.importorskip("transformers")
        made = bpe()
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
        path = write(tmp_path, made, FLAGS["special"], eos_token="</s>", bos_token="<s>")
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=f"{path}/tokenizer.json")
        ours = load_tokenizer(path)
        text = "hello</s>world<pad>"
        assert ours.encode_prompt(text, special=True) == theirs(text)["input_ids"]
        theirs = theirs(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
        assert ours.encode([text]) == [theirs]


def sentencepiece_model(**options):
    out = io.BytesIO()
    text = ["call me ishmael some years ago never mind how long", "<sep> </s> hello world"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=out,
        vocab_size=320,
        hard_vocab_limit=False,
        minloglevel=2,
        byte_fallback=True,
        model_type="bpe",
        **options,
    )
    return out.getvalue()


class TestSentencePiece:
    @pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model", "own.model"])
    def test_a_model_alone_is_enough(self, tmp_path, name):
        content = sentencepiece_model()
        (tmp_path / name).write_bytes(content)
        own = sentencepiece.SentencePieceProcessor(model_proto=content)
        tokenizer = load_tokenizer(str(tmp_path))
        assert tokenizer.eos_ids == (own.eos_id(),)
        assert tokenizer.encode(["hello world"]) == [own.encode("hello world")]
        assert tokenizer.encode_prompt("hello") == [own.bos_id(), *own.encode("hello")]

    def test_the_config_beside_it(self, tmp_path):
        (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(control_symbols=["<end>"]))
        beside = {"add_bos_token": False, "eos_token": {"content": "<end>"}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(beside))
        tokenizer = load_tokenizer(str(tmp_path))
        (ids,) = tokenizer.encode(["hello"])
        assert tokenizer.encode_prompt("hello") == ids
        assert tokenizer.encode_prompt("hello<end>", special=True) == [*ids, tokenizer.eos_id]
        assert tokenizer.eos_id not in tokenizer.encode(["hello<end>"])[0]

    def test_tokens_added_after_its_training(self, tmp_path):
        """Chat models keep a LLaMA's model file and number their own tokens from its end on."""
        content = sentencepiece_model()
        own = sentencepiece.SentencePieceProcessor(model_proto=content)
        size = own.vocab_size()
        (tmp_path / "tokenizer.model").write_bytes(content)
        added = {"<|end|>": size, "<|user|>": size + 2, "<s>": 1}
        (tmp_path / "added_tokens.json").write_text(json.dumps(added))
        decoder = {
            str(size): {"content": "<|end|>", "special": True},
            str(size + 3): {"content": "ishmael some", "special": False},
        }
        config = {"eos_token": "<|end|>", "added_tokens_decoder": decoder}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = load_tokenizer(str(tmp_path))
        assert (tokenizer.vocab_size, tokenizer.eos_id) == (size + 4, size)
        prompt = tokenizer.encode_prompt("<|user|>hello<|end|>", bos=False, special=True)
        assert prompt == [size + 2, *own.encode("hello"), size]
        documents = tokenizer.encode(["hello<|end|>", "call me ishmael some years"])
        assert documents[0] == own.encode("hello<|end|>")
        assert documents[1].count(size + 3) == 1
        assert tokenizer.decode([*documents[1], size, size + 1]) == "call me ishmael some years"
        assert tokenizer.fingerprint != SentencePieceTokenizer(content, "own").fingerprint
        # Other programs get the same vocabulary.
        made = tokenizers.Tokenizer.from_str(tokenizer.files()["tokenizer.json"].decode())
        assert made.token_to_id("<|user|>") == size + 2
        assert made.encode("call me ishmael some years").ids == [own.bos_id(), *documents[1]]

    def test_an_added_token_far_beyond_its_vocabulary_is_named(self, tmp_path):
        (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
        (tmp_path / "added_tokens.json").write_text('{"<far>": 1000000000}')
        with pytest.raises(TrainingError, match="added token '<far>' has the id 1000000000"):
            load_tokenizer(str(tmp_path))

    def test_a_symbol_that_ends_texts_is_text_in_documents(self, tmp_path):
        content = sentencepiece_model(user_defined_symbols=["<sep>", "<end>"])
        (tmp_path / "tokenizer.model").write_bytes(content)
        own = sentencepiece.SentencePieceProcessor(model_proto=content)
        sep, end = own.piece_to_id("<sep>"), own.piece_to_id("<end>")
        tokenizer = load_tokenizer(str(tmp_path), eos_id=[own.eos_id(), end])
        (ids,) = tokenizer.encode(["hello<end><sep>"])
        assert end not in ids
        assert sep in ids
        assert tokenizer.encode_prompt("<end>", bos=False, special=True)[-1] == end

    def test_its_tokenizer_json_reads_special_tokens_as_text(self, tmp_path):
        for kind in ("bpe", "unigram"):
            out = io.BytesIO()
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(["the end of the story </s> x <pad> y"] * 20),
                model_writer=out,
                vocab_size=40,
                model_type=kind,
                hard_vocab_limit=False,
                pad_id=3,
                minloglevel=2,
            )
            folder = tmp_path / kind
            folder.mkdir()
            (folder / "one.model").write_bytes(out.getvalue())
            own = load_tokenizer(str(folder / "one.model"))
            for name, content in own.files().items():
                (folder / name).write_bytes(content)
            again = load_tokenizer(str(folder))
            texts = ["the end</s>the story", "<s>x</s> y", "x<pad>y", "</s>", "<unk>"]
            assert again.encode(texts) == own.encode(texts)
            assert again.encode_prompt("x") == own.encode_prompt("x")
            assert (again.bos_id, again.eos_ids) == (own.bos_id, own.eos_ids)


def test_dropout_of_a_byte_pair_encoding_is_left_out(tmp_path):
    tokenizer = bpe()
    right = tokenizer.encode("hello hell", add_special_tokens=False).ids
    tokenizer.model.dropout = 0.5
    path = write(tmp_path, tokenizer)
    ours = load_tokenizer(path)
    assert [ours.encode(["hello hell"])[0] for _ in range(20)] == [right] * 20
    assert [ours.encode_prompt("hello hell", special=True) for _ in range(20)] == [right] * 20
    assert json.loads(ours.files()["tokenizer.json"])["model"]["dropout"] is None


def test_several_end_ids(tmp_path):
    path = write(tmp_path, bpe(), FLAGS["special"])
    tokenizer = load_tokenizer(path, eos_id=[4, 2, 4])
    assert (tokenizer.eos_id, tokenizer.eos_ids) == (4, (4, 2))
    assert load_tokenizer(path).eos_ids == (2,)
    assert load_tokenizer("bytes", eos_id=[1, 2]).eos_ids == (1, 2)
    with pytest.raises(TrainingError, match=r"eos_id = 999 is outside"):
        load_tokenizer(path, eos_id=[2, 999])


@pytest.mark.parametrize("name", ["bytes", "embedded", "json"])
def test_ids_above_the_vocabulary_vanish(tmp_path, name):
    tokenizer = load_tokenizer(write(tmp_path, bpe(), eos_token="</s>") if name == "json" else name)
    (ids,) = tokenizer.encode(["hello"])
    assert tokenizer.decode([*ids, tokenizer.vocab_size, 10**6, tokenizer.eos_id]) == "hello"


def test_documents_begin_where_asked(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, bpe(), eos_token="</s>", bos_token="<s>"))
    (ids,) = tokenizer.encode(["hello"])
    chunk = Chunk(["train"], ["hello"], Position(0, 0, {}))
    for bos, begun in ((False, []), (True, [1])):
        ((_, (document,)),) = encode_chunks([chunk], tokenizer, threads=1, bos=bos)
        assert document.tolist() == [*begun, *ids, 2]


def test_the_map_of_special_tokens_beside(tmp_path):
    path = write(tmp_path, bpe())
    mapping = {"eos_token": {"content": "[SEP]"}, "bos_token": "<s>", "pad_token": None}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(mapping))
    tokenizer = load_tokenizer(path)
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) == (4, 1, 3)
    (tmp_path / "special_tokens_map.json").write_text("[]")
    with pytest.raises(TrainingError, match=r"special_tokens_map\.json.* holds no JSON object"):
        load_tokenizer(path)
