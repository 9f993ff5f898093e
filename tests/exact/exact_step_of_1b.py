"""Compiles LORO's update for the 168 pairs of LLaMA-1B on simulated devices; nothing is allocated.

A program of its own, because the number of devices is fixed when JAX starts. Prints, as one JSON
object, how often a device calls LAPACK in an exact step, and what it sends. Usage:
``python -m tests.exact.exact_step_of_1b DEVICES [PAIRS]``, PAIRS for that many of 2048 x 2048.
"""

import json
import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from loro_jax import loro
from loro_jax.planning.collectives import read_collectives
from loro_jax.planning.hlo import read_instructions

RANK, LAYERS, HIDDEN, MLP = 512, 24, 2048, 5461
SHAPES = dict.fromkeys(("q", "k", "v", "o"), (HIDDEN, HIDDEN))
SHAPES |= {"gate": (MLP, HIDDEN), "up": (MLP, HIDDEN), "down": (HIDDEN, MLP)}


def tree(mesh, pairs):
    copied = NamedSharding(mesh, PartitionSpec())

    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=copied)

    if pairs:
        return {"q": {"B": leaf(pairs, HIDDEN, RANK), "A": leaf(pairs, RANK, HIDDEN)}}
    return {
        name: {"B": leaf(LAYERS, m, RANK), "A": leaf(LAYERS, RANK, n)}
        for name, (m, n) in SHAPES.items()
    }


def main(devices, pairs=0):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Auto,))
    params = tree(mesh, pairs)
    where = jax.tree.map(lambda x: x.sharding, params)
    tx = loro(0.01, exact_every=2, exact_method="svd", mesh=where)
    state = jax.eval_shape(tx.init, params)
    copied = NamedSharding(mesh, PartitionSpec())
    lies = jax.tree.map(lambda x: copied, state)
    update = jax.jit(tx.update, in_shardings=(where, lies, where), out_shardings=(where, lies))
    text = update.lower(params, state, params).compile().as_text()
    lapack = [one for one in read_instructions(text, ["custom-call"]) if "lapack_" in one.text]
    # Batched calls, and calls in a loop over the batch, alike: matrices that are factored.
    matrices = [one.times * _batch(one.results[0].sizes) for one in lapack]
    exchanges = {branch: read_collectives(text, devices, branch) for branch in (min, max)}
    print(
        json.dumps(
            {
                "factored": sum(matrices),
                "sent": sum(one.sent for one in exchanges[min]),
                "sent_exact": sum(one.sent for one in exchanges[max]),
                "bytes": sum(x.size * 4 for x in jax.tree.leaves(params)),
            }
        )
    )


def _batch(sizes):
    return sizes[0] if len(sizes) > 2 else 1


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
