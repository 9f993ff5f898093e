"""What tests of Linen's layers share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from loro_jax.layers.linen import low_rank_calls


def drawn(model, shape, **arguments):
    """Parameters of a network and an input."""
    x = jax.random.normal(jax.random.key(1), shape)
    return model.init(jax.random.key(0), x, **arguments), x


def assert_close(found, wanted):
    """Equal to 1e-5 of the size of the output."""
    size = float(jnp.max(jnp.abs(wanted)))
    assert size > 0.1
    np.testing.assert_allclose(found, wanted, atol=1e-5 * size, rtol=0)


def by_pairs(model, **arguments):
    """The network with Flax's layers computing by pairs."""
    return low_rank_calls()(functools.partial(model.apply, **arguments))
