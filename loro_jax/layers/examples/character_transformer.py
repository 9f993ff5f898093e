"""A small causal transformer in Equinox on characters, which knows no low rank."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

WIDTH, CONTEXT = 64, 64


def make(key: jax.Array) -> dict:
    """Returns a transformer of three layers for the characters of ASCII."""
    keys, stack = jax.random.split(key, (4, 3)), eqx.filter_vmap
    inputs = jax.random.normal(keys[3, 0], (128 + CONTEXT, WIDTH))
    attention = stack(lambda key: eqx.nn.MultiheadAttention(4, WIDTH, key=key))(keys[0])
    mlp = stack(lambda key: eqx.nn.MLP(WIDTH, WIDTH, 4 * WIDTH, 1, key=key))(keys[1])
    head = eqx.nn.Linear(WIDTH, 128, key=keys[2, 0])
    return {"inputs": inputs, "attention": attention, "mlp": mlp, "head": head}


def bits(net: dict, rows: jax.Array) -> jax.Array:
    """Returns the loss on rows of CONTEXT + 1 characters, in bits a character."""
    layers, static = eqx.partition((net["attention"], net["mlp"]), eqx.is_array)

    def layer(x: jax.Array, arrays: tuple) -> tuple[jax.Array, None]:
        (attention, mlp), y = eqx.combine(arrays, static), jax.nn.standardize(x)
        x = x + attention(y, y, y, mask=jnp.tri(CONTEXT, dtype=bool))
        return x + jax.vmap(mlp)(jax.nn.standardize(x)), None

    def loss(row: jax.Array) -> jax.Array:
        x, _ = jax.lax.scan(layer, net["inputs"][row[:-1]] + net["inputs"][128:], layers)
        logits = jax.vmap(net["head"])(jax.nn.standardize(x))
        return optax.softmax_cross_entropy_with_integer_labels(logits, row[1:]).mean()

    return jax.vmap(loss)(rows).mean() / jnp.log(2)
