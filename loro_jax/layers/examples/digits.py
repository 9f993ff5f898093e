"""Trains a vision transformer (Flax NNX) on scikit-learn's digits: dense against low-rank."""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from flax import nnx
from sklearn.datasets import load_digits

from loro_jax import loro, warmup_cosine
from loro_jax.layers import factorise, summary
from loro_jax.layers.examples.vision_transformer import VisionTransformer

shuffle, trained_on = jax.random.permutation(jax.random.key(0), 1797), 1400
pixels, labels = (jnp.asarray(x, jnp.float32)[shuffle] for x in load_digits(return_X_y=True))
images, labels = pixels.reshape(-1, 8, 8, 1) / 16, labels.astype(int)


def loss(model: nnx.Module, batch: jax.Array) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(model(images[batch]), labels[batch])
    return losses.mean()


@nnx.jit
def accuracy(model: nnx.Module) -> jax.Array:
    return jnp.mean(model(images[trained_on:]).argmax(-1) == labels[trained_on:])


def train(model: nnx.Module, tx: optax.GradientTransformation, steps: int) -> list[float]:
    optimizer, curve = nnx.Optimizer(model, tx, wrt=nnx.Param), []

    @nnx.jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer, batch: jax.Array) -> None:
        optimizer.update(model, nnx.grad(loss)(model, batch))

    for i in range(steps):
        step(model, optimizer, jax.random.randint(jax.random.key(i), (64,), 0, trained_on))
        if (i + 1) % (steps // 10) == 0:
            curve.append(float(accuracy(model)))
    return curve


def main(plot: str = "digits.png", steps: int = 300) -> dict[str, list[float]]:
    dense = VisionTransformer(nnx.Rngs(0))
    low_rank = factorise(dense, rank=12, where="blocks")
    print(summary(low_rank))
    adam, eta = optax.adam(warmup_cosine(1e-2, steps, 50)), warmup_cosine(2e-2, steps, 50)
    curves = {"dense, Adam": train(dense, adam, steps)}
    curves["low-rank, LORO"] = train(low_rank, loro(eta, exact_every=50), steps)
    for name, curve in curves.items():
        print(f"{name}: {100 * curve[-1]:.1f}% of {len(images) - trained_on} unseen digits")
        plt.plot([100 * (i + 1) / len(curve) for i in range(len(curve))], curve, label=name)
    plt.legend(), plt.xlabel("% of the steps"), plt.ylabel("accuracy"), plt.savefig(plot)
    return curves


if __name__ == "__main__":
    main()
