"""Linen: kernels become pairs and back, and Flax's layers compute by them."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from flax.core import freeze
from jax.sharding import NamedSharding, PartitionSpec

from loro_jax import find_pairs, loro
from loro_jax.layers.kernels import Layout
from loro_jax.layers.linen import (
    factorise_params,
    kernel_layouts,
    low_rank_calls,
    merge_params,
    summary_params,
)
from tests.layers.linen_helpers import assert_close, by_pairs, drawn

BIASED = {"bias_init": nn.initializers.normal(1.0)}

# A layer, the shape of its input, and the roles of its kernel's axes.
LAYERS = {
    "dense": (nn.Dense(5, **BIASED), (2, 3, 7), "io"),
    "dense without a bias": (nn.Dense(5, use_bias=False), (3, 7), "io"),
    "general": (nn.DenseGeneral((5, 2), axis=(-1, 1), **BIASED), (2, 3, 4, 6), "iioo"),
    "general, batch": (
        nn.DenseGeneral((5, 2), axis=(-1, 2), batch_dims=(0,), **BIASED),
        (2, 3, 4, 6),
        "biioo",
    ),
    "einsum": (nn.Einsum((6, 2, 5), "btd,dnh->bnth", **BIASED), (2, 3, 6), "ioo"),
    "einsum, batch": (nn.Einsum((4, 6, 7), "...nd,ndh->...nh", **BIASED), (2, 3, 4, 6), "bio"),
    "convolution": (
        nn.Conv(5, (3, 2), strides=(2, 1), kernel_dilation=(1, 2), padding="SAME", **BIASED),
        (2, 7, 6, 4),
        "iiio",
    ),
    "convolution, padded": (
        nn.Conv(5, (3,), padding=[(2, 1)], input_dilation=2, **BIASED),
        (2, 3, 6, 4),
        "iio",
    ),
    "convolution, causal": (nn.Conv(5, 3, padding="CAUSAL", **BIASED), (2, 6, 4), "iio"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_at_full_rank_a_layer_computes_the_same(name):
    layer, shape, roles = LAYERS[name]
    variables, x = drawn(layer, shape)
    layouts = kernel_layouts(layer, x)
    assert layouts == {"": Layout(variables["params"]["kernel"].shape, roles)}
    m, n = layouts[""].matrix_shape
    pairs = factorise_params(variables["params"], min(m, n), init="svd", layouts=layouts)
    batch = layouts[""].sizes("b")
    assert pairs["B"].shape == (*batch, m, min(m, n))
    assert pairs["A"].shape == (*batch, min(m, n), n)
    assert set(pairs) == {"B", "A"} | (set(variables["params"]) - {"kernel"})
    assert_close(jax.jit(by_pairs(layer))({"params": pairs}, x), layer.apply(variables, x))
    # Named arguments, as of nn.Dense.__call__(inputs=x).
    y = by_pairs(layer)({"params": pairs}, inputs=x)
    assert_close(y, layer.apply(variables, x))
    merged = merge_params(pairs, layouts=layouts)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, variables["params"])
    assert_close(layer.apply({"params": merged}, x), layer.apply(variables, x))


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_below_full_rank_a_layer_computes_what_its_merged_kernel_does(name):
    layer, shape, _ = LAYERS[name]
    variables, x = drawn(layer, shape)
    layouts = kernel_layouts(layer, x)
    pairs = factorise_params(variables["params"], 2, layouts=layouts)
    merged = merge_params(pairs, layouts=layouts)
    assert_close(by_pairs(layer)({"params": pairs}, x), layer.apply({"params": merged}, x))


def test_no_kernel_is_formed():
    layer, x = nn.DenseGeneral((4, 8), axis=(-2, -1)), jnp.ones((1, 8, 8))
    params = layer.init(jax.random.key(0), x)["params"]
    pairs = factorise_params(params, 2, layouts=kernel_layouts(layer, x))
    program = jax.make_jaxpr(jax.value_and_grad(lambda p: by_pairs(layer)({"params": p}, x).sum()))
    assert "64,32" not in str(program(pairs))
    assert "name=latent" in str(program(pairs))
    sizes = {
        v.aval.size
        for e in program(pairs).jaxpr.eqns
        for v in (*e.invars, *e.outvars)
        if hasattr(v, "aval")
    }
    assert max(sizes) == 128


class Block(nn.Module):
    """Attention and an MLP: a layer of a stack that scans."""

    @nn.compact
    def __call__(self, x, train):
        x = x + nn.MultiHeadDotProductAttention(2, name="attention", **BIASED)(nn.LayerNorm()(x))
        h = nn.Dense(24, name="up")(nn.LayerNorm()(x))
        h = nn.Dropout(0.1, deterministic=not train)(nn.gelu(h))
        return x + nn.Einsum((24, 16), "btf,fd->btd", name="down")(h), None


class Network(nn.Module):
    """All kinds of layers, a scan over rematerialised layers, and statistics of batches."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(16, (2, 2), strides=(2, 2), name="patches")(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x, _ = nn.scan(
            nn.remat(Block, static_argnums=(2,)),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=3,
        )(name="blocks")(x, train)
        return nn.Dense(10, name="head")(x.mean(1))


