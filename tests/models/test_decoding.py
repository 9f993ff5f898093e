"""Decoding with a cache against the model itself, and against transformers."""

import dataclasses
import functools
import io

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loro_jax.commands.generate import continuations, main
from loro_jax.text.tokenizers.tokenizer import load_tokenizer
from models import Llama, decoding, preset
from models.cache import empty_cache
from models.decoding import extend, for_decoding, generate
from models.huggingface import write_model
from models.sampling import GREEDY, Sampling, next_tokens, restricted_logits
from tests.helpers import some_fast

CONFIG = preset("tiny", vocab_size=259, max_sequence_length=96)
PROMPTS = [[5, 6, 7, 8, 9], [10], [200, 100, 50], [3] * 40]


def make(**changes):
    """A model far from its initial values, so that its logits differ."""
    graphdef, state = parts(**changes)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x, state))  # with variables of its own


@functools.cache
def parts(**changes):
    graphdef, state = nnx.split(Llama(dataclasses.replace(CONFIG, **changes), nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: (x + rng.normal(scale=0.2, size=x.shape)).astype(x.dtype), state)
    return graphdef, state


def collect(*arguments, **keywords):
    return np.stack(list(generate(*arguments, **keywords)), axis=1)


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_kv_heads": 2, "head_dim": 6, "tie_embeddings": True}, {"projection": "cola"}],
)
def test_a_batch_of_prompts_goes_on_as_the_whole_model_says(changes):
    model = make(**changes)
    found = collect(model, PROMPTS, max_new_tokens=6)
    assert len(np.unique(found)) > 6
    padded = np.zeros((len(PROMPTS), 48), np.int32)
    lengths = [len(prompt) for prompt in PROMPTS]
    for row, prompt in zip(padded, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    whole = jax.jit(lambda tokens: model(tokens))
    for step in range(6):
        # What stands behind a token does not change its logits.
        logits = np.asarray(whole(padded))
        for i, length in enumerate(lengths):
            assert found[i, step] == np.argmax(logits[i, length + step - 1])
            padded[i, length + step] = found[i, step]


@pytest.mark.slow
@pytest.mark.parametrize("cache", some_fast(["values", "latent"], ["latent"]))
@pytest.mark.parametrize(
    "changes",
    some_fast(
        [{}, {"num_kv_heads": 2, "attn_rank": 5}, {"projection": "cola"}],
        [{"num_kv_heads": 2, "attn_rank": 5}],
    ),
)
def test_latents_of_the_past_say_what_keys_and_values_do(changes, cache):
    model = make(**changes)
    found = collect(model, PROMPTS, max_new_tokens=6, cache=cache)
    assert found.tolist() == collect(model, PROMPTS, max_new_tokens=6).tolist()
    # The logits, too, of rows with padding before them, in one piece and token by token.
    tokens = jax.random.randint(jax.random.key(0), (3, 12), 0, CONFIG.vocab_size)
    padding = jnp.array([0, 3, 7])
    rank = model.config.group_rank("attn")
    logits = []
    for kind in ("full", cache):
        past = empty_cache(model.config, 3, 12, kind)
        for slots in (slice(0, 8), *(slice(i, i + 1) for i in range(8, 12))):
            last, past = extend(model, tokens[:, slots], past, slots.start, padding)
        logits.append(last)
    np.testing.assert_allclose(logits[0], logits[1], rtol=2e-5, atol=2e-5)
    assert past.values.shape == (2, 3, 12, rank)


def test_greedy_text_is_that_of_transformers(tmp_path):
    torch = pytest.importorskip("torch", reason="the counterpart needs torch")
    transformers = pytest.importorskip("transformers", reason="the counterpart needs transformers")
    model = make(num_kv_heads=2)
    write_model(model, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found = collect(model, PROMPTS, max_new_tokens=24)
    for prompt, continuation in zip(PROMPTS, found, strict=True):
        tokens = torch.tensor([prompt])
        expected = theirs.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=24,
            do_sample=False,
            pad_token_id=0,
        )
        assert expected[0, len(prompt) :].tolist() == continuation.tolist()


def test_a_prompt_of_another_length_compiles_nothing_new():
    model = make()
    collect(model, [[5, 6, 7]], max_new_tokens=5)
    before = decoding._step._cache_size()
    collect(model, [[9] * 30], max_new_tokens=5)
    assert decoding._step._cache_size() == before


def test_draws_follow_the_seed_and_the_distribution():
    model = make()
    sampling = Sampling(temperature=1.0)
    one, same, other = (
        collect(model, PROMPTS, 8, sampling, seed=seed).tolist() for seed in (1, 1, 2)
    )
    assert one == same != other
    logits = jnp.log(jnp.array([[0.1, 0.6, 0.3]]))
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = jax.vmap(lambda key: next_tokens(logits, Sampling(), key)[0])(keys)
    np.testing.assert_allclose(np.bincount(drawn) / 20_000, [0.1, 0.6, 0.3], atol=0.015)
    assert set(np.unique(next_tokens(jnp.tile(logits, (99, 1)), Sampling(top_k=1), keys[0]))) == {1}
    assert next_tokens(logits, GREEDY, keys[0]).tolist() == [1]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.7),
        Sampling(1.0, top_k=5),
        Sampling(1.0, top_p=0.8),
        Sampling(1.3, top_k=40, top_p=0.5),
        Sampling(1.0, top_k=10_000),
        Sampling(1.0, top_p=1e-6),
    ],
)
def test_restrictions_are_those_of_transformers(sampling):
    torch = pytest.importorskip("torch", reason="the counterpart needs torch")
    transformers = pytest.importorskip("transformers", reason="the counterpart needs transformers")
    logits = np.random.default_rng(0).normal(scale=3, size=(16, 259)).astype(np.float32)
    expected = torch.tensor(logits)
    warpers = [transformers.TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        warpers.append(transformers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(transformers.TopPLogitsWarper(sampling.top_p))
    for warper in warpers:
        expected = warper(None, expected)
    found = np.asarray(restricted_logits(jnp.array(logits), sampling))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


def test_rows_end_at_the_end_of_a_text():
    model = make()
    free = collect(model, PROMPTS, max_new_tokens=12)
    eos = int(free[0, 3])
    bound = collect(model, PROMPTS, max_new_tokens=12, eos_id=eos)
    for row, expected in zip(bound, free, strict=True):
        end = list(expected).index(eos) if eos in expected else len(expected)
        assert row[:end].tolist() == expected[: min(end, len(row))].tolist()
        assert set(row[end:].tolist()) <= {eos}
    alone = collect(model, PROMPTS[:1], max_new_tokens=12, eos_id=eos)
    assert alone.shape[1] == list(free[0]).index(eos) + 1


def test_each_of_several_ids_ends_a_text_and_each_row_has_its_limit():
    model = make()
    free = collect(model, PROMPTS, max_new_tokens=12)
    ends = [int(free[0, 3]), int(free[1, 1])]
    limits = [12, 12, 5, 12]
    bound = collect(model, PROMPTS, max_new_tokens=limits, eos_id=ends)
    for row, expected, limit in zip(bound, free, limits, strict=True):
        found = [i for i, token in enumerate(expected) if token in ends]
        length = min([limit, len(row), *(i + 1 for i in found)])
        assert row[:length].tolist() == expected[:length].tolist()
        assert set(row[length - 1 :].tolist()) == {int(expected[length - 1])}
    # All positions of the model, and not one more.
    assert collect(model, [[5] * 95, [6]], max_new_tokens=[1, 2]).shape == (2, 2)


def test_ids_that_the_tokenizer_does_not_have_are_not_drawn():
    model = make()
    model.head.W[...] = model.head.W[...].at[200:].multiply(3.0)  # these are likely
    for sampling in (GREEDY, Sampling(2.0), Sampling(1.0, top_k=3), Sampling(1.0, top_p=0.2)):
        assert collect(model, PROMPTS, 8, sampling).max() >= 200
        assert collect(model, PROMPTS, 8, sampling, vocab_size=200).max() < 200


@pytest.mark.slow
@pytest.mark.parametrize("changes", some_fast([{}, {"num_kv_heads": 2}], [{"num_kv_heads": 2}]))
def test_prompts_in_bfloat16_are_continued_together_as_alone(changes):
    model = make(dtype="bfloat16", **changes)
    tokens = jax.random.randint(jax.random.key(0), (2, 32), 0, CONFIG.vocab_size)
    expected = np.asarray(make(**changes)(tokens)[:, -1])
    for cache in ("full", "values", "latent"):
        past = empty_cache(model.config, 2, 33, cache)
        found, _ = jax.jit(extend, static_argnums=3)(model, tokens, past, 0, jnp.array([0, 0]))
        np.testing.assert_allclose(found, expected, atol=0.04 * np.abs(expected).max())
        assert collect(model, PROMPTS, max_new_tokens=2, cache=cache).shape == (4, 2)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45])
