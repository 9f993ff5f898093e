"""Ensembles whose members train on devices of their own, and end where each does alone.

A program, because the number of devices is fixed when JAX starts. Usage:
``python -m tests.ensembles shard_map|explicit``.
"""

import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from loro_jax import LowRank, initialise, loro, orthogonal


def ensemble(members, m, n):
    """Pairs of rank 2 along a leading axis."""
    pairs = [LowRank(*initialise(jax.random.key(i), m, n, 2)) for i in range(members)]
    return jax.tree.map(lambda *x: jnp.stack(x), *pairs)


def train(tx, params):
    """Two steps, of which the second is exact."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(params, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), length=2)[0][0]


def alone(tx, members):
    """The members' products, when all are trained on one device."""
    found = jax.jit(jax.vmap(lambda params: train(tx, params)))(members)
    return np.asarray(found.product())


def shard_map():
    members = ensemble(2, 6, 5)
    mesh = jax.make_mesh((2,), ("members",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    for options in ({}, {"moments": "transport"}):
        tx = loro(0.01, exact_every=2, **options)

        def share(part, tx=tx):
            moved = train(tx, jax.tree.map(lambda x: x[0], part))
            return jax.tree.map(lambda x: x[None], moved)

        mapped = jax.shard_map(share, mesh=mesh, in_specs=P("members"), out_specs=P("members"))
        found = np.asarray(jax.jit(mapped)(members).product())
        chex.assert_trees_all_close(found, alone(tx, members), rtol=0, atol=1e-4)


def explicit():
    members = ensemble(4, 8, 8)
    mesh = jax.make_mesh((2, 2), ("members", "rows"), axis_types=(AxisType.Explicit,) * 2)
    for spec, options in (
        (P("members"), {}),
        (P("members", "rows"), {"exact_method": "svd"}),
        (P("members", None, "rows"), {"exact_method": "gram", "moments": "transport"}),
        (P("members"), {"basis": "nearest"}),
        (P("members"), {"direction": orthogonal()}),
    ):
        tx = loro(0.01, exact_every=2, **options)
        expected = alone(tx, members)
        with jax.set_mesh(mesh):
            sharded = jax.device_put(members, NamedSharding(mesh, spec))
            found = jax.jit(jax.vmap(lambda params, tx=tx: train(tx, params)))(sharded)
            assert found.B.sharding.spec[0] == "members", found.B.sharding
            product = jax.device_get(found.product())
        chex.assert_trees_all_close(product, expected, rtol=0, atol=1e-5)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    {"shard_map": shard_map, "explicit": explicit}[sys.argv[1]]()