SHAPE = (4, 6, 6, 3)
LAYERS_OF_NETWORK = [
    *(f"blocks/attention/{name}" for name in ("key", "out", "query", "value")),
    *("blocks/down", "blocks/up", "head", "patches"),
]


@pytest.fixture(scope="module")
def network():
    model = Network()
    variables, x = drawn(model, SHAPE)
    return model, variables, x, kernel_layouts(model, x)


def test_a_network_at_full_rank_computes_the_same(network):
    model, variables, x, layouts = network
    assert sorted(layouts) == LAYERS_OF_NETWORK
    assert layouts["blocks/attention/query"] == Layout((16, 2, 8), "ioo")
    assert layouts["blocks/attention/out"] == Layout((2, 8, 16), "iio")
    pairs = factorise_params(variables["params"], 1.0, init="svd", layouts=layouts)
    assert pairs["blocks"]["up"]["B"].shape == (3, 24, 16)
    given = {**variables, "params": pairs}
    assert_close(jax.jit(by_pairs(model))(given, x), model.apply(variables, x))
    rngs = {"dropout": jax.random.key(2)}
    apply = {"train": True, "mutable": ["batch_stats"], "rngs": rngs}
    y, statistics = by_pairs(model, **apply)(given, x)
    wanted, statistics_wanted = model.apply(variables, x, **apply)
    assert_close(y, wanted)
    chex.assert_trees_all_close(statistics, statistics_wanted, atol=1e-5)


@pytest.mark.slow
def test_a_network_is_merged_exactly(network):
    model, variables, x, layouts = network
    pairs = factorise_params(variables["params"], 1.0, init="svd", layouts=layouts)
    merged = merge_params(pairs, layouts=layouts)
    chex.assert_trees_all_equal_structs(merged, variables["params"])
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, variables["params"])
    assert_close(model.apply({**variables, "params": merged}, x), model.apply(variables, x))
    frozen = factorise_params(freeze(variables["params"]), 1.0, init="svd", layouts=layouts)
    assert type(frozen) is type(freeze({}))
    chex.assert_trees_all_equal(frozen, freeze(pairs))


def test_the_pairs_are_found(network):
    _, variables, _, layouts = network
    params = factorise_params(variables["params"], 0.25, layouts=layouts, where="!head")
    names = [pair.name for pair in find_pairs(params)]
    assert sorted(names) == [name for name in LAYERS_OF_NETWORK if name != "head"]


