"""A small vision transformer in Flax NNX, as anyone would write it: it knows no low rank."""

import jax
from flax import nnx


class Block(nnx.Module):
    def __init__(self, size: int, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.LayerNorm(size, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(4, size, decode=False, rngs=rngs)
        self.up = nnx.Linear(size, 4 * size, rngs=rngs)
        self.down = nnx.Linear(4 * size, size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norms[0](x))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class VisionTransformer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, size: int = 48, depth: int = 2):
        self.patches = nnx.Conv(1, size, (2, 2), strides=2, rngs=rngs)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (16, size)))
        self.blocks = nnx.List([Block(size, rngs) for _ in range(depth)])
        self.head = nnx.Linear(size, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.patches(images).reshape(len(images), 16, -1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=1))
