"""What :func:`loro_jax.layers.factorise` leaves alone, and what it refuses."""

import functools

import pytest
from flax import nnx

from loro_jax.layers import factorise, merge
from models import Llama, LlamaConfig
from tests.layers.test_nnx import Net, names_of_pairs, rngs


@pytest.fixture(scope="module")
def net():
    return Net(rngs())


class Custom(nnx.Linear):
    """A layer that computes something else than its parent."""

    def __call__(self, inputs):
        return super().__call__(inputs) ** 2


def test_layers_that_compute_something_else_are_left_alone():
    model = nnx.Sequential(Custom(4, 4, rngs=rngs()), nnx.Linear(4, 4, rngs=rngs()))
    assert names_of_pairs(factorise(model, 2)) == ["layers/1"]


def test_layers_without_a_matrix_are_left_alone_unless_asked_for():
    model = nnx.Sequential(
        nnx.Conv(4, 4, (3,), feature_group_count=2, rngs=rngs()),
        nnx.ConvTranspose(4, 4, (3,), rngs=rngs()),
        nnx.Linear(4, 4, rngs=rngs()),
    )
    assert names_of_pairs(factorise(model, 2)) == ["layers/2"]
    assert names_of_pairs(factorise(model, 2, where="!layers/1")) == ["layers/2"]
    for where in ("layers/*", lambda path, layer: isinstance(layer, nnx.Conv)):
        with pytest.raises(
            ValueError, match=r"'layers/0', Conv, has no kernel that is a matrix: it "
        ):
            factorise(model, 2, where=where)


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.one = nnx.Linear(4, 4, rngs=rngs)
        self.two = nnx.Linear(4, 4, rngs=rngs)
        self.two.kernel = self.one.kernel
        self.three = nnx.Linear(4, 4, rngs=rngs)


def test_tied_weights_are_refused_unless_they_are_left_out():
    with pytest.raises(
        ValueError, match=r"kernel of 'one' is shared with 'two/kernel'.*where='!one'"
    ):
        factorise(Tied(rngs()), 2)
    assert names_of_pairs(factorise(Tied(rngs()), 2, where="three")) == ["three"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"rank": 7},
            r"rank of 'heads/0', 6 inputs to 4 outputs, must be between 1 and 4, but is 7",
        ),
        ({"rank": 0}, r"must be between 1 and 8, but is 0"),
        (
            {"rank": 1.5},
            r"as a share of the smaller side, must be above 0 and at most 1, but is 1.5",
        ),
        (
            {"rank": 2, "where": "layer/**"},
            r"where = 'layer/\*\*' matches no layer; its layers are",
        ),
        ({"rank": 2, "where": "!head"}, r"where = '!head' matches no layer"),
        ({"rank": 2, "where": lambda path, layer: False}, r"predicate `where` selects no layer"),
        ({"rank": 2, "init": "gauss"}, r"initialise: unknown method 'gauss'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(net, arguments, message):
    with pytest.raises(ValueError, match=message):
        factorise(net, **arguments)


def test_a_rank_is_a_number(net):
    for rank in ("8", True, None):
        with pytest.raises(TypeError, match="must be a whole number or a share"):
            factorise(net, rank)


def test_nothing_changes_when_a_layer_is_refused(net):
    net = nnx.clone(net)
    with pytest.raises(ValueError, match="rank of 'heads/0'"):
        factorise(net, 5, in_place=True)
    assert names_of_pairs(net) == []


def test_a_single_layer_can_not_change_in_place():
    for change in (functools.partial(factorise, rank=2), merge):
        layer = nnx.Linear(4, 4, rngs=rngs())
        layer = layer if change is not merge else factorise(layer, 2)
        with pytest.raises(ValueError, match="a single layer, which can't change in place"):
            change(layer, in_place=True)


def test_an_activation_between_the_factors_is_no_matrix():
    config = LlamaConfig(
        64,
        hidden_size=16,
        intermediate_size=24,
        num_layers=1,
        num_heads=2,
        rank=4,
        projection="cola",
    )
    with pytest.raises(ValueError, match="merge: 'blocks/attention/k' can't be merged: ColaLinear"):
        merge(Llama(config, rngs()))
