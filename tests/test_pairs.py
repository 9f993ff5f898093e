import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx

from loro_jax import LowRank, find_pairs, loro

B, A = jnp.ones((6, 2)), jnp.ones((2, 4))


def shapes(params, spec=None):
    leaves = jax.tree.leaves(params)
    return {p.name: (leaves[p.B].shape, leaves[p.A].shape) for p in find_pairs(params, spec)}


def test_lowrank_nodes_anywhere():
    params = {"x": {"w": LowRank(B, A)}, "y": [LowRank(B, A), jnp.ones(3)], "b": jnp.ones(4)}
    assert shapes(params) == {"x/w": ((6, 2), (2, 4)), "y/0": ((6, 2), (2, 4))}


def test_a_bare_pair():
    assert shapes(LowRank(B, A)) == {"": ((6, 2), (2, 4))}


def test_sibling_leaves():
    params = {"up": {"B": B, "A": A, "bias": jnp.ones(6)}, "down": {"A": A, "B": B}}
    assert shapes(params) == {"down": ((6, 2), (2, 4)), "up": ((6, 2), (2, 4))}


def test_leaves_of_the_same_name_under_different_parents_do_not_pair():
    params = {"one": {"B": B}, "two": {"A": A}}
    assert shapes(params) == {}


def test_scanned_layers_with_leading_axes():
    params = {"blocks": {"q": {"B": jnp.ones((3, 6, 2)), "A": jnp.ones((3, 2, 4))}}}
    assert shapes(params) == {"blocks/q": ((3, 6, 2), (3, 2, 4))}


class Network(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([self.Layer() for _ in range(2)])

    class Layer(nnx.Module):
        def __init__(self):
            self.B, self.A = nnx.Param(B), nnx.Param(A)
            self.bias = nnx.Param(jnp.ones(6))


def test_nnx_state_and_its_pure_dict():
    state = nnx.state(Network(), nnx.Param)
    expected = {"layers/0": ((6, 2), (2, 4)), "layers/1": ((6, 2), (2, 4))}
    assert shapes(state) == expected
    assert shapes(nnx.to_pure_dict(state)) == expected


def test_boxed_linen_parameters():
    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x):
            init = linen.with_partitioning(linen.initializers.ones, (None, "rank"))
            B = self.param("B", init, (6, 2))
            A = self.param("A", linen.initializers.ones, (2, 4))
            return x @ A.T @ B.T

    params = Layer().init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    assert isinstance(params["B"], linen.Partitioned)
    assert shapes({"layer": params}) == {"layer": ((6, 2), (2, 4))}


def test_attributes_of_a_dataclass():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Layer:
        B: jax.Array
        A: jax.Array

    assert shapes({"layer": Layer(B, A)}) == {"layer": ((6, 2), (2, 4))}


def test_abstract_parameters():
    params = jax.eval_shape(lambda: {"w": LowRank(B, A)})
    assert shapes(params) == {"w": ((6, 2), (2, 4))}


def test_a_spec_names_pairs_whatever_their_leaves_are_called():
    params = {"up": B, "down": A, "bias": jnp.ones(3)}
    spec = {"up": "lora.B", "down": "lora.A", "bias": None}
    assert shapes(params, spec) == {"lora": ((6, 2), (2, 4))}
    assert shapes(params, lambda tree: spec) == {"lora": ((6, 2), (2, 4))}


def test_a_spec_may_leave_a_pair_out():
    params = {"one": {"B": B, "A": A}, "two": {"B": B, "A": A}}
    spec = {"one": {"B": None, "A": None}, "two": {"B": "two.B", "A": "two.A"}}
    assert list(shapes(params, spec)) == ["two"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"up": "x.B", "down": None}, "without its other side"),
        ({"up": "x.B", "down": "x.B"}, "twice"),
        ({"up": "x.C", "down": "x.A"}, r"at \['up'\], found 'x.C'"),
        ({"up": "x.B"}, "structure of the parameters"),
        ({"up": "x.A", "down": "x.B"}, "the pair 'x'"),
    ],
)
def test_specs_that_do_not_fit(spec, message):
    with pytest.raises(ValueError, match=message):
        find_pairs({"up": B, "down": A}, spec)


def test_leaves_that_look_like_a_pair_and_do_not_multiply_are_named():
    with pytest.raises(ValueError, match=r"the pair 'ssm'.*\(6, 2\).*\(3, 4\)"):
        find_pairs({"ssm": {"B": B, "A": jnp.ones((3, 4))}})


def test_no_pair_is_an_error_that_lists_what_was_looked_for_and_found():
    with pytest.raises(ValueError, match=r"(?s)LowRank nodes.*\['dense'\]\['kernel'\]: \(3, 4\)"):
        loro(0.1).init({"dense": {"kernel": jnp.ones((3, 4))}})


def test_without_pairs_it_is_adam_when_asked():
    params = {"kernel": jnp.ones((3, 4))}
    tx = loro(0.1, pairs="optional")
    updates, _ = tx.update({"kernel": jnp.full((3, 4), 2.0)}, tx.init(params), params)
    assert jnp.allclose(updates["kernel"], -0.1, atol=1e-3)


