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
    tx = loro(0.1, require_pairs=False)
    updates, _ = tx.update({"kernel": jnp.full((3, 4), 2.0)}, tx.init(params), params)
    assert jnp.allclose(updates["kernel"], -0.1, atol=1e-3)


def test_masked_holes_of_optax_are_passed_over():
    params = {"w": LowRank(B, A), "b": optax.MaskedNode()}
    assert list(shapes(params)) == ["w"]