def test_a_low_temperature_is_the_likeliest_token(temperature):
    logits = jnp.array([[3.0, 80.0, -jnp.inf, 79.0], [-9.0, -90.0, -8.0, -jnp.inf]])
    found = next_tokens(logits, Sampling(temperature), jax.random.key(0))
    assert found.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2**32}, "seed must be between 0 and 4294967295, but is 4294967296"),
        ({"seed": -1}, "seed must be between 0 .* but is -1"),
        ({"sampling": Sampling(float("nan"))}, "temperature must be at least 0 and finite"),
        ({"sampling": Sampling(float("inf"))}, "temperature must be at least 0 and finite"),
        ({"prompts": [[5] * 96]}, "the prompt has 96 tokens; expected at most 95"),
        ({"prompts": [[5], [5] * 200]}, "prompt 2 of 2 has 200 tokens; expected at most 95"),
        ({"prompts": [[5], [5]], "max_new_tokens": [4, 0]}, "but is 0"),
        ({"prompts": [[5], []]}, "at least one token each"),
        ({"prompts": [[5, 259]]}, "ids of the prompt must be between 0 and 258, but one is 259"),
        ({"prompts": [[5] * 90], "max_new_tokens": 7}, "between 1 and 6 .* but is 7"),
        ({"max_new_tokens": 0}, "but is 0"),
        ({"sampling": Sampling(-1.0)}, "temperature must be at least 0"),
        ({"sampling": Sampling(top_k=-1)}, "top_k must be at least 0"),
        ({"sampling": Sampling(top_p=0.0)}, "top_p must be above 0"),
        ({"cache": "half"}, "cache must be one of full, values, latent, but is 'half'"),
        ({"model": {"scope": "mlp"}, "cache": "values"}, "cache=values .* these are dense"),
        ({"model": {"projection": "sltrain"}, "cache": "latent"}, "are of kind 'sltrain'"),
    ],
)
def test_bad_values_are_named(changes, message):
    arguments = {"prompts": [[5]], "max_new_tokens": 4, **changes}
    config = dataclasses.replace(CONFIG, **arguments.pop("model", {}))
    # Not by make, which would keep what is traced here.
    model = nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0)))
    with pytest.raises(ValueError, match=message):
        next(generate(model, **arguments))


