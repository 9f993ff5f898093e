import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import Llama, preset
from models.cache import empty_cache
from models.decoding import extend, for_decoding
from models.huggingface.errors import CheckpointError
from models.huggingface.writing import write_model
from models.rope import frequencies, rotary_embedding
from tests.helpers import some_fast

CONFIG = dataclasses.replace(preset("tiny"), initialiser="auto", num_layers=3)
TOKENS = np.arange(10).reshape(2, 5) * 7 % 64


def make(seed=0, cross_layer=0.5, **fields):
    config = dataclasses.replace(CONFIG, cross_layer=cross_layer, **fields)
    return Llama(config, nnx.Rngs(jax.random.key(seed)))


def make_different(**fields):
    """A model whose numbers all differ, so that no two can be taken for each other."""
    model = make(**fields)
    for part in (model.blocks.attention, model.blocks.mlp):
        for i, name in enumerate(("q", "k", "v", "o", "gate", "up", "down")):
            if hasattr(part.gates, name):
                start = getattr(part.gates, name)
                start[...] = start[...] + 0.1 * i + 0.03 * jnp.arange(3)
    return model


def rms_norm(x, scale):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + CONFIG.rms_norm_eps) * scale


def silu(x):
    return x / (1 + np.exp(-x))


def rotated(y_BxLxC):
    heads = jnp.asarray(y_BxLxC.reshape(*y_BxLxC.shape[:2], CONFIG.num_heads, -1))
    turns = frequencies(CONFIG.head_size, CONFIG.rope_theta, CONFIG.rope_scaling)
    return np.asarray(rotary_embedding(heads, jnp.arange(heads.shape[1]), turns))


def attention(q, k, v):
    q, k, v = rotated(q), rotated(k), v.reshape(*v.shape[:2], CONFIG.num_heads, -1)
    scores = np.einsum("bqhk,bthk->bhqt", q, k) / np.sqrt(CONFIG.head_size)
    scores = np.where(np.tri(q.shape[1], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhqt,bthk->bqhk", weights, v).reshape(*q.shape[:2], -1)


def logits_by_hand(model):
    """The network by its definition, layer by layer, in float64."""
    state = jax.tree.map(np.float64, nnx.to_pure_dict(nnx.state(model)))
    x, below = state["embedding"][TOKENS], {}

    def crossed(part, name, x):
        place, b = block[part][name], block[part]["gates"][name]
        below[name] = x @ place["A"].T @ place["B"].T + b * below.get(name, 0)
        return below[name]

    for layer in range(model.config.num_layers):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], state["blocks"])
        h = rms_norm(x, block["attention_norm"]["scale"])
        y = attention(*(crossed("attention", name, h) for name in "qkv"))
        x = x + crossed("attention", "o", y)
        h = rms_norm(x, block["mlp_norm"]["scale"])
        gate, up = crossed("mlp", "gate", h), crossed("mlp", "up", h)
        x = x + crossed("mlp", "down", silu(gate) * up)
    return rms_norm(x, state["norm"]["scale"]) @ state["head"]["W"].T


def test_logits_are_those_of_the_definition():
    model = make_different()
    found = model(jnp.asarray(TOKENS))
    np.testing.assert_allclose(found, logits_by_hand(model), atol=2e-5)
    assert np.max(np.abs(found - make(cross_layer=0.0)(jnp.asarray(TOKENS)))) > 1e-3


def carried(model):
    """The shapes that the loop over layers carries in the gradient's program, forward."""
    graphdef, state = nnx.split(model)

    def loss(state):
        return jnp.sum(nnx.merge(graphdef, state)(jnp.asarray(TOKENS)))

    program = jax.make_jaxpr(jax.value_and_grad(loss))(state)
    loop = next(e for e in program.eqns if e.primitive.name == "scan")
    first, count = loop.params["num_consts"], loop.params["num_carry"]
    return sorted(x.aval.shape for x in loop.invars[first : first + count] if x.aval.ndim)


def test_the_loop_over_layers_carries_nothing_more_without_it():
    hidden, rest = (2, 5, 32), [(2, 5, 48)] * 2
    assert carried(make(cross_layer=0.0)) == [hidden]
    assert carried(make(scope="mlp")) == [hidden] * 2 + rest
    assert carried(make()) == [hidden] * 6 + rest


@pytest.mark.parametrize("projection", some_fast(["low_rank", "scaffold_cola"], ["low_rank"]))
def test_decoding_token_by_token_gives_the_logits_of_the_whole(projection):
    model = make_different(projection=projection)
    whole = model(jnp.asarray(TOKENS))
    # One row has two slots of padding before its tokens.
    rows = jnp.asarray([[*TOKENS[0], 0, 0], [0, 0, *TOKENS[1]]])
    step = jax.jit(functools.partial(extend, for_decoding(model)))
    cache, padding = empty_cache(model.config, 2, 7), jnp.array([0, 2])
    logits = []
    for slots in (slice(0, 3), *(slice(i, i + 1) for i in range(3, 7))):
        last, cache = step(rows[:, slots], cache, slots.start, padding)
        logits.append(last)
    np.testing.assert_allclose(jnp.stack(logits[:3])[:, 0], whole[0, 2:], atol=2e-5)
    np.testing.assert_allclose(jnp.stack(logits)[:, 1], whole[1], atol=2e-5)


@pytest.mark.parametrize("remat", ["full", "dots", "rank"])
@pytest.mark.slow
def test_remat_changes_no_gradient(remat):
    def gradient(remat):
        graphdef, state = nnx.split(make(remat=remat))
        tokens = jnp.asarray(TOKENS)
        return jax.grad(lambda s: jnp.sum(jnp.sin(nnx.merge(graphdef, s)(tokens))))(state)

    one, other = gradient("none"), gradient(remat)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_only_projections_with_a_rank_take_part():
    model = make(scope="mlp")
    assert model.blocks.attention.gates is None
    assert model.blocks.mlp.gates.up.shape == (3,)
    assert np.isfinite(model(jnp.asarray(TOKENS))).all()
    tokens = jnp.asarray(TOKENS)
    expected = make(cross_layer=0.0, scope="none")(tokens)
    np.testing.assert_array_equal(make(scope="none")(tokens), expected)


def test_what_does_not_support_it_says_so(tmp_path):
    model = make()
    with pytest.raises(ValueError, match=r"cache=latent .*cross_layer = 0.5.*expected cache=full"):
        empty_cache(model.config, 1, 4, "latent")
    with pytest.raises(CheckpointError, match=r"cross_layer = 0.5: .*expected .*cross_layer = 0"):
        write_model(model, tmp_path / "out", keep_factors=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"model.cross_layer must be at least 0"):
        dataclasses.replace(CONFIG, cross_layer=-1.0).validate()
