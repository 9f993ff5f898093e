"""Networks of Flax NNX made low-rank and dense again."""

import copy
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from jax.sharding import AxisType, PartitionSpec

from loro_jax import find_pairs, loro
from loro_jax.layers import factorise, merge, summary
from loro_jax.layers.common import ProjectionSpec
from loro_jax.layers.factorised import FactorisedLayer
from loro_jax.layers.low_rank import LowRankLinear
from models import Llama, LlamaConfig
from tests.helpers import run_module


def rngs():
    return nnx.Rngs(0)


def perturbed(model):
    """The model with random values in all parameters: biases are zero at first."""
    for i, (_, leaf) in enumerate(nnx.iter_graph(model)):
        if isinstance(leaf, nnx.Param):
            noise = jax.random.normal(jax.random.key(i), leaf.shape, jnp.float32)
            leaf[...] = (0.3 * noise).astype(leaf.dtype)
    return model


def normal(*shape):
    return jax.random.normal(jax.random.key(7), shape)


# A layer of each kind, with an input: (name, layer, shape of the input).
LAYERS = [
    ("linear", lambda: nnx.Linear(6, 5, rngs=rngs()), (2, 3, 6)),
    ("linear of a vector", lambda: nnx.Linear(6, 5, use_bias=False, rngs=rngs()), (6,)),
    ("general", lambda: nnx.LinearGeneral(6, (3, 4), rngs=rngs()), (2, 5, 6)),
    (
        "general over two axes",
        lambda: nnx.LinearGeneral((3, 4), (2, 5), axis=(1, -1), rngs=rngs()),
        (2, 3, 7, 4),
    ),
    (
        "general with a batch",
        lambda: nnx.LinearGeneral(6, 5, batch_axis={0: 2}, rngs=rngs()),
        (2, 3, 6),
    ),
    ("einsum", lambda: nnx.Einsum("bld,dhk->blhk", (6, 2, 4), (2, 4), rngs=rngs()), (2, 3, 6)),
    ("einsum to the left", lambda: nnx.Einsum("nta,hab->nthb", (8, 2, 4), rngs=rngs()), (3, 5, 2)),
    (
        "einsum with dots and a batch",
        lambda: nnx.Einsum("...gd,gfd->...gf", (3, 5, 4), rngs=rngs()),
        (2, 7, 3, 4),
    ),
    ("convolution", lambda: nnx.Conv(3, 8, (3, 2), rngs=rngs()), (2, 6, 7, 3)),
    (
        "convolution with strides",
        lambda: nnx.Conv(3, 8, (3, 3), 2, padding="VALID", kernel_dilation=2, rngs=rngs()),
        (2, 9, 9, 3),
    ),
    (
        "circular convolution without batch",
        lambda: nnx.Conv(3, 8, (3, 3), padding="CIRCULAR", use_bias=False, rngs=rngs()),
        (6, 6, 3),
    ),
    ("causal convolution", lambda: nnx.Conv(3, 8, 4, padding="CAUSAL", rngs=rngs()), (2, 9, 3)),
]


FAST = (
    "linear",
    "general over two axes",
    "einsum with dots and a batch",
    "convolution with strides",
)


def layers(*fast):
    """Those in ``fast`` in both tiers, all others in the slow one alone."""
    slow = {True: (), False: pytest.mark.slow}
    return [pytest.param(*x[1:], id=x[0], marks=slow[x[0] in fast]) for x in LAYERS]


@pytest.mark.parametrize(("make", "shape"), layers(*FAST))
def test_at_full_rank_each_layer_is_what_it_was(make, shape):
    dense = perturbed(make())
    low_rank = factorise(dense, 1.0, init="svd")
    x = normal(*shape)
    np.testing.assert_allclose(low_rank(x), dense(x), rtol=1e-5, atol=1e-5)

    # Back again, it is the same in structure, shapes and dtypes.
    merged = merge(low_rank)
    assert nnx.graphdef(merged) == nnx.graphdef(dense)
    chex.assert_trees_all_equal_shapes_and_dtypes(nnx.state(merged), nnx.state(dense))
    chex.assert_trees_all_close(nnx.state(merged), nnx.state(dense), atol=1e-5)


