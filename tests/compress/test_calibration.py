"""Moments of the inputs, as the layers see them."""

import jax
import numpy as np
from flax import nnx

from loro_jax.compress.calibration import input_moments
from models.crossing import Crossing
from models.llama import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    scope="none",
    initializer_range=0.3,
)
TOKENS = np.random.default_rng(0).integers(0, 64, (5, 12))


def expected(model):
    """The inputs of all projections, (tokens, inputs), from the blocks' parts, without jit."""
    graphdef, stacked = nnx.split(model.blocks)
    x = model.embedding[...][TOKENS]
    for layer in range(CONFIG.num_layers):
        block = nnx.merge(graphdef, jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked))
        inputs = {"q": block.attention_norm(x)}
        x = x + block.attention(inputs["q"], Crossing({}))
        # With the identity for o, attention returns what o is applied to.
        W, block.attention.o.W[...] = block.attention.o.W[...], np.eye(32, dtype=np.float32)
        inputs["o"] = block.attention(inputs["q"], Crossing({}))
        block.attention.o.W[...] = W
        inputs["gate"] = block.mlp_norm(x)
        hidden = jax.nn.silu(block.mlp.gate(inputs["gate"])) * block.mlp.up(inputs["gate"])
        inputs["down"] = hidden
        x = x + block.mlp(inputs["gate"], Crossing({}))
        yield {name: np.asarray(one).reshape(-1, one.shape[-1]) for name, one in inputs.items()}


def test_moments_are_those_of_each_projections_inputs():
    model = Llama(CONFIG, nnx.Rngs(0))
    found = list(input_moments(model, TOKENS, batch_size=2))  # the last batch has one sequence
    for moments, inputs in zip(found, expected(model), strict=True):
        assert moments["q"] is not None
        for name, x in inputs.items():
            second, size = moments[name]
            np.testing.assert_allclose(second, x.T @ x / len(x), rtol=1e-3, atol=1e-5)
            np.testing.assert_allclose(size, np.abs(x).mean(axis=0), rtol=1e-4, atol=1e-6)
        for name, shared in (("k", "q"), ("v", "q"), ("up", "gate")):
            np.testing.assert_array_equal(moments[name].second, moments[shared].second)
