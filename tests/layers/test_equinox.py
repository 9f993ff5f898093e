import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loro_jax import loro

eqx = pytest.importorskip("equinox", reason="layers for Equinox need equinox")

from loro_jax.layers.equinox import (  # noqa: E402
    LowRankConv,
    LowRankLinear,
    factorise,
    merge,
    summary,
)
from loro_jax.layers.examples import characters  # noqa: E402
from tests.layers.equinox_helpers import (  # noqa: E402
    ALL,
    KEY,
    Block,
    OwnCall,
    OwnField,
    OwnInit,
    apply,
    assert_same,
    leaves_of,
    linear,
    network,
    paths_of,
)

# Factorising


def test_at_full_rank_the_output_is_the_dense_one():
    net, x = network(), jax.random.normal(KEY, (5, 16))
    low_rank = factorise(net, 1.0, init="svd")
    assert isinstance(low_rank["blocks"][0].attn.query_proj, LowRankLinear)
    run = eqx.filter_jit(apply)
    dense = run(net, x)
    np.testing.assert_allclose(run(low_rank, x), dense, atol=1e-5 * float(jnp.abs(dense).max()))


def test_the_truncated_svd_is_the_best_approximation():
    layer = linear(24, 16)
    U, s, Vt = np.linalg.svd(np.asarray(layer.weight, np.float64), full_matrices=False)
    best = (U[:, :5] * s[:5]) @ Vt[:5]
    low_rank = factorise(layer, 5, init="svd")
    np.testing.assert_allclose(
        np.asarray(low_rank.B, np.float64) @ np.asarray(low_rank.A, np.float64), best, atol=1e-6
    )
    (row,) = summary(low_rank, layer).rows
    error = np.linalg.norm(s[5:]) / np.linalg.norm(s)
    np.testing.assert_allclose(row.error, error, rtol=1e-4)
    x = np.random.default_rng(0).normal(size=16)
    wanted = best @ x + np.asarray(layer.bias)
    np.testing.assert_allclose(low_rank(jnp.asarray(x, jnp.float32)), wanted, atol=1e-5)


@pytest.mark.parametrize("use_bias", [True, False])
def test_the_call_and_the_fields_are_those_of_the_dense_layer(use_bias):
    layer = linear(use_bias=use_bias)
    low_rank = factorise(layer, 4)
    assert (low_rank.in_features, low_rank.out_features) == (16, 24)
    assert low_rank.use_bias is use_bias
    assert low_rank.bias is layer.bias
    assert (low_rank.B.shape, low_rank.A.shape, low_rank.rank) == ((24, 4), (4, 16), 4)
    x = jnp.ones(16)
    np.testing.assert_array_equal(low_rank(x, key=KEY), low_rank(x))
    np.testing.assert_allclose(low_rank(x), merge(low_rank)(x), atol=1e-5)


def test_the_pairs_are_those_that_were_selected():
    net = network()
    before = jax.tree.leaves(net)
    assert paths_of(factorise(net, 4)) == ALL
    assert paths_of(factorise(net, 4, where="!head")) == ALL[:-1]
    attention = factorise(net, 4, where=["blocks/**", "!**/mlp"])
    assert paths_of(attention) == [path for path in ALL if "attn" in path]
    wide = factorise(net, 2, where=lambda path, layer: layer.out_features > 16)
    assert paths_of(wide) == ["blocks/0/mlp/layers/0", "blocks/1/mlp/layers/0"]
    # What is not selected is not copied, and the network given is as it was.
    assert wide["blocks"][0].attn.query_proj.weight is net["blocks"][0].attn.query_proj.weight
    assert all(x is y for x, y in zip(before, jax.tree.leaves(net), strict=True))


def test_ranks_may_differ_between_layers():
    def rank(path, shape):
        return None if path == "head/0" else 0.25 if "attn" in path else min(shape) // 2

    rows = {row.path: row.rank for row in summary(factorise(network(), rank)).rows}
    assert rows["blocks/1/attn/key_proj"] == 4
    assert rows["blocks/1/mlp/layers/0"] == 8
    assert rows["head/0"] is None


