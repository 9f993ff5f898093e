"""What `factorise` leaves alone, and what it refuses."""

import jax
import jax.numpy as jnp
import pytest

eqx = pytest.importorskip("equinox", reason="layers for Equinox need equinox")

from loro_jax.layers.equinox import LowRankLinear, factorise, summary  # noqa: E402
from tests.layers.equinox_helpers import (  # noqa: E402
    KEY,
    OwnCall,
    OwnField,
    leaves_of,
    linear,
    network,
    paths_of,
)

ODD = {
    "call": (lambda: linear(layer_class=OwnCall), "has the class OwnCall, with another __call__"),
    "field": (lambda: linear(layer_class=OwnField), "has the class OwnField, with other fields"),
    "scalar": (lambda: linear("scalar"), 'has "scalar" features'),
    "grouped": (
        lambda: eqx.nn.Conv1d(4, 4, 3, groups=2, key=KEY),
        "is a convolution with 2 groups",
    ),
    "norm/layer": (
        lambda: eqx.nn.WeightNorm(linear()),
        "has a weight that eqx.nn.WeightNorm normalises",
    ),
    "spectral/layer": (
        lambda: eqx.nn.SpectralNorm(linear(), "weight", key=KEY),
        "has a weight that eqx.nn.SpectralNorm normalises",
    ),
    "axes": (
        lambda: eqx.filter_vmap(lambda key: linear(), out_axes=1)(jax.random.split(KEY, 3)),
        "has a weight of 24 x 3 x 16, float32, in place of 24 x 16, real",
    ),
    "complex": (lambda: linear(dtype=jnp.complex64), "has a weight of 24 x 16, complex64"),
    "empty": (lambda: linear(4, 0), "has an empty weight, 4 x 0"),
    "none": (
        lambda: eqx.tree_at(lambda layer: layer.weight, linear(), None),
        "has no array as its weight, but None",
    ),
    "pair": (lambda: factorise(linear(), 4), "is low-rank already: merge it first"),
}


@pytest.mark.parametrize("path", ODD)
def test_what_cannot_be_factorised(path):
    make, obstacle = ODD[path]
    tree = {path.split("/")[0]: make(), "z": linear()}
    low_rank = factorise(tree, 4)
    others = [before for before in jax.tree.leaves(tree) if before is not tree["z"].weight]
    assert all(any(x is y for y in jax.tree.leaves(low_rank)) for x in others)
    assert isinstance(low_rank["z"], LowRankLinear)
    assert summary(low_rank).parameters == leaves_of(low_rank)
    with pytest.raises(ValueError, match=f"^factorise: '{path}' {obstacle}") as error:
        factorise(tree, 4, where=path)
    assert str(error.value).endswith(f"leave it out: where='!{path}'.")
    assert "\n" not in str(error.value)


def test_errors():
    net = network()
    with pytest.raises(ValueError, match=r"'head/0', 16 inputs to 4 outputs.* 1 and 4, but is 5"):
        factorise(net, 5)
    with pytest.raises(ValueError, match=r"where = 'embed' matches no layer; its layers are: bloc"):
        factorise(net, 4, where="embed")
    with pytest.raises(ValueError, match="the predicate `where` selects no layer"):
        factorise(net, 4, where=lambda path, layer: False)
    with pytest.raises(ValueError, match=r"no layer of the network can be factorised; expected an"):
        factorise({"norm": eqx.nn.LayerNorm(4), "a": linear(layer_class=OwnCall)}, 4)
    with pytest.raises(TypeError, match="the rank of 'blocks/0/attn/query_proj' must be a whole"):
        factorise(net, "4")
    with pytest.raises(ValueError, match="unknown method 'svdd'"):
        factorise(net, 4, init="svdd")


def test_tied_weights():
    embedding = eqx.nn.Embedding(24, 16, key=KEY)
    head = eqx.tree_at(lambda layer: layer.weight, linear(), embedding.weight)
    tree = {"embed": embedding, "head": head, "other": linear(8, 4)}
    message = r"^factorise: 'head/weight' and 'embed/weight' are the same array, .*'!head'\.$"
    for where in (None, "head"):
        with pytest.raises(ValueError, match=message):
            factorise(tree, 4, where=where)
    assert paths_of(factorise(tree, 2, where="!head")) == ["other"]
    with pytest.raises(ValueError, match=r"'0/weight' and '1/weight' are the same array"):
        factorise([head, head], 4)


@pytest.mark.parametrize("transpose", [False, True])
def test_weights_that_equinox_shares(transpose):
    embedding = eqx.nn.Embedding(24, 16, key=KEY)
    layer = linear(16, 24) if transpose else linear(24, 16)
    get = (lambda pair: pair[1].weight.T) if transpose else (lambda pair: pair[1].weight)
    tree = {
        "from": eqx.nn.Shared((embedding, layer), lambda pair: pair[0].weight, get),
        "a": linear(),
    }
    low_rank = factorise(tree, 4)
    assert paths_of(low_rank) == ["a"]
    low_rank["from"]()
    with pytest.raises(ValueError, match=r"'from/pytree/1' has a weight that eqx.nn.Shared ties"):
        factorise(tree, 4, where="from")
    if not transpose:
        tree = {
            "to": eqx.nn.Shared(
                (embedding, layer), lambda pair: pair[1].weight, lambda pair: pair[0].weight
            )
        }
        with pytest.raises(ValueError, match="'to/pytree/1' has no array as its weight, but Sha"):
            factorise(tree, 4, where="to")


def test_layers_that_equinox_shares():
    pair = (linear(16), eqx.nn.Linear(16, 16, key=jax.random.key(1)), linear(8))
    shared = eqx.nn.Shared(pair, lambda layers: layers[1], lambda layers: layers[0])
    low_rank = factorise({"s": shared}, 4)
    assert paths_of(low_rank) == ["s/pytree/0", "s/pytree/2"]
    first, second, _ = low_rank["s"]()
    assert first.B is second.B