def test_masked_holes_of_optax_are_passed_over():
    params = {"w": LowRank(B, A), "b": optax.MaskedNode()}
    assert list(shapes(params)) == ["w"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Tower:
    query: jax.Array
    value: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Critic:
    value: jax.Array


@pytest.mark.parametrize(
    "towers",
    [
        ({"query": jnp.ones(3), "value": B}, {"query": jnp.ones(3), "value": A}),
        ({"value": B}, {"value": A}),
        (Tower(jnp.ones(3), B), Tower(jnp.ones(3), A)),
        (Critic(B), Critic(A)),
        ({"value": {"value": B}}, {"value": {"value": A}}),
        ([B], [A]),
    ],
    ids=["dicts", "lone entries", "dataclasses", "lone attributes", "nested", "lists"],
)
def test_containers_named_b_and_a_are_no_pair(towers):
    params = {"B": towers[0], "A": towers[1], "w": LowRank(B, A)}
    assert list(shapes(params)) == ["w"]


def test_a_box_of_a_whole_tree_and_of_nothing():
    params = {"x": nnx.Param({"B": B, "A": A}), "y": nnx.Param(LowRank(B, A)), "z": nnx.Param(None)}
    assert set(shapes(params).values()) == {((6, 2), (2, 4))}
    assert len(find_pairs(params)) == 2


def test_keys_with_slashes_are_no_deeper_paths():
    params = {"a/b": {"B": B}, "a": {"b": {"A": A}}, "w": LowRank(2 * B, 2 * A)}
    with pytest.raises(ValueError, match="fits it"):  # lone, both of them, and not of each other
        find_pairs(params)
    assert shapes({"a/b": {"B": B}, "a": {"b": {"A": A}}}) == {}


def test_square_siblings_are_regular_parameters_and_it_says_so():
    A_square, B_square = 0.9 * jnp.eye(3).at[0, 1].set(0.3), jnp.diag(jnp.array([1.0, 2.0, 3.0]))
    params = {"ssm": {"A": A_square, "B": B_square}, "w": LowRank(B, A)}
    with pytest.warns(UserWarning, match=r"under 'ssm' are both square, of shape \(3, 3\)"):
        assert list(shapes(params)) == ["w"]
    # Whoever says that they are a pair gets one, without a word.
    assert list(shapes({"full": LowRank(B_square, A_square)})) == ["full"]
    assert list(shapes(params, "all")) == ["ssm", "w"]
    spec = {"ssm": {"A": "ssm.A", "B": "ssm.B"}, "w": LowRank(None, None)}
    assert list(shapes(params, spec)) == ["ssm"]
    spec = {"ssm": {"A": None, "B": None}, "w": LowRank("w.B", "w.A")}
    assert list(shapes(params, spec)) == ["w"]


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, bool])
def test_factors_that_are_not_real_are_named(dtype):
    params = {"w": {"B": B, "A": A.astype(dtype)}}
    with pytest.raises(ValueError, match=f"'w'.*real floating-point .* A is {jnp.dtype(dtype)}"):
        find_pairs(params)


class Shared(nnx.Module):
    """Projections of which each has factors of its own but for those that are given."""

    def __init__(self, **given):
        self.B, self.A = nnx.Param(B), nnx.Param(A)
        for name, factor in given.items():
            setattr(self, name, factor)


@pytest.mark.parametrize("side", ["B", "A"])
def test_a_factor_that_modules_share_is_named(side):
    q = Shared()
    model = nnx.Dict(q=q, k=Shared(**{side: getattr(q, side)}), v=Shared())
    other = "A" if side == "B" else "B"
    with pytest.raises(ValueError, match=f"'q' has {other} of shape .* but no {side}, .* of 'k'"):
        loro(0.1).init(nnx.state(model, nnx.Param))
    whole = nnx.Dict(q=q, k=nnx.Dict(inner=q))
    assert len(find_pairs(nnx.state(whole, nnx.Param))) == 1


def test_a_lone_factor_that_fits_nothing_or_beside_a_hole_is_a_regular_leaf():
    lone = {"one": {"B": jnp.ones((6, 3))}, "w": LowRank(B, A)}
    assert list(shapes(lone)) == ["w"]
    for hole in (optax.MaskedNode(), None):
        frozen = {"one": {"B": B, "A": hole}, "w": LowRank(B, A)}
        assert list(shapes(frozen)) == ["w"]
    spec = {"one": {"B": None}, "w": LowRank("w.B", "w.A")}
    assert list(shapes({"one": {"B": B}, "w": LowRank(B, A)}, spec)) == ["w"]


def test_a_spec_may_be_a_module_that_can_be_called():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Net:
        down: jax.Array
        up: jax.Array

        def __call__(self, params):
            return Net("x.A", "x.B")

    params = Net(A, B)
    assert list(shapes(params, Net("w.A", "w.B"))) == ["w"]
    assert list(shapes({"net": params}, lambda _: {"net": Net("w.A", "w.B")})) == ["w"]
    assert list(shapes(params, jax.tree_util.Partial(params))) == ["x"]


def test_holes_of_the_parameters_are_holes_of_the_spec():
    assert list(
        shapes({"up": B, "down": A, "none": None}, {"up": "w.B", "down": "w.A", "none": None})
    )
