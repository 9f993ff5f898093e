"""Networks that somebody else wrote in Flax NNX: a vision transformer of attnax, with dense layers
and a convolution, and the LLaMA of google-tunix, with einsum modules of its own.
"""

import importlib
import importlib.util
import sys
import types

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from loro_jax import find_pairs, loro
from loro_jax.layers import factorise, merge, summary

# Of what it takes from JAX and Flax.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SIZES = {
    **{"num_layers": 2, "vocab_size": 64, "embed_dim": 32, "hidden_dim": 48, "num_heads": 4},
    **{"head_dim": 8, "num_kv_heads": 2, "rope_theta": 10_000, "norm_eps": 1e-5},
}


@pytest.fixture(scope="module")
def tunix():
    """Its module of LLaMA 3, without what its trainer needs."""
    found = importlib.util.find_spec("tunix")
    if found is None:
        pytest.skip("no network of another package: pip install --no-deps google-tunix")
    # Its __init__ imports all of reinforcement learning; the model needs none of that.
    package = types.ModuleType("tunix")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["tunix"] = package
    # It changes Flax's configuration when it is imported.
    before = flax.config.flax_always_shard_variable
    try:
        yield importlib.import_module("tunix.models.llama3.model")
    except ImportError as error:
        pytest.skip(f"google-tunix needs another package: {error}")
    flax.config.update("flax_always_shard_variable", before)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tunix"]:
        del sys.modules[name]


def llama(tunix):
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    tokens = jax.random.randint(jax.random.key(0), (2, 7), 0, 64)
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((7, 7), bool)), (2, 7, 7))
    with jax.set_mesh(mesh):
        model = tunix.Llama3(tunix.ModelConfig(**SIZES), rngs=nnx.Rngs(0))
        yield model, lambda model: model(tokens, positions, None, mask)[0], "lm_head"


def vision_transformer():
    attnax = pytest.importorskip("attnax", reason="the network of another package")
    sizes = {"image_size": 16, "patch_size": 4, "d_model": 32, "d_ff": 64, "num_heads": 4}
    config = attnax.VisionTransformerConfig(
        **sizes, num_layers=2, num_classes=10, attention_type="standard"
    )
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    model = attnax.VisionTransformer(nnx.Rngs(0), config)
    yield model, lambda model: model(images, deterministic=True), "head"


@pytest.fixture(scope="module", params=["attnax", pytest.param("tunix", marks=pytest.mark.slow)])
def network(request):
    """A network, a function that applies one of its kind, and the path of its head."""
    if request.param == "attnax":
        yield from vision_transformer()
    else:
        yield from llama(request.getfixturevalue("tunix"))


@pytest.mark.slow
def test_at_full_rank_the_output_is_the_same(network):
    dense, output, _ = network
    low_rank = factorise(dense, 1.0, init="svd")
    wanted = output(dense)
    size = jnp.abs(wanted).max()
    np.testing.assert_allclose(output(low_rank) / size, wanted / size, atol=1e-5)
    np.testing.assert_allclose(output(merge(low_rank)) / size, wanted / size, atol=1e-5)
    table = summary(low_rank, dense)
    assert all(row.rank is not None and row.error < 1e-5 for row in table.rows)


@pytest.mark.slow
def test_at_a_quarter_of_the_rank_it_trains_without_compiling_again(network):
    dense, output, head = network
    model = factorise(dense, 0.25, where=["layers", f"!{head}"])
    parameters = nnx.state(model, nnx.Param)
    table = summary(model)
    assert table.parameters == sum(leaf.size for leaf in jax.tree.leaves(parameters))
    low_rank = [row.path for row in table.rows if row.rank is not None]
    assert sorted(pair.name for pair in find_pairs(parameters)) == sorted(low_rank)
    assert all(path.startswith("layers/") for path in low_rank)
    optimizer = nnx.Optimizer(model, loro(0.01, exact_every=2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return -jax.nn.log_softmax(output(model))[..., 3].mean()

        loss, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return loss

    # The optimizer's first state is not on the mesh yet; from the second step on, all of it is.
    losses = [step(model, optimizer) for _ in range(2)]
    compiled = step.jitted_fn._cache_size()
    losses += [step(model, optimizer) for _ in range(3)]
    assert step.jitted_fn._cache_size() == compiled
    assert losses[-1] < losses[0]