@pytest.mark.slow
def test_new_factors_depend_on_key_path_and_init():
    net = network()
    keys = (None, None, jax.random.key(1))
    # Without the size of the weights, which differs between layers, too.
    first, again, other = (factorise(net, 4, init="orth", key=key) for key in keys)
    assert_same(first, again)
    A = [[block.attn.query_proj.A for block in tree["blocks"]] for tree in (first, other)]
    assert not jnp.allclose(A[0][0], A[0][1])
    assert not jnp.allclose(A[0][0], A[1][0])
    lora = factorise(net, 4, where="head", init="lora")["head"][0]
    assert not jnp.any(lora.B)
    # Drawn at the size of the dense weight.
    product = factorise(linear(200, 200), 50).product()
    np.testing.assert_allclose(jnp.std(product), jnp.std(linear(200, 200).weight), rtol=0.1)


@pytest.mark.slow
def test_a_layer_can_be_made_without_a_dense_one():
    layer = LowRankLinear(400, 300, rank=100, key=KEY)
    dense = eqx.nn.Linear(400, 300, key=KEY)
    np.testing.assert_allclose(jnp.std(layer.product()), jnp.std(dense.weight), rtol=0.1)
    np.testing.assert_allclose(jnp.std(layer.bias), jnp.std(dense.bias), rtol=0.2)
    assert jax.tree.structure(merge(layer)) == jax.tree.structure(dense)
    small = LowRankLinear(8, 6, 2, use_bias=False, dtype=jnp.bfloat16, init="orth", key=KEY)
    assert small.bias is None
    assert small(jnp.ones(8, jnp.bfloat16)).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="between 1 and min"):
        LowRankLinear(8, 6, 7, key=KEY)


# Back to dense layers


def test_merging_restores_the_structure():
    net = network()
    merged = merge(factorise(net, 1.0, init="svd"))
    assert jax.tree.structure(merged) == jax.tree.structure(net)
    for x, y in zip(jax.tree.leaves(merged), jax.tree.leaves(net), strict=True):
        if eqx.is_array(x):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
            np.testing.assert_allclose(x, y, atol=1e-6)
    assert type(merged["head"][0]) is eqx.nn.Linear


def test_bfloat16_weights():
    layer = linear(dtype=jnp.bfloat16)
    low_rank = factorise(layer, 16, init="svd")
    assert low_rank.B.dtype == low_rank.A.dtype == jnp.bfloat16
    merged = merge(low_rank)
    assert merged.weight.dtype == jnp.bfloat16
    # Rounded once: the product itself is computed in float32.
    exact = np.asarray(low_rank.B, np.float32) @ np.asarray(low_rank.A, np.float32)
    np.testing.assert_array_equal(merged.weight, jnp.asarray(exact).astype(jnp.bfloat16))
    for dtype in (jnp.bfloat16, jnp.float32):
        assert low_rank(jnp.ones(16, dtype)).dtype == layer(jnp.ones(16, dtype)).dtype


def test_a_subclass_that_only_initialises_comes_back():
    layer = linear(layer_class=OwnInit)
    merged = merge(factorise(layer, 16, init="svd"))
    assert type(merged) is OwnInit
    assert jax.tree.structure(merged) == jax.tree.structure(layer)


# Stacks


def stack(depth=3):
    return eqx.filter_vmap(Block)(jax.random.split(KEY, depth))


def scanned(blocks, x):
    arrays, static = eqx.partition(blocks, eqx.is_array)

    def body(x, arrays):
        return eqx.combine(arrays, static)(x), None

    return jax.lax.scan(body, x, arrays)[0]


def test_a_stack_becomes_a_stack_of_pairs():
    blocks, x = stack(), jax.random.normal(KEY, (5, 16))
    low_rank = factorise(blocks, 1.0, init="svd")
    assert low_rank.mlp.layers[0].B.shape == (3, 24, 16)
    assert low_rank.attn.query_proj.bias.shape == (3, 16)
    run = eqx.filter_jit(scanned)
    np.testing.assert_allclose(run(low_rank, x), run(blocks, x), atol=2e-5)
    assert jax.tree.structure(merge(low_rank)) == jax.tree.structure(blocks)
    table = summary(factorise(blocks, 4), blocks)
    assert (table.rows[0].leading, table.rows[0].shape) == ((3,), (16, 16))
    assert table.parameters == leaves_of(factorise(blocks, 4))
    assert table.parameters_before == leaves_of(blocks)


# Training


