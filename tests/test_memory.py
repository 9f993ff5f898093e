import jax
import jax.numpy as jnp

from loro_jax import LowRank, loro
from loro_jax.memory import count_bytes, count_parameters, footprint


def test_counts_are_those_of_the_arrays():
    params = {"w": LowRank(jnp.ones((64, 4)), jnp.ones((4, 32), jnp.bfloat16)), "b": jnp.ones(3)}
    assert count_parameters(params) == 64 * 4 + 4 * 32 + 3
    assert count_bytes(params) == sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def test_abstract_trees_count_like_real_ones():
    params = {"w": LowRank(jnp.ones((64, 4)), jnp.ones((4, 32)))}
    state = loro(0.1).init(params)
    abstract = footprint(*jax.eval_shape(lambda: (params, state)))
    assert abstract == footprint(params, state)
    counters = 5 * 4  # steps, fallbacks, a count for each of the two Adams, and a flag
    assert abstract.optimizer_bytes == 2 * abstract.weight_bytes + counters
    assert abstract.total_bytes == 4 * abstract.weight_bytes + counters
