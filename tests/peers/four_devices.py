"""Takes steps by GaLore and FRUGAL on four simulated devices, one JSON object for each basis.

A program of its own, because the number of devices is fixed when JAX starts. Usage:
``python -m tests.peers.four_devices``.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from loro_jax.peers.bases import BASES
from loro_jax.peers.frugal import frugal
from loro_jax.peers.galore import galore

SHAPE = (4, 8, 12)
# By methods: the smaller side is divided, or the larger one.
LAYOUTS = {"galore": PartitionSpec(None, "x"), "frugal": PartitionSpec(None, None, "x")}


def make(method, basis):
    settings = {"projected": True, "update_every": 2, "basis": basis}
    if method == "galore":
        return galore(0.1, 2, moments="rotate", **settings)
    return frugal(0.1, density=0.25, **settings)


def steps(tx, params, grads):
    """The last updates, and on how many devices they are."""
    update, state = jax.jit(tx.update), jax.jit(tx.init)(params)
    for G in grads:
        updates, state = update(G, state, params)
    return np.asarray(updates), len(updates.sharding.device_set)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    grads = [jnp.asarray(rng.normal(size=SHAPE), jnp.float32) for _ in range(3)]
    for method, spec in LAYOUTS.items():
        for basis in BASES:
            tx = make(method, basis)
            one, _ = steps(tx, jnp.ones(SHAPE), grads)
            placed = jax.device_put([jnp.ones(SHAPE), *grads], NamedSharding(mesh, spec))
            several, devices = steps(tx, placed[0], placed[1:])
            row = {"method": method, "basis": basis, "devices": devices}
            sums = {"one": one.sum(axis=-1).tolist(), "several": several.sum(axis=-1).tolist()}
            print(json.dumps(row | sums), flush=True)
