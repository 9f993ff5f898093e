"""SentencePiece models as a tokenizer.json, against the library's own ids."""

import functools
import io
import random
import unicodedata

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import normalizers

from loro_jax.errors import TrainingError
from loro_jax.text.config import DataConfig
from loro_jax.text.readers import Tally
from loro_jax.text.sources import source_parts
from loro_jax.text.tokenizers.conversion import from_sentencepiece
from loro_jax.text.tokenizers.sentencepiece_rules import read_rules, table_steps
from loro_jax.text.tokenizers.tokenizer import load_tokenizer
from tests.helpers import some_fast

MARKUP = [
    "<b>html</b> </p> <0x0A> [SEP] </s> <unk> <pad> a/s b",
    "    if x == 1:\n        return",
    "na\u00efve fa\u00e7ade \u03a9mega \u00bd \ufb01ne \u2460 \uff26ull \u65e5\u672c\u8a9e 123 456",
] * 30


@functools.cache
def lines():
    parts, _ = source_parts("embedded", DataConfig())
    return list(parts[1].read(Tally("SOURCE", skip=True)))[:700]


@functools.cache
def trained(**options):
    out = io.BytesIO()
    options = {"vocab_size": 700, "minloglevel": 2, "hard_vocab_limit": False} | {
        key: list(value) if isinstance(value, tuple) else value for key, value in options.items()
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*lines(), *MARKUP]), model_writer=out, **options
    )
    return out.getvalue()


BITS = [
    *("<sep>", "<sep>x", "</s>", "<s>", "<unk>", "<pad>", "<0x0A>", "<0xE2>", "<se", "p>", "</"),
    *(" ", "  ", "   ", "    ", "\n", "\n\n", "\t", "\r\n", "\u3000", "\u00a0", "\u200b", "\u200d"),
    *("\ufeff", "\u2581", "\u2581\u2581", "a", "the", " the", "hello world", "123", "\u00e9", "ab"),
    *("e\u0301", "o\u0323\u0302", "\u0301", "\u0345", "\U0001f469\u200d\U0001f680", "\U0001f1e9"),
    *(
        "\U0001f44d\U0001f3fd",
        "\u1112\u1161\u11ab",
        "\ud55c",
        "\ufb01",
        "\u00bd",
        "\u2460",
        "\u03a9",
    ),
    *(
        "\x00",
        "\x01",
        "\x07",
        "\ufdd0",
        "\ufdd2",
        "\u0130",
        "I\u0307",
        "\u00df",
        "\uff76\uff9e",
        ",",
        ".",
    ),
]


def texts(count=500):
    draw = random.Random(1)
    words = [word for line in lines()[:100] for word in line.split()]
    found = ["", *BITS]
    for _ in range(count):
        pieces = [
            draw.choice(BITS) if draw.random() < 0.6 else draw.choice(words) + " "
            for _ in range(draw.randint(1, 10))
        ]
        found.append("".join(pieces))
    decomposed = [unicodedata.normalize("NFD", text) for text in found[-100:]]
    runs = [letter * count for letter in "=- ." for count in (2, 3, 5, 16, 50)]
    return [*found, *decomposed, *runs, *lines()[500:550]]


def differing(model, some=None):
    """Texts whose ids differ, out of many."""
    some = texts() if some is None else some
    own = sentencepiece.SentencePieceProcessor(model_proto=model).encode(some)
    made = from_sentencepiece(model)
    made.encode_special_tokens = True
    ids = [one.ids for one in made.encode_batch_fast(some, add_special_tokens=False)]
    return [text for text, a, b in zip(some, own, ids, strict=True) if a != b]