def test_characters_of_several_bytes_come_whole(monkeypatch):
    tokenizer = load_tokenizer("bytes")
    text = "é 日本 \U0001f99c!"
    ids = [*tokenizer.encode([text])[0], tokenizer.eos_id, tokenizer.eos_id]
    monkeypatch.setattr(
        "loro_jax.commands.generate.generate", lambda *_, **__: iter(np.array(ids)[:, None])
    )
    grown = [texts[0] for texts in continuations(make(), tokenizer, ["Say: "], 99, GREEDY)]
    assert "".join(grown) == text
    assert "日" in grown
    assert not any("\ufffd" in piece for piece in grown)


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    tokenizer = load_tokenizer("bytes")
    ids = {"eos_token_id": 1, "pad_token_id": 0}
    for name, factors in (("out", False), ("factors", True)):
        write_model(
            make(),
            tmp_path / name,
            files=tokenizer.files(),
            token_ids=ids,
            keep_factors=factors,
        )
    arguments = [str(tmp_path / "out"), "--max_new_tokens=9", "--temperature=0"]
    one, both = io.StringIO(), io.StringIO()
    assert main([*arguments, "--prompt=The end"], one) == 0
    assert main([*arguments, "--prompt=The end", "--prompt=A"], both) == 0
    assert one.getvalue().startswith("The end")
    assert both.getvalue().startswith(one.getvalue())
    latents = io.StringIO()
    latent = [str(tmp_path / "factors"), *arguments[1:], "--cache=latent", "--prompt=The end"]
    assert main(latent, latents) == 0
    assert latents.getvalue() == one.getvalue()
    for bad in (["--top_p=2"], ["--max_new_tokens=500"], ["--cache=values"]):
        assert main([*arguments, "--prompt=A", *bad]) == 1
    assert main([str(tmp_path), "--prompt=A"]) == 1
    errors = capsys.readouterr().err
    assert errors.count("error: ") == errors.count("\n") == 4


def products(model):
    """Shapes of the products with weights, one layer's, when a token is read."""
    padding = jnp.array([0])
    cache = empty_cache(model.config, 1, 4)
    program = jax.make_jaxpr(lambda cache: extend(model, jnp.array([[5]]), cache, 0, padding))(
        cache
    )
    (scan,) = (e for e in program.eqns if e.primitive.name == "scan")
    eqns = scan.params["jaxpr"].eqns
    dots = [e for e in eqns if e.primitive.name == "dot_general"]
    return [e.outvars[0].aval.shape for e in dots if not e.params["dimension_numbers"][1][0]]


@pytest.mark.parametrize(
    ("changes", "first"),
    [({}, [(1, 1, 24), (1, 1, 16)]), ({"scope": "none"}, [(1, 1, 96), (1, 1, 96)])],
)
def test_a_model_for_decoding_reads_the_matrices_of_one_input_together(changes, first):
    model = make(**changes)
    before = jax.tree.map(np.asarray, nnx.state(model))
    ready = for_decoding(model)
    assert all(shape in products(ready) for shape in first)
    assert len(products(ready)) == len(products(model)) - 3
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(ready)))
    assert count == sum(leaf.size for leaf in jax.tree.leaves(before))
    chex.assert_trees_all_equal(before, nnx.state(model))


@pytest.mark.parametrize("projection", some_fast(["lora", "sltrain", "lost"], ["sltrain"]))
def test_projections_that_add_to_their_product_stay_apart(projection):
    model = make(projection=projection)
    ready = for_decoding(model)
    assert ready.blocks.attention.shared is None
    assert ready.blocks.mlp.shared is None
    tokens, padding = jnp.array([[5, 6, 7]]), jnp.array([0])
    found, _ = extend(ready, tokens, empty_cache(CONFIG, 1, 4), 0, padding)
    np.testing.assert_allclose(found, model(tokens)[:, -1], rtol=1e-4, atol=1e-4)