@pytest.mark.slow
def test_pairs_are_trained_without_recompiling(network):
    model, variables, x, layouts = network
    where = "blocks/up"
    params = factorise_params(variables["params"], 4, layouts=layouts, where=where)
    labels = jnp.arange(SHAPE[0])
    tx = loro(3e-3, exact_every=2, exact_method="svd")
    traced = []

    def loss(params, statistics, key):
        traced.append(1)
        y, new = model.apply(
            {"params": params, **statistics},
            x,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        return optax.softmax_cross_entropy_with_integer_labels(y, labels).mean(), new

    @jax.jit
    @low_rank_calls()
    def step(params, state, statistics, key):
        gradient = jax.value_and_grad(loss, has_aux=True)
        (value, statistics), grads = gradient(params, statistics, key)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, statistics, value

    state, statistics, losses = tx.init(params), {"batch_stats": variables["batch_stats"]}, []
    for i in range(6):
        params, state, statistics, value = step(params, state, statistics, jax.random.key(i))
        losses.append(float(value))
    assert len(traced) == 1
    assert step._cache_size() == 1
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.slow
def test_a_stack_of_vmap(network):
    stack = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})(5)
    variables, x = drawn(stack, (3, 2, 7))
    layouts = kernel_layouts(stack, x)
    pairs = factorise_params(variables["params"], 5, init="svd", layouts=layouts)
    assert pairs["B"].shape == (3, 5, 5)
    assert_close(by_pairs(stack)({"params": pairs}, x), stack.apply(variables, x))
    chex.assert_trees_all_equal_shapes(merge_params(pairs, layouts=layouts), variables["params"])


def test_only_a_layer_of_flax_computes_by_pairs():
    class Doubled(nn.Dense):
        def __call__(self, inputs):
            return 2 * super().__call__(inputs)

    variables, x = drawn(Doubled(5), (2, 7))
    pairs = factorise_params(variables["params"], 5, init="svd")
    assert_close(by_pairs(Doubled(5))({"params": pairs}, x), Doubled(5).apply(variables, x))
    # Layers that still have their kernel, and initialisation, are as always.
    with low_rank_calls():
        chex.assert_trees_all_equal(
            nn.Dense(5).apply(variables, x), nn.Dense(5).apply(variables, x)
        )
        chex.assert_trees_all_equal(drawn(Doubled(5), (2, 7))[0], variables)


def test_dtypes_are_those_of_the_layer():
    layer = nn.Dense(5, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    variables, x = drawn(layer, (2, 7))
    pairs = factorise_params(variables["params"], 5, init="svd")
    assert {leaf.dtype for leaf in jax.tree.leaves(pairs)} == {jnp.dtype("float32")}
    y = by_pairs(layer)({"params": pairs}, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y, layer.apply(variables, x), atol=0.03)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables["params"])
    pairs = factorise_params(narrow, 5, init="svd")
    assert {leaf.dtype for leaf in jax.tree.leaves(pairs)} == {jnp.dtype("bfloat16")}
    chex.assert_trees_all_equal_shapes_and_dtypes(merge_params(pairs), narrow)


def test_products_have_the_precision_of_the_layer():
    layer = nn.Dense(5, precision="highest")
    variables, x = drawn(layer, (2, 7))
    pairs = factorise_params(variables["params"], 2)
    program = str(jax.make_jaxpr(by_pairs(layer))({"params": pairs}, x))
    assert (
        program.count("dot_general") == program.count("Precision.HIGHEST, Precision.HIGHEST") == 2
    )