@pytest.mark.parametrize(("make", "shape"), layers("general with a batch", "convolution"))
def test_at_a_low_rank_each_layer_computes_with_its_product(make, shape):
    dense = perturbed(make())
    low_rank = factorise(dense, 0.5)
    (row,) = summary(low_rank).rows
    assert row.rank == max(1, round(0.5 * min(row.shape)))
    x = normal(*shape)
    np.testing.assert_allclose(low_rank(x), merge(low_rank)(x), rtol=1e-4, atol=1e-5)


class Net(nnx.Module):
    """A convolution, attention, a list of layers and a tuple of heads."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, 16, decode=False, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 12, rngs=rngs), nnx.Linear(12, 6, rngs=rngs)])
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.heads = nnx.data((nnx.Linear(6, 4, rngs=rngs),))

    def __call__(self, x):
        y = self.stem(x)
        y = self.attention(y.reshape(y.shape[0], -1, 8))
        for layer in self.layers:
            y = jnp.tanh(layer(y))
        return self.heads[0](self.norm(y))


ALL = [
    *("attention/key", "attention/out", "attention/query", "attention/value"),
    *("heads/0", "layers/0", "layers/1", "stem"),
]


@pytest.fixture(scope="module")
def net():
    return perturbed(Net(rngs()))


def names_of_pairs(model):
    return [pair.name for pair in find_pairs(nnx.state(model, nnx.Param))]


def test_a_network_at_full_rank_is_what_it_was(net):
    x = normal(2, 8, 8, 3)
    before = nnx.state(net)
    low_rank = factorise(net, 1.0, init="svd")
    np.testing.assert_allclose(low_rank(x), net(x), rtol=1e-4, atol=1e-5)
    assert names_of_pairs(low_rank) == ALL
    # The network that was given has not changed.
    chex.assert_trees_all_equal(nnx.state(net), before)
    assert type(net.layers[0]) is nnx.Linear


def test_in_place_it_is_the_same_object(net):
    net = nnx.clone(net)
    layers, out = net.layers, net.attention.out
    assert factorise(net, 2, where="layers", in_place=True) is net
    assert net.layers is layers
    assert net.attention.out is out
    assert names_of_pairs(net) == ["layers/0", "layers/1"]
    assert merge(net, in_place=True) is net
    assert type(net.layers[0]) is nnx.Linear


def test_the_svd_is_the_best_approximation():
    dense = perturbed(nnx.Linear(20, 12, rngs=rngs()))
    low_rank = factorise(dense, 5, init="svd")
    U, s, Vt = np.linalg.svd(np.float64(dense.kernel[...]).T, full_matrices=False)
    best = (U[:, :5] * s[:5]) @ Vt[:5]
    np.testing.assert_allclose(low_rank.product(), best, atol=1e-5)
    error = np.linalg.norm(s[5:]) / np.linalg.norm(s)
    (row,) = summary(low_rank, dense).rows
    assert row.error == pytest.approx(error, rel=1e-4)
    assert f"{100 * error:.2f}%" in str(summary(low_rank, dense))


@pytest.mark.slow
def test_factors_are_drawn_at_the_size_of_the_weights():
    dense = nnx.Linear(300, 200, rngs=rngs())
    dense.kernel[...] = 3.0 * normal(300, 200)
    for init in ("auto", "dlr"):
        assert 2.7 < jnp.std(factorise(dense, 40, init=init).product()) < 3.3
    # A fresh key for each layer, which another layer does not change.
    twice = nnx.Sequential(nnx.Linear(6, 6, rngs=rngs()), nnx.Linear(6, 6, rngs=rngs()))
    first, second = factorise(twice, 2).layers
    assert not jnp.allclose(first.A[...], second.A[...])
    (_, alone) = factorise(twice, 2, where="layers/1").layers
    chex.assert_trees_all_equal(alone.A[...], second.A[...])
    other = factorise(twice, 2, key=jax.random.key(1)).layers[1]
    assert not jnp.allclose(other.A[...], second.A[...])


@pytest.mark.slow
def test_a_weight_of_zeros_stays_zero_and_trains():
    dense = nnx.Linear(6, 5, kernel_init=nnx.initializers.zeros, rngs=rngs())
    low_rank = factorise(dense, 3)
    assert not low_rank.product().any()
    grads = nnx.grad(lambda layer: jnp.sum(jnp.sin(1 + layer(normal(4, 6)))))(low_rank)
    assert bool(jnp.any(grads.B[...] != 0))


def test_stacks_of_layers_are_pairs_with_leading_axes():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.up = nnx.Linear(8, 12, rngs=rngs)
            self.down = nnx.Einsum("...f,fd->...d", (12, 8), (8,), rngs=rngs)

        def __call__(self, x):
            x = x + self.attention(x)
            return x + self.down(jnp.tanh(self.up(x)))

    class Stack(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.vmap(Block)(rngs.split(3))

        def __call__(self, x):
            scan = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return scan(x, self.blocks)

    dense = perturbed(Stack(rngs()))
    low_rank = factorise(dense, 1.0, init="svd")
    x = normal(2, 5, 8)
    np.testing.assert_allclose(low_rank(x), dense(x), rtol=1e-4, atol=1e-5)
    assert low_rank.blocks.up.B.shape == (3, 12, 8)
    assert low_rank.blocks.attention.query.A.shape == (3, 8, 8)
    (row,) = [row for row in summary(low_rank).rows if row.path == "blocks/up"]
    assert (row.leading, row.shape, row.after) == ((3,), (12, 8), 3 * (8 * 20 + 12))
    merged = merge(low_rank)
    assert nnx.graphdef(merged) == nnx.graphdef(dense)
    np.testing.assert_allclose(merged(x), dense(x), rtol=1e-4, atol=1e-5)
    # Each layer of the stack has factors of its own.
    drawn = factorise(dense, 2).blocks.up.A[...]
    assert not jnp.allclose(drawn[0], drawn[1])


def test_it_trains_without_compiling_again(net):
    model = factorise(net, 2, where="!stem")
    optimizer = nnx.Optimizer(model, loro(0.01, exact_every=3), wrt=nnx.Param)
    x, wanted = normal(2, 8, 8, 3), normal(2, 16, 4)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - wanted) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [step(model, optimizer)]
    compiled = step.jitted_fn._cache_size()
    losses += [step(model, optimizer) for _ in range(7)]
    assert step.jitted_fn._cache_size() == compiled
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_exact_steps_move_the_product_as_the_paper_says():
    """With plain factors beside it, the same pair and the same gradients give the same steps."""
    dense = perturbed(nnx.LinearGeneral(6, (2, 5), rngs=rngs()))
    model = factorise(dense, 3)
    graphdef, params = nnx.split(model)
    plain = {"B": model.B[...], "A": model.A[...]}
    x = normal(4, 6)

    def loss(params):
        return jnp.sum(nnx.merge(graphdef, params)(x) ** 2)

    def plain_loss(plain):
        y = x @ plain["A"].T @ plain["B"].T + model.bias[...].reshape(-1)
        return jnp.sum(y**2)

    tx = loro(0.01, exact_every=1)
    updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params)
    wanted, _ = tx.update(jax.grad(plain_loss)(plain), tx.init(plain), plain)
    np.testing.assert_allclose(updates["B"][...], wanted["B"], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_dtypes_and_precision_are_those_of_the_layer():
    options = {"dtype": jnp.bfloat16, "param_dtype": jnp.float16, "precision": "highest"}
    for make in (
        lambda **options: nnx.Linear(6, 5, **options),
        lambda **options: nnx.LinearGeneral(6, (5, 2), **options),
        lambda **options: nnx.Einsum("bd,df->bf", (6, 5), (5,), **options),
        lambda **options: nnx.Conv(6, 5, (3,), **options),
    ):
        dense = make(**options, rngs=rngs())
        low_rank = factorise(dense, 2)
        assert low_rank.B.dtype == low_rank.A.dtype == low_rank.bias.dtype == jnp.float16
        x = normal(3, 6)
        assert low_rank(x).dtype == dense(x).dtype == jnp.bfloat16
        products = [
            equation
            for equation in jax.make_jaxpr(low_rank)(x).eqns
            if equation.primitive.name in ("dot_general", "conv_general_dilated")
        ]
        assert len(products) == 2
        assert all("HIGHEST" in str(p.params["precision"]) for p in products)
        assert all(p.outvars[0].aval.dtype == jnp.bfloat16 for p in products)
        assert merge(low_rank).kernel.dtype == jnp.float16


@pytest.mark.slow
def test_without_a_dtype_input_and_weights_are_promoted():
    dense = nnx.Linear(6, 5, param_dtype=jnp.bfloat16, rngs=rngs())
    low_rank = factorise(dense, 2)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32):
        x = jnp.ones((3, 6), dtype)
        assert low_rank(x).dtype == dense(x).dtype


def test_products_of_the_layer_are_called_for_both_factors():
    called = []

    def dot_general(*args, **kwargs):
        called.append(args[1].shape)
        return jax.lax.dot_general(*args, **kwargs)

    dense = nnx.Linear(6, 5, dot_general=dot_general, rngs=rngs())
    low_rank = factorise(dense, 2)
    assert isinstance(low_rank, FactorisedLayer)
    low_rank(normal(3, 6))
    assert called == [(6, 2), (2, 5)]


def test_other_code_may_read_the_options_of_a_layer():
    for layer in (nnx.Linear(6, 5, rngs=rngs()), nnx.Conv(6, 5, (3,), rngs=rngs())):
        low_rank = factorise(layer, 2)
        assert (low_rank.in_features, low_rank.out_features) == (6, 5)
        assert low_rank.param_dtype == jnp.float32
        with pytest.raises(AttributeError, match="no attribute 'kernel'"):
            _ = low_rank.kernel


def test_shared_layers_stay_shared():
    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.one = nnx.Linear(4, 4, rngs=rngs)
            self.other = self.one

    low_rank = factorise(Twice(rngs()), 2)
    assert low_rank.one is low_rank.other
    assert isinstance(low_rank.one, LowRankLinear)
    assert merge(low_rank).other is not None
    assert summary(low_rank).parameters == 4 * 4 + 4


def test_sharding_annotations_and_arrays_keep_their_axes():
    mesh = jax.make_mesh((1, 1), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("data", "tensor"))
    with jax.set_mesh(mesh):
        linear = nnx.Linear(6, 4, kernel_init=init, rngs=rngs())
        heads = nnx.LinearGeneral(
            6, (2, 3), kernel_metadata={"out_sharding": (None, "tensor", None)}, rngs=rngs()
        )
    # Outside of the mesh, too.
    for layer, of_B, of_A in (
        (factorise(linear, 2), ("tensor", None), (None, "data")),
        (factorise(heads, 2), ("tensor", None), (None, None)),
    ):
        specs = nnx.get_partition_spec(nnx.state(layer))
        assert specs["B"].get_value() == PartitionSpec(*of_B)
        assert specs["A"].get_value() == PartitionSpec(*of_A)
        assert layer.B[...].sharding.spec == PartitionSpec(*of_B)
    restored = merge(factorise(heads, 2))
    assert restored.kernel.get_metadata() == heads.kernel.get_metadata()


@pytest.mark.slow
def test_shapes_alone_and_traced_networks(net):
    abstract = nnx.eval_shape(lambda: Net(rngs()))
    for low_rank in (
        factorise(abstract, 2),
        factorise(abstract, 2, init="svd"),
        nnx.eval_shape(lambda: factorise(Net(rngs()), 2)),
    ):
        assert isinstance(low_rank.stem.B.get_value(), jax.ShapeDtypeStruct)
        assert summary(low_rank).parameters == summary(factorise(net, 2)).parameters

    @nnx.jit
    def create():
        return factorise(Net(rngs()), 2)

    chex.assert_trees_all_close(
        nnx.state(create(), nnx.Param), nnx.state(factorise(Net(rngs()), 2), nnx.Param), rtol=1e-5
    )


@pytest.mark.slow
def test_it_survives_copies_and_files(net, tmp_path):
    low_rank = factorise(net, 2)
    x = normal(2, 8, 8, 3)
    wanted = low_rank(x)
    for other in (
        pickle.loads(pickle.dumps(low_rank)),
        copy.deepcopy(low_rank),
        nnx.clone(low_rank),
        nnx.merge(*nnx.split(low_rank)),
    ):
        chex.assert_trees_all_equal(other(x), wanted)
        assert nnx.graphdef(other) == nnx.graphdef(low_rank)
    graphdef, state = nnx.split(low_rank)
    plain = nnx.to_pure_dict(state)
    zeros = jax.tree.map(jnp.zeros_like, plain)
    read = serialization.from_bytes(zeros, serialization.to_bytes(plain))
    chex.assert_trees_all_equal(read, plain)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", plain)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "saved", zeros)
    nnx.replace_by_pure_dict(state, restored)
    chex.assert_trees_all_equal(nnx.merge(graphdef, state)(x), wanted)


@pytest.mark.slow
def test_ranks_may_differ(net):
    def rank(path, shape):
        return {"stem": None, "heads/0": 0.5}.get(path, min(shape) // 2)

    rows = {row.path: row for row in summary(factorise(net, rank)).rows}
    assert rows["stem"].rank is None
    assert {path: row.rank for path, row in rows.items() if row.rank} == {
        **dict.fromkeys(("attention/key", "attention/out", "attention/query"), 4),
        **{"attention/value": 4, "heads/0": 2, "layers/0": 4, "layers/1": 3},
    }


def test_the_summary_counts_all_parameters(net):
    for model in (net, factorise(net, 2), factorise(net, 0.5, where=["**", "!heads"])):
        leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
        table = summary(model)
        assert table.parameters == sum(leaf.size for leaf in leaves)
        assert table.parameters_before == summary(net).parameters
    assert "layers/0" in str(table)
    assert repr(table) == str(table)
    (stem,) = [row for row in table.rows if row.path == "stem"]
    assert (stem.shape, stem.flops_after) == ((8, 27), 6 * 4 * (8 + 27))


@pytest.mark.slow
def test_our_own_llama_merges_and_has_a_summary():
    config = LlamaConfig(
        64, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, rank=4
    )
    model = Llama(config, rngs())
    tokens = jnp.arange(10).reshape(2, 5)
    dense = merge(model)
    np.testing.assert_allclose(dense(tokens), model(tokens), rtol=1e-4, atol=1e-5)
    assert find_pairs(nnx.state(dense, nnx.Param)) == []
    table = summary(model)
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert table.parameters == sum(leaf.size for leaf in leaves)
    assert table.parameters_before == summary(dense).parameters


def test_projections_with_a_bias_keep_it_when_they_are_merged():
    spec = ProjectionSpec(rank=2, use_bias=True)
    model = perturbed(LowRankLinear(6, 5, spec, rngs()))
    x = normal(3, 6)
    np.testing.assert_allclose(merge(model)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["auto", "explicit"])
def test_on_eight_devices_factors_are_sharded_as_the_kernel_was(axes):
    (seen,) = run_module("tests.layers.eight_devices", axes)
    rows, columns, whole = (str(PartitionSpec(*names)) for names in SPECS)
    over_data = str(PartitionSpec(None, "data"))
    assert seen["axes"] == {
        **{"up": [rows, whole], "heads": [rows, whole]},
        **{"down": [whole, columns], "out": [whole, columns], "head": [whole, over_data]},
    }
    assert seen["error"] < 1e-5
    assert seen["merged"] < 1e-5
    assert seen["losses"][-1] < seen["losses"][0]


# Rows of B, columns of A, and neither.
SPECS = [("tensor", None), (None, "tensor"), (None, None)]