SYMBOLS = ("<sep>", "<sep>x", "  ", "    ", "\n\n", "\u2460", "ab", "\u00c9", "\t")
LEFT_ALONE = {"remove_extra_whitespaces": False}
OPTIONS = {
    "as they come": {},
    "bytes for the unknown": {"byte_fallback": True},
    "all spaces": LEFT_ALONE,
    "no space before": {"add_dummy_prefix": False},
    "spaces as suffixes": {"treat_whitespace_as_suffix": True},
    "spaces as suffixes, all of them": {"treat_whitespace_as_suffix": True} | LEFT_ALONE,
    "pieces across spaces": {"split_by_whitespace": False},
    "pieces across spaces, bytes": {"split_by_whitespace": False, "byte_fallback": True},
    "pieces of spaces": {"allow_whitespace_only_pieces": True} | LEFT_ALONE,
    "digits": {"split_digits": True, "byte_fallback": True} | LEFT_ALONE,
    "symbols": {"user_defined_symbols": SYMBOLS},
    "symbols and all spaces": {"user_defined_symbols": SYMBOLS, "byte_fallback": True} | LEFT_ALONE,
    "symbols, no space before": {"user_defined_symbols": SYMBOLS, "add_dummy_prefix": False},
    "symbols that are words": {"user_defined_symbols": ("the", "<s>x", "hello world")},
    "control symbols": {"control_symbols": ("<ctl>", "[x]"), "pad_id": 3},
    "another name for the unknown": {"unk_piece": "[UNK]", "unk_surface": "?", "bos_id": -1},
}

# Each option at least once, except for pieces that cross spaces, which take the longest.
FAST_OPTIONS = (
    *("as they come", "no space before", "spaces as suffixes, all of them", "digits", "symbols"),
    *("control symbols", "another name for the unknown", "pieces of spaces"),
)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("options", some_fast(OPTIONS, FAST_OPTIONS))
def test_ids_are_the_models_own(kind, options):
    model = trained(model_type=kind, **{"normalization_rule_name": "identity"} | OPTIONS[options])
    wrong = differing(model)
    if kind == "unigram":  # rounding decides between cuts that are equally good
        wrong = [text for text in wrong if worse(model, text) > 1e-5]
    assert wrong == []


def worse(model, text):
    """By how much the better of the model's cut and the converted one's is better."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    own = sentencepiece.SentencePieceProcessor(model_proto=model).encode(text)
    made = from_sentencepiece(model).encode(text, add_special_tokens=False).ids
    # Bytes for an unknown character count once and alike, whichever way the rest is cut.
    scores = [sum(proto.pieces[i].score for i in sorted(ids)) for ids in (own, made)]
    assert sorted(made) == sorted(own)
    return abs(scores[0] - scores[1])


@pytest.mark.parametrize("rules", ["nmt_nfkc", "nfkc", "nfkc_cf"])
@pytest.mark.parametrize("options", ["as they come", "all spaces", "spaces as suffixes", "symbols"])
@pytest.mark.slow
def test_ids_are_the_models_own_after_its_normalization(rules, options):
    model = trained(model_type="bpe", normalization_rule_name=rules, **OPTIONS[options])
    assert differing(model) == []


@pytest.mark.parametrize("options", ["as they come", "all spaces", "no space before", "symbols"])
def test_decoding_gives_the_models_text(options):
    model = trained(model_type="bpe", byte_fallback=True, **OPTIONS[options])
    own = sentencepiece.SentencePieceProcessor(model_proto=model)
    made = from_sentencepiece(model)
    ids = own.encode(texts(200))
    assert [made.decode(one) for one in ids] == [own.decode(one) for one in ids]


def test_transformers_reads_the_same_ids(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = trained(model_type="bpe", byte_fallback=True, **OPTIONS["symbols"])
    (tmp_path / "own.model").write_bytes(model)
    tokenizer = load_tokenizer(str(tmp_path / "own.model"))
    for name, content in tokenizer.files().items():
        (tmp_path / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    some = texts(100)
    ids = theirs(some, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ids == tokenizer.encode(some)
    assert theirs("the")["input_ids"] == tokenizer.encode_prompt("the")


def bare(rules):
    """A model's normalizer without what it does to spaces; its table."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(
        trained(model_type="bpe", normalization_rule_name=rules)
    )
    spec = proto.normalizer_spec
    spec.remove_extra_whitespaces = spec.add_dummy_prefix = spec.escape_whitespaces = False
    own = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    return own.normalize, spec.precompiled_charsmap