@pytest.mark.slow
def test_metadata_keeps_its_names():
    partitioned = functools.partial(nn.with_partitioning, nn.initializers.lecun_normal())

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            heads = nn.DenseGeneral((2, 4), kernel_init=partitioned(("embed", "heads", "kv")))(x)
            out = nn.DenseGeneral(
                8, axis=(-2, -1), kernel_init=partitioned(("heads", "kv", "embed"))
            )
            return nn.Dense(8, kernel_init=partitioned(("embed", "mlp")))(out(heads)), None

    model = nn.scan(
        Layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=3,
        in_axes=nn.broadcast,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )()
    x = jax.random.normal(jax.random.key(1), (2, 8))
    variables = model.init(jax.random.key(0), x, None)
    layouts = kernel_layouts(model, x, None)
    pairs = factorise_params(variables["params"], 1.0, init="svd", layouts=layouts)
    names = jax.tree.map(
        lambda leaf: getattr(leaf, "names", None),
        pairs,
        is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned),
    )
    assert names == {
        "DenseGeneral_0": {
            "B": ("layers", "heads", None),
            "A": ("layers", None, "embed"),
            "bias": None,
        },
        "DenseGeneral_1": {
            "B": ("layers", "embed", None),
            "A": ("layers", None, "heads"),
            "bias": None,
        },
        "Dense_0": {"B": ("layers", "mlp", None), "A": ("layers", None, "embed"), "bias": None},
    }
    y, wanted = by_pairs(model)({"params": pairs}, x, None)[0], model.apply(variables, x, None)[0]
    assert_close(y, wanted)
    merged = merge_params(pairs, layouts=layouts)
    chex.assert_trees_all_equal_structs(merged["Dense_0"], variables["params"]["Dense_0"])
    assert merged["DenseGeneral_0"]["kernel"].names == ("layers", "embed", "heads", None)
    assert len(find_pairs(nn.unbox(factorise_params(variables["params"], 2, layouts=layouts)))) == 3


def test_names_constrain_the_factors_where_there_is_a_mesh():
    logical = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
    layer = nn.Dense(6, kernel_init=logical)
    variables, x = drawn(layer, (2, 4))
    pairs = factorise_params(variables["params"], 4, init="svd")
    assert type(pairs["B"]) is nn.LogicallyPartitioned
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh), nn.logical_axis_rules((("mlp", "x"), ("embed", None))):
        program = str(jax.make_jaxpr(by_pairs(layer))({"params": pairs}, x))
    assert "'x', None" in program


@pytest.mark.parametrize("abstract", [False, True])
def test_factors_are_sharded_as_the_kernel_is(abstract):
    mesh = jax.make_mesh((1, 1), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("x", "y"))
    kernel = jax.device_put(jnp.ones((4, 6)), sharding)
    if abstract:
        kernel = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype, sharding=sharding)
    pairs = factorise_params({"up": {"kernel": kernel}}, 2)["up"]
    assert pairs["B"].sharding == NamedSharding(mesh, PartitionSpec("y", None))
    assert pairs["A"].sharding == NamedSharding(mesh, PartitionSpec(None, "x"))


@pytest.mark.slow
def test_shapes_alone_are_enough(network):
    model, variables, x, layouts = network
    shapes = jax.eval_shape(lambda: variables["params"])
    pairs = factorise_params(shapes, 4, layouts=layouts)
    wanted = factorise_params(variables["params"], 4, layouts=layouts)
    chex.assert_trees_all_equal_shapes_and_dtypes(pairs, wanted)
    chex.assert_trees_all_equal_shapes_and_dtypes(merge_params(pairs, layouts=layouts), shapes)
    given = jax.ShapeDtypeStruct(x.shape, x.dtype)
    assert kernel_layouts(model, given, train=True) == layouts


def test_checkpoints_are_restored(network):
    _, variables, _, layouts = network
    pairs = factorise_params(variables["params"], 4, layouts=layouts)
    like = jax.tree.map(jnp.zeros_like, pairs)
    chex.assert_trees_all_equal(
        serialization.from_bytes(like, serialization.to_bytes(pairs)), pairs
    )
    # What is read without an example has NumPy's arrays.
    read = serialization.msgpack_restore(serialization.to_bytes(variables["params"]))
    chex.assert_trees_all_equal(factorise_params(read, 4, layouts=layouts), pairs)


def test_factors_depend_on_key_and_path_and_not_on_other_layers(network):
    _, variables, _, layouts = network
    params = variables["params"]
    all_of_them = factorise_params(params, 4, layouts=layouts)
    head = factorise_params(params, 4, layouts=layouts, where="head")["head"]
    chex.assert_trees_all_equal(head, all_of_them["head"])
    other = factorise_params(params, 4, layouts=layouts, where="head", key=jax.random.key(1))
    assert not np.allclose(other["head"]["B"], head["B"])
    assert not np.allclose(head["B"][:8], all_of_them["patches"]["B"][:8])


