"""Logits of the dense model against transformers' LlamaForCausalLM with the same weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import Llama, LlamaConfig

torch = pytest.importorskip("torch", reason="the counterpart needs torch")
transformers = pytest.importorskip("transformers", reason="the counterpart needs transformers")

CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=96,
    intermediate_size=250,
    num_layers=4,
    num_heads=6,
    max_sequence_length=128,
    scope="none",
)
OURS_TO_THEIRS = {
    ("attention", "q"): "self_attn.q_proj",
    ("attention", "k"): "self_attn.k_proj",
    ("attention", "v"): "self_attn.v_proj",
    ("attention", "o"): "self_attn.o_proj",
    ("mlp", "gate"): "mlp.gate_proj",
    ("mlp", "up"): "mlp.up_proj",
    ("mlp", "down"): "mlp.down_proj",
}


def counterpart(config, params):
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=config.max_sequence_length,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
            attention_bias=False,
            tie_word_embeddings=False,
        )
    )
    tensor = lambda x: torch.tensor(np.array(x))  # noqa: E731
    weights = {
        "model.embed_tokens.weight": tensor(params["embedding"]),
        "model.norm.weight": tensor(params["norm"]["scale"]),
        "lm_head.weight": tensor(params["head"]["W"]),
    }
    blocks = params["blocks"]
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        for (part, name), their_name in OURS_TO_THEIRS.items():
            weights[f"{prefix}.{their_name}.weight"] = tensor(blocks[part][name]["W"][layer])
        weights[f"{prefix}.input_layernorm.weight"] = tensor(
            blocks["attention_norm"]["scale"][layer]
        )
        weights[f"{prefix}.post_attention_layernorm.weight"] = tensor(
            blocks["mlp_norm"]["scale"][layer]
        )
    theirs.load_state_dict(weights, strict=True)
    return theirs.eval()


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_logits_equal_those_of_transformers(theta):
    config = dataclasses.replace(CONFIG, rope_theta=theta)
    graphdef, state = nnx.split(Llama(config, nnx.Rngs(0)), nnx.Param)
    params = nnx.to_pure_dict(state)
    rng = np.random.default_rng(0)
    # Weights far from their small initial values, so that every part shows in the logits.
    params = jax.tree.map(
        lambda x: jnp.array(x + rng.normal(scale=0.1, size=x.shape), jnp.float32), params
    )
    tokens = rng.integers(config.vocab_size, size=(2, 128))
    ours = np.asarray(nnx.merge(graphdef, params)(jnp.array(tokens)))
    with torch.no_grad():
        theirs = counterpart(config, params)(torch.tensor(tokens)).logits.numpy()
    assert np.std(theirs) > 0.5
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.max(np.abs(theirs)), rtol=0)
