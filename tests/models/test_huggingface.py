"""Logits of the dense model against transformers' LlamaForCausalLM with the same weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import Llama, LlamaConfig
from models.rope import RopeScaling

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


def counterpart(config, params, rope=None):
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=config.max_sequence_length,
            rms_norm_eps=config.rms_norm_eps,
            attention_bias=False,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_size,
            tie_word_embeddings=config.tie_embeddings,
            rope_parameters={"rope_theta": config.rope_theta, **(rope or {"rope_type": "default"})},
        )
    )
    tensor = lambda x: torch.tensor(np.array(x))  # noqa: E731
    weights = {
        "model.embed_tokens.weight": tensor(params["embedding"]),
        "model.norm.weight": tensor(params["norm"]["scale"]),
        "lm_head.weight": tensor(params.get("head", {"W": params["embedding"]})["W"]),
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


LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("changes", "rope"),
    [
        ({}, None),
        ({"rope_theta": 500_000.0}, None),
        ({"num_kv_heads": 2}, None),
        ({"num_kv_heads": 1, "head_dim": 24, "tie_embeddings": True}, None),
        ({"rope_scaling": RopeScaling("linear", 4.0)}, LINEAR),
        ({"rope_scaling": RopeScaling("llama3", 8.0, original_length=32)}, LLAMA3),
    ],
)
def test_logits_equal_those_of_transformers(changes, rope):
    config = dataclasses.replace(CONFIG, **changes)
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
        theirs = counterpart(config, params, rope)(torch.tensor(tokens)).logits.numpy()
    assert np.std(theirs) > 0.5
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.max(np.abs(theirs)), rtol=0)