def test_the_rank_may_be_a_function(network):
    _, variables, _, layouts = network
    seen = {}

    def rank(path, shape):
        seen[path] = shape
        return {"head": 3, "patches": 0.5}.get(path)

    params = factorise_params(variables["params"], rank, layouts=layouts)
    assert sorted(seen) == LAYERS_OF_NETWORK
    assert seen["patches"] == (16, 12)
    assert sorted((pair.name, params[pair.name]["A"].shape[0]) for pair in find_pairs(params)) == [
        ("head", 3),
        ("patches", 6),
    ]


def test_without_layouts_only_matrices_are_factorised(network):
    _, variables, _, _ = network
    params = factorise_params(variables["params"], 2)
    assert [pair.name for pair in find_pairs(params)] == ["head"]
    chex.assert_trees_all_equal(params["blocks"], variables["params"]["blocks"])
    for where in ("!patches", lambda path, kernel: kernel.ndim == 2):
        again = factorise_params(variables["params"], 2, where=where)
        chex.assert_trees_all_equal(again, params)


def test_the_table_counts_parameters(network):
    _, variables, _, layouts = network
    params = variables["params"]
    pairs = factorise_params(params, 4, init="svd", layouts=layouts, where="blocks/**")
    table = summary_params(pairs, layouts=layouts, dense=params)
    assert table.parameters_before == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert table.parameters == sum(leaf.size for leaf in jax.tree.leaves(pairs))
    rows = {row.path: row for row in table.rows}
    assert sorted(rows) == LAYERS_OF_NETWORK
    assert (rows["head"].rank, rows["head"].error) == (None, None)
    row = rows["blocks/up"]
    assert (row.leading, row.shape, row.rank, row.bias) == ((3,), (24, 16), 4, 72)
    kernel = params["blocks"]["up"]["kernel"]
    product = (pairs["blocks"]["up"]["B"] @ pairs["blocks"]["up"]["A"]).mT
    assert np.isclose(row.error, jnp.linalg.norm(kernel - product) / jnp.linalg.norm(kernel))
    assert "blocks/up" in str(table)


class Called(nn.Module):
    """Calls of one einsum by equations."""

    equations: tuple[str, ...]

    @nn.compact
    def __call__(self, x):
        layer = nn.Einsum((6, 6), name="layer")
        for equation in self.equations:
            x = layer(x, equation)
        return x


def test_the_equation_may_be_given_in_the_call():
    model = Called(("btd,dh->bth", "bsd,dh->bsh"))
    variables, x = drawn(model, (2, 3, 6))
    layouts = kernel_layouts(model, x)
    pairs = factorise_params(variables["params"], 6, init="svd", layouts=layouts)
    assert_close(by_pairs(model)({"params": pairs}, x), model.apply(variables, x))
    # A kernel that is transposed between two calls has no roles.
    assert kernel_layouts(Called(("btd,dh->bth", "bth,dh->btd")), x) == {}


@pytest.mark.slow
def test_layers_without_a_matrix_are_left_alone():
    model = nn.Sequential(
        [
            nn.Conv(4, (1,), feature_group_count=2),
            nn.ConvLocal(4, (1,)),
            nn.Einsum((4,), "btd,d->btd", kernel_init=nn.initializers.ones),
            nn.WeightNorm(nn.Dense(4)),
            nn.Dense(3),
        ]
    )
    variables, x = drawn(model, (2, 3, 4))
    layouts = kernel_layouts(model, x)
    assert list(layouts) == ["layers_4"]
    pairs = factorise_params(variables["params"], 3, init="svd", layouts=layouts)
    assert [name for name, layer in pairs.items() if "B" in layer] == ["layers_4"]
    assert_close(by_pairs(model)({"params": pairs}, x), model.apply(variables, x))
