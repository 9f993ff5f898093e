import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import Llama, preset
from models.cache import empty_cache
from models.huggingface.errors import CheckpointError
from models.huggingface.writing import write_model
from models.llama import Block
from models.rope import frequencies, rotary_embedding

CONFIG = dataclasses.replace(preset("tiny"), initialiser="auto", num_layers=3)
TOKENS = np.arange(10).reshape(2, 5) * 7 % 64
BOTH = [{"cross_layer": 0.5}, {"latent_crossing": True}]


def make(seed=0, **fields):
    config = dataclasses.replace(CONFIG, **fields)
    return Llama(config, nnx.Rngs(jax.random.key(seed)))


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
        place = block[part][name]
        z = x @ place["A"].T
        if model.config.latent_crossing:
            y = (z + below.get(name, 0)) @ place["B"].T
            below[name] = z
            return y
        below[name] = z @ place["B"].T + block[part]["gates"][name] * below.get(name, 0)
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


@pytest.mark.parametrize("fields", BOTH)
def test_logits_are_those_of_the_definition(fields):
    model = make(**fields)
    if "cross_layer" in fields:
        # All different, so that no two can be taken for each other.
        for part in (model.blocks.attention, model.blocks.mlp):
            for i, name in enumerate(("q", "k", "v", "o", "gate", "up", "down")):
                if hasattr(part.gates, name):
                    start = getattr(part.gates, name)
                    start[...] = start[...] + 0.1 * i + 0.03 * jnp.arange(3)
    found = model(jnp.asarray(TOKENS))
    np.testing.assert_allclose(found, logits_by_hand(model), atol=2e-5)
    assert np.max(np.abs(found - make()(jnp.asarray(TOKENS)))) > 1e-3


@pytest.mark.parametrize("fields", BOTH)
@pytest.mark.parametrize("remat", ["none", "full", "dots", "rank"])
def test_remat_changes_no_gradient(fields, remat):
    def gradient(remat):
        graphdef, state = nnx.split(make(**fields, remat=remat))
        tokens = jnp.asarray(TOKENS)
        return jax.grad(lambda s: jnp.sum(jnp.sin(nnx.merge(graphdef, s)(tokens))))(state)

    one, other = gradient("none"), gradient(remat)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fields", BOTH)
def test_seeds_under_vmap_give_what_each_gives_alone(fields):
    together = jax.vmap(lambda seed: nnx.state(make(seed, **fields)))(jnp.arange(2))
    for seed in range(2):
        alone = jax.tree.leaves(nnx.state(make(seed, **fields)))
        for one, other in zip(jax.tree.leaves(together), alone, strict=True):
            np.testing.assert_allclose(one[seed], other, rtol=1e-5, atol=1e-7)


def test_only_projections_with_a_rank_take_part():
    model = make(cross_layer=0.5, scope="mlp")
    assert model.blocks.attention.gates is None
    assert model.blocks.mlp.gates.up.shape == (3,)
    assert np.isfinite(model(jnp.asarray(TOKENS))).all()
    dense = make(cross_layer=0.5, scope="none")
    expected = make(scope="none")(jnp.asarray(TOKENS))
    np.testing.assert_array_equal(dense(jnp.asarray(TOKENS)), expected)


def test_a_block_alone_has_nothing_below():
    block = Block(dataclasses.replace(CONFIG, cross_layer=0.5), nnx.Rngs(0))
    plain = Block(CONFIG, nnx.Rngs(0))
    x = jnp.ones((1, 3, 32))
    np.testing.assert_array_equal(block(x), plain(x))


@pytest.mark.parametrize("fields", BOTH)
def test_what_does_not_support_it_says_so(fields, tmp_path):
    (name,) = fields
    with pytest.raises(ValueError, match=rf"model\.{name} = .*generation"):
        empty_cache(dataclasses.replace(CONFIG, **fields), 1, 4)
    with pytest.raises(CheckpointError, match=rf"model\.{name} = .*Hugging Face"):
        write_model(make(**fields), tmp_path / "out", keep_factors=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cross_layer": 0.5, "latent_crossing": True}, "expected latent_crossing False"),
        ({"projection": "scaffold", "latent_crossing": True}, '"scaffold"; expected "low_rank"'),
        ({"cross_layer": -1.0}, "model.cross_layer must be at least 0"),
    ],
)
def test_fields_that_do_not_fit_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **fields).validate()
