"""Factorises a sharded network on eight simulated devices, and prints what it saw as JSON.

A program, because the number of devices is fixed when JAX starts. Usage:
``python -m tests.layers.eight_devices explicit|auto``.
"""

import json
import sys

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from loro_jax import loro
from loro_jax.layers import factorise, merge

P = PartitionSpec
EXPLICIT = sys.argv[1] == "explicit"
# On a mesh with explicit axes, a product over a sharded axis needs the sharding of its output.
ROWS = P("data", None) if EXPLICIT else None


class Net(nnx.Module):
    """Tensor parallelism as usual: outputs are sharded, then inputs."""

    def __init__(self, rngs):
        def over(*axes):
            return {"kernel_metadata": {"out_sharding": axes}, "rngs": rngs}

        self.up = nnx.Linear(16, 64, **over(None, "tensor"))
        self.down = nnx.Linear(64, 16, **over("tensor", None))
        self.heads = nnx.LinearGeneral(16, (4, 8), **over(None, "tensor", None))
        self.out = nnx.LinearGeneral((4, 8), 16, axis=(-2, -1), **over("tensor", None, None))
        self.head = nnx.Einsum("bd,df->bf", (16, 8), **over("data", None))

    def __call__(self, x):
        x = self.down(jnp.tanh(self.up(x)), out_sharding=ROWS)
        return self.head(self.out(self.heads(x), out_sharding=ROWS), out_sharding=ROWS)


def main():
    kind = AxisType.Explicit if EXPLICIT else AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        dense = Net(nnx.Rngs(0))
        x = jax.random.normal(jax.random.key(0), (8, 16))
        x = jax.device_put(x, NamedSharding(mesh, P("data", None)))
        full = factorise(dense, 1.0, init="svd")
        model = factorise(dense, 8)
        axes = {
            name: [str(getattr(layer, side)[...].sharding.spec) for side in "BA"]
            for name, layer in vars(model).items()
            if isinstance(layer, nnx.Module)
        }
        optimizer = nnx.Optimizer(model, loro(0.01, exact_every=100), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            loss, grads = nnx.value_and_grad(lambda model: jnp.mean(model(x) ** 2))(model)
            optimizer.update(model, grads)
            return loss

        print(
            json.dumps(
                {
                    "axes": axes,
                    "error": float(jnp.abs(full(x) - dense(x)).max()),
                    "merged": float(jnp.abs(merge(full)(x) - dense(x)).max()),
                    "losses": [float(step(model, optimizer)) for _ in range(4)],
                }
            )
        )


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    main()
