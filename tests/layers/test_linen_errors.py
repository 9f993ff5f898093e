"""Errors of Linen's low-rank layers: one line with path, value and what was expected."""

import flax.linen as nn
import jax.numpy as jnp
import pytest

from loro_jax.layers.kernels import Layout
from loro_jax.layers.linen import factorise_params, merge_params
from tests.layers.linen_helpers import by_pairs, drawn

KERNEL = {"kernel": jnp.ones((4, 6))}
SQUARE = jnp.eye(4)
INVALID = {
    "a rank that does not fit": (
        lambda: factorise_params({"up": KERNEL}, 5),
        "factorise_params: the rank of 'up', 4 inputs to 6 outputs, must be between 1 and 4, but "
        "is 5; choose another, or leave the layer out: where='!up'.",
    ),
    "a pattern that matches nothing": (
        lambda: factorise_params({"up": KERNEL}, 2, where="down"),
        "factorise_params: where = 'down' matches no layer; its layers are: up.",
    ),
    "no matrix at all": (
        lambda: factorise_params({"scale": jnp.ones(3)}, 2),
        "factorise_params: no kernel of the parameters is known to be a matrix: expected a layer "
        "with a kernel (inputs, outputs), or layouts=kernel_layouts(model, *arguments).",
    ),
    "axes that are not known": (
        lambda: factorise_params({"conv": {"kernel": jnp.ones((3, 4, 6))}}, 2, where="conv"),
        "factorise_params: the kernel of 'conv', of shape (3, 4, 6), does not say which of its "
        "axes are inputs; pass layouts=kernel_layouts(model, *arguments), or leave it out: "
        "where='!conv'.",
    ),
    "a kernel that is no matrix": (
        lambda: factorise_params({"scale": {"kernel": jnp.ones(3)}}, 2, where=["scale"]),
        "factorise_params: the kernel of 'scale', of shape (3,), is no matrix; leave it out: "
        "where='!scale'.",
    ),
    "a kernel that is no matrix by its layer": (
        lambda: factorise_params({"up": KERNEL}, 2, where="up", layouts={}),
        "factorise_params: the kernel of 'up', of shape (4, 6), is no matrix by the layouts: "
        "expected a Dense, DenseGeneral or Einsum, or a Conv without groups and mask; leave it "
        "out: where='!up'.",
    ),
    "layouts of another network": (
        lambda: factorise_params({"up": KERNEL}, 2, layouts={"down": Layout((4, 6), "io")}),
        "factorise_params: layouts has 'down', which the parameters don't have; expected those of "
        'the same network, variables["params"].',
    ),
    "a stack that is not in front": (
        lambda: factorise_params(
            {"up": {"kernel": jnp.ones((4, 3, 6))}}, 2, layouts={"up": Layout((4, 6), "io")}
        ),
        "factorise_params: the kernel of 'up' has shape (4, 3, 6), but its layout is for (4, 6), "
        "before which only axes of a stack may come; expected the layouts of the same network, "
        "stacked by nn.scan or nn.vmap with variable_axes={'params': 0}.",
    ),
    "integers": (
        lambda: factorise_params({"up": {"kernel": jnp.ones((4, 6), jnp.int8)}}, 2),
        "factorise_params: the kernel of 'up' has the dtype int8; expected a real floating-point "
        "one, or where='!up'.",
    ),
    "tied weights": (
        lambda: factorise_params({"a": {"kernel": SQUARE}, "b": {"w": SQUARE}}, 2),
        "factorise_params: the kernel of 'a' is one array at ['a']['kernel'] and ['b']['w']: tied "
        "weights, which pairs would part; leave it out, where='!a', or pass copies.",
    ),
    "nothing to merge": (
        lambda: merge_params({"up": KERNEL}),
        "merge_params: the parameters have no pair to merge.",
    ),
    "a stack without layouts": (
        lambda: merge_params({"up": {"B": jnp.ones((3, 6, 2)), "A": jnp.ones((3, 2, 4))}}),
        "merge_params: the pair of 'up' has B of shape (3, 6, 2), which does not say what its "
        "leading axes are; pass layouts=kernel_layouts(model, *arguments).",
    ),
    "a pair of another layer": (
        lambda: merge_params(
            {"up": {"B": jnp.ones((6, 2)), "A": jnp.ones((2, 4))}},
            layouts={"up": Layout((4, 7), "io")},
        ),
        "merge_params: the pair of 'up' has B of shape (6, 2) and A of shape (2, 4), but its "
        "layout is for 4 inputs and 7 outputs.",
    ),
    "a call with a pair of another layer": (
        lambda: by_pairs(nn.Sequential([nn.Dense(7)]))(
            {"params": {"layers_0": {"B": jnp.ones((6, 2)), "A": jnp.ones((2, 4))}}},
            jnp.ones((2, 4)),
        ),
        "low_rank_calls: 'layers_0': the layer maps 4 inputs to 7 outputs, but its pair has B of "
        "shape (6, 2) and A of shape (2, 4).",
    ),
    "a convolution with groups": (
        lambda: by_pairs(nn.Conv(4, (1,), feature_group_count=2))(
            {"params": {"B": jnp.ones((4, 2)), "A": jnp.ones((2, 4))}}, jnp.ones((2, 3, 4))
        ),
        "low_rank_calls: '': a convolution with groups or a mask does not multiply by one matrix.",
    ),
    "a normalised kernel": (
        lambda: by_pairs(nn.WeightNorm(nn.Dense(6)))(
            {
                "params": {
                    "layer_instance": {"B": jnp.ones((6, 2)), "A": jnp.ones((2, 4))},
                }
            },
            jnp.ones((2, 4)),
        ),
        "low_rank_calls: 'layer_instance': WeightNorm normalises a kernel, but finds a pair; leave "
        "it out: where='!layer_instance'.",
    ),
    "a layer of another class": (
        lambda: by_pairs(nn.RNN(nn.OptimizedLSTMCell(4)))(
            {
                "params": factorise_params(
                    drawn(nn.RNN(nn.OptimizedLSTMCell(4)), (2, 3, 5))[0]["params"], 2
                )
            },
            jnp.ones((2, 3, 5)),
        ),
        "low_rank_calls: the parameters of 'cell/ii' hold a pair in place of the kernel, but a "
        "DenseParams computes by no pair; expected a Dense, DenseGeneral, Einsum or Conv: leave it "
        "out of the factorisation, where='!cell/ii'.",
    ),
}


@pytest.mark.parametrize("name", INVALID)
def test_errors_are_one_line_with_path_value_and_what_was_expected(name):
    act, message = INVALID[name]
    with pytest.raises(ValueError, match=r"^(factorise|merge|low)") as error:
        act()
    assert str(error.value) == message