def trained(model, loss, x, steps):
    """The model and its losses; approximate and exact steps are one program."""
    tx, compiled = loro(0.01, exact_every=2, exact_method="svd"), []

    @eqx.filter_jit
    def step(model, state):
        compiled.append(1)
        value, grads = eqx.filter_value_and_grad(loss)(model, x)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, value

    state, losses = tx.init(eqx.filter(model, eqx.is_inexact_array)), []
    for _ in range(steps):
        model, state, value = step(model, state)
        losses.append(float(value))
    assert len(compiled) == 1
    return model, losses


def test_loro_trains_without_compiling_again():
    net = factorise(network(), 4, where="blocks/0/attn", init="svd")
    x = jax.random.normal(KEY, (8, 5, 16))

    def loss(model, x):
        y = jnp.roll(x, 1, axis=1)[..., :4]
        return jnp.mean((jax.vmap(lambda x: apply(model, x))(x) - y) ** 2)

    model, losses = trained(net, loss, x, steps=6)
    assert losses[-1] < 0.9 * losses[0]
    moved = model["blocks"][0].attn.query_proj
    assert not jnp.allclose(moved.product(), net["blocks"][0].attn.query_proj.product())
    assert jax.tree.structure(model) == jax.tree.structure(net)


# Trees as Equinox handles them


def test_shapes_alone():
    net = network()
    abstract = eqx.filter_eval_shape(network)
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if eqx.is_array(x) else x,
        factorise(net, 4, init="svd"),
    )
    for found in (
        factorise(abstract, 4),
        eqx.filter_eval_shape(lambda: factorise(network(), 4, init="svd")),
    ):
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
        assert jax.tree.leaves(found) == jax.tree.leaves(wanted)
    assert jax.tree.leaves(merge(found)) == jax.tree.leaves(abstract)
    assert summary(found).parameters == summary(factorise(net, 4)).parameters
    assert summary(found, abstract).rows[0].error is None


def test_saved_and_restored(tmp_path):
    low_rank = factorise(network(), 4)
    eqx.tree_serialise_leaves(tmp_path / "net.eqx", low_rank)
    like = factorise(eqx.filter_eval_shape(network), 4)
    assert_same(eqx.tree_deserialise_leaves(tmp_path / "net.eqx", like), low_rank)
    # (JAX's relu cannot be pickled.)
    parts = [low_rank["blocks"][0].attn, factorise(eqx.nn.Conv2d(3, 8, 3, key=KEY), 4)]
    assert_same(pickle.loads(pickle.dumps(parts)), parts)


def test_surgery_and_partition():
    low_rank = factorise(network(), 4)
    arrays, static = eqx.partition(low_rank, eqx.is_inexact_array)
    assert_same(eqx.combine(arrays, static), low_rank)
    zeroed = eqx.tree_at(lambda net: net["head"][0].B, low_rank, replace_fn=jnp.zeros_like)
    assert not jnp.any(zeroed["head"][0].product())
    grads = eqx.filter_grad(lambda layer: jnp.sum(jax.vmap(layer)(jnp.ones((3, 16)))))(linear())
    assert grads.weight.shape == (24, 16)


def test_numpy_weights():
    layer = jax.tree.map(np.asarray, linear())
    np.testing.assert_allclose(factorise(layer, 16, init="svd").product(), layer.weight, atol=1e-6)


# The table


def test_the_table_counts_what_the_tree_has():
    net = network()
    low_rank = factorise(net, 4, where="!head", init="svd")
    table = summary(low_rank, net)
    assert [row.path for row in table.rows] == ALL
    assert table.parameters == leaves_of(low_rank)
    assert table.parameters_before == leaves_of(net)
    assert table.others == 2 * 2 * 16  # the norms'
    head = table.rows[-1]
    assert (head.rank, head.bias, head.shape, head.error) == (None, 4, (4, 16), None)
    assert summary(net).parameters == leaves_of(net)
    # Integers are no parameters; all arrays of a layer with more fields are.
    odd = {"a": jnp.arange(3), "b": linear(layer_class=OwnField), "c": linear(layer_class=OwnCall)}
    assert summary(odd).parameters == leaves_of(odd)
    with pytest.raises(ValueError, match="dense layer of 'blocks/0/attn/query_proj' at this path"):
        summary(low_rank, low_rank)
    with pytest.raises(ValueError, match="of shape 24 x 16, but found NoneType"):
        summary({"a": factorise(linear(), 4)}, {"b": linear()})


