import numpy as np
import pytest
from flax import nnx

from models import Llama, preset
from models import windows as windows_module
from models.huggingface import write_model
from models.windows import Score, score, windows

CONFIG = preset("tiny", max_sequence_length=64, initializer_range=0.3, initialiser="auto")
STREAM = np.random.default_rng(0).integers(CONFIG.vocab_size, size=203)


@pytest.mark.parametrize(("length", "stride"), [(16, 16), (16, 5), (16, 1), (64, 64), (202, 7)])
def test_every_token_but_the_first_is_predicted_once_and_with_context(length, stride):
    predicted = []
    for i, window in enumerate(windows(STREAM, length, stride)):
        (places,) = np.nonzero(window.mask[0])
        start = i * stride
        predicted += list(start + 1 + places)
        np.testing.assert_array_equal(window.targets[0, places], STREAM[start + 1 + places])
        inputs = window.inputs[0, : places.max() + 1]
        np.testing.assert_array_equal(inputs, STREAM[start : start + len(inputs)])
        assert i == 0 or places.min() >= length - stride
    assert predicted == list(range(1, len(STREAM)))


@pytest.mark.parametrize(("length", "stride"), [(32, 32), (32, 12)])
def test_the_score_is_transformers_loss_on_the_same_windows(length, stride, tmp_path):
    torch = pytest.importorskip("torch", reason="the counterpart needs torch")
    transformers = pytest.importorskip("transformers", reason="the counterpart needs transformers")
    model = Llama(CONFIG, nnx.Rngs(0))
    write_model(model, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    nats, tokens, end_before = 0.0, 0, 1
    for start in range(0, len(STREAM), stride):
        part = torch.tensor(STREAM[None, start : start + length + 1])
        labels = part.clone()
        labels[:, : end_before - start] = -100
        new = int((labels[:, 1:] != -100).sum())
        if not new:
            break
        with torch.no_grad():
            nats += float(theirs(part, labels=labels).loss) * new
        tokens += new
        end_before = start + part.shape[1]
    found = score(model, STREAM, length, stride, batch_size=3)
    assert found.tokens == tokens == len(STREAM) - 1
    assert found.nats / found.tokens == pytest.approx(nats / tokens, abs=1e-4)
    assert found.perplexity > 100  # far from uniform: every window matters


@pytest.mark.parametrize(
    ("stream", "stride", "message"),
    [(STREAM[:1], 4, "at least two tokens"), (STREAM, 0, "stride must be"), (STREAM, 9, "and 8")],
)
def test_bad_values_are_named(stream, stride, message):
    with pytest.raises(ValueError, match=message):
        next(windows(stream, 8, stride))


def test_tokens_that_do_not_count_are_seen_and_not_scored():
    model = Llama(CONFIG, nnx.Rngs(0))
    counted = np.arange(len(STREAM)) % 5 != 0
    whole = [int(window.mask.sum()) for window in windows(STREAM, 32, 12)]
    assert sum(whole) == len(STREAM) - 1
    some = list(windows(STREAM, 32, 12, counted))
    assert sum(int(window.mask.sum()) for window in some) == counted[1:].sum()
    others = score(model, STREAM, 32, 12, counted=~counted)
    found = score(model, STREAM, 32, 12, counted=counted)
    everything = score(model, STREAM, 32, 12)
    assert found.tokens + others.tokens == everything.tokens
    assert found.nats + others.nats == pytest.approx(everything.nats, rel=1e-5)


def test_a_window_is_no_longer_than_the_text(monkeypatch):
    model = Llama(CONFIG, nnx.Rngs(0))
    shapes = []
    nats = windows_module._nats
    monkeypatch.setattr(
        windows_module, "_nats", lambda *a: shapes.append(a[2].inputs.shape) or nats(*a)
    )
    expected = score(model, STREAM[:40], length=39, stride=39, batch_size=1)
    found = score(model, STREAM[:40], length=1 << 17, stride=1 << 17)
    assert found == expected
    score(model, STREAM[:40], length=30, stride=5)
    assert shapes == [(1, 39), (1, 39), (3, 30)]


def test_a_perplexity_beyond_all_floats_is_infinite():
    assert Score(1e6, 10).perplexity == np.inf