@pytest.mark.parametrize("rules", ["nmt_nfkc", "nfkc_cf"])
def test_the_table_rewrites_every_text_as_the_model_does(rules):
    theirs, table = bare(rules)
    ours = normalizers.Sequence(table_steps(table, [])).normalize_str
    entries = list(read_rules(table))
    several = [entry for entry in entries if len(entry) > 1]
    assert len(several) > 200_000
    draw = random.Random(0)
    points = (chr(c) for c in range(1, 0x20000) if not 0xD800 <= c < 0xE000)
    texts = [f"a{c}b" for c in draw.sample(list(points), 8000)]
    marks = [entry[1:] for entry in several]
    for _ in range(8000):
        kinds = (entries, several, marks, marks, BITS)
        texts.append("".join(draw.choice(draw.choice(kinds)) for _ in range(draw.randint(2, 6))))
    assert [text for text in texts if ours(text) != theirs(text)] == []


def rewritten(tmp_path, entries, **options):
    """A model with these rules."""
    points = (
        f"{' '.join(f'{ord(c):X}' for c in old)}\t{' '.join(f'{ord(c):X}' for c in new)}"
        for old, new in entries
    )
    path = tmp_path / "rules.tsv"
    path.write_text("\n".join(points) + "\n")
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines()),
        model_writer=out,
        vocab_size=500,
        minloglevel=2,
        normalization_rule_tsv=str(path),
        **options,
    )
    return out.getvalue()


def test_rules_of_ones_own(tmp_path):
    entries = [("ab", "x"), ("abb", "yz"), ("A", "a"), ("bb", ""), ("\u00e9", "e"), ("\t", " ")]
    model = rewritten(tmp_path, entries, model_type="bpe")
    draw = random.Random(0)
    letters = ["a", "b", "A", "\u00e9", "e\u0301", "\t", " ", "\u0301", "q"]
    some = ["".join(draw.choice(letters) for _ in range(draw.randint(1, 9))) for _ in range(3000)]
    assert differing(model, some) == []


def test_rules_that_can_not_be_expressed_are_refused(tmp_path):
    entries = [(f"q{chr(0x4E00 + i)}", chr(0x5000 + i)) for i in range(400)]
    model = rewritten(tmp_path, entries, model_type="bpe")
    with pytest.raises(TrainingError, match=r"normalization_rule_tsv.*'q"):
        from_sentencepiece(model)


def test_options_that_can_not_be_expressed_are_refused_by_name():
    model = trained(
        model_type="bpe",
        normalization_rule_name="identity",
        treat_whitespace_as_suffix=True,
        user_defined_symbols=("  ", "<sep>"),
    )
    with pytest.raises(TrainingError) as caught:
        from_sentencepiece(model)
    for option in ("model_type=BPE", "user_defined_symbols='  ,<sep>'", "as_suffix=True"):
        assert option in str(caught.value)
    assert "\n" not in str(caught.value)
    odd = trained(
        model_type="unigram", normalization_rule_name="identity", control_symbols=("the",)
    )
    with pytest.raises(TrainingError, match="control_symbols='the'"):
        from_sentencepiece(odd)


@pytest.mark.parametrize("kind", ["word", "char"])
def test_other_kinds_are_refused(kind):
    with pytest.raises(TrainingError, match=f"but it is {kind.upper()}"):
        from_sentencepiece(trained(model_type=kind, vocab_size=90))


def test_unused_pieces_are_refused():
    proto = sentencepiece_model_pb2.ModelProto.FromString(trained(model_type="bpe"))
    proto.pieces[300].type = proto.pieces[300].UNUSED
    with pytest.raises(TrainingError, match="UNUSED"):
        from_sentencepiece(proto.SerializeToString())


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_texts_without_a_space_are_read_whole(kind):
    model = trained(model_type=kind, normalization_rule_name="identity", byte_fallback=True)
    some = ["=" * 100_000, "\u65e5\u672c\u8a9e" * 30_000, " " * 100_000, "abcdefg" * 15_000]
    made = from_sentencepiece(model).encode_batch_fast(some, add_special_tokens=False)
    own = sentencepiece.SentencePieceProcessor(model_proto=model).encode(some)
    assert [len(one.ids) for one in made] == [len(ids) for ids in own]