# Convolutions


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "space"),
    [
        (lambda: eqx.nn.Conv1d(4, 9, 3, padding="SAME", stride=2, key=KEY), (11,)),
        (lambda: eqx.nn.Conv2d(4, 9, (3, 2), padding=1, dilation=2, key=KEY), (9, 8)),
        (
            lambda: eqx.nn.Conv(
                2, 4, 9, 3, padding=1, padding_mode="circular", use_bias=False, key=KEY
            ),
            (6, 7),
        ),
    ],
)
def test_convolutions(make, space):
    conv, x = make(), jax.random.normal(KEY, (4, *space))
    low_rank = factorise(conv, 9, init="svd")
    assert isinstance(low_rank, LowRankConv)
    assert low_rank.A.shape == (9, 4 * np.prod(conv.kernel_size))
    np.testing.assert_allclose(low_rank(x, key=KEY), conv(x), atol=1e-5)
    merged = merge(low_rank)
    assert type(merged) is type(conv)
    assert jax.tree.structure(merged) == jax.tree.structure(conv)
    np.testing.assert_allclose(merged.weight, conv.weight, atol=1e-6)
    small = factorise(conv, 3)
    assert summary(small, conv).parameters == leaves_of(small)
    assert paths_of(small) == [""]


@pytest.mark.slow
def test_a_stack_of_convolutions():
    convs = eqx.filter_vmap(lambda key: eqx.nn.Conv2d(3, 5, 2, key=key))(jax.random.split(KEY, 4))
    low_rank, x = factorise(convs, 5, init="svd"), jnp.ones((4, 3, 6, 6))
    assert low_rank.B.shape == (4, 5, 5)
    call = eqx.filter_vmap(lambda conv, x: conv(x))
    np.testing.assert_allclose(call(low_rank, x), call(convs, x), atol=1e-5)
    assert merge(low_rank).weight.shape == convs.weight.shape


# The example


@pytest.mark.slow
def test_the_character_model(capsys):
    losses = characters.main(steps=40)
    # Of characters drawn by their frequencies alone: 4.4 bits.
    assert losses["dense, Adam"] < 3.9
    assert losses["low-rank, LORO"] < 3.9
    printed = capsys.readouterr().out
    assert "dense, Adam: 169,024 parameters" in printed
    assert "low-rank, LORO: 76,864 parameters" in printed


# A network of another package


@pytest.fixture(scope="module")
def vision_transformer():
    vit = pytest.importorskip("equimo.models.vit", reason="the network needs equimo")
    return vit.VisionTransformer(
        img_size=8, in_channels=3, dim=32, patch_size=4, num_heads=2, depths=[2], num_classes=10,
        reg_tokens=0, key=KEY,
    )  # fmt: skip


def images():
    return jax.random.normal(jax.random.key(1), (4, 3, 8, 8))


def logits(model, x):
    return jax.vmap(lambda x: model(x, key=KEY, inference=True))(x)


@pytest.mark.slow
def test_a_vision_transformer_of_another_package(vision_transformer):
    dense, model = vision_transformer, factorise(vision_transformer, quarter)
    full = factorise(dense, 1.0, init="svd")
    wanted = eqx.filter_jit(logits)(dense, images())
    found = eqx.filter_jit(logits)(full, images())
    assert float(jnp.abs(found - wanted).max() / jnp.abs(wanted).max()) < 1e-5
    assert max(row.error for row in summary(full, dense).rows) < 1e-5

    layers = ["attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2"]
    blocks = [f"blocks/0/blocks/{i}/{layer}" for i in range(2) for layer in layers]
    assert paths_of(model) == ["patch_embed/proj", *blocks, "head"]
    table = summary(model)
    assert table.parameters == leaves_of(model)
    assert table.parameters_before == leaves_of(dense)


def quarter(path, shape):
    return min(shape) // 4


@pytest.mark.slow
def test_a_vision_transformer_of_another_package_trains(vision_transformer):
    def loss(model, x):
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits(model, x), jnp.arange(4))
        return entropy.mean()

    _, losses = trained(factorise(vision_transformer, quarter), loss, images(), steps=4)
    assert losses[-1] < losses[0]
