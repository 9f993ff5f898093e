"""A character model in Equinox on the embedded novels: dense with Adam, low-rank with LORO."""

from importlib.resources import files

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from loro_jax import loro, warmup_cosine
from loro_jax.layers.equinox import factorise, summary
from loro_jax.layers.examples.character_transformer import CONTEXT, bits, make

RANK, BATCH = 16, 16


def train(net: dict, tx: optax.GradientTransformation, text: jax.Array, steps: int) -> dict:
    """Returns the network after steps on random rows of the text."""

    @eqx.filter_jit
    def step(net: dict, state: tuple, key: jax.Array) -> tuple[dict, tuple]:
        starts = jax.random.randint(key, (BATCH, 1), 0, len(text) - CONTEXT)
        grads = eqx.filter_grad(bits)(net, text[starts + jnp.arange(CONTEXT + 1)])
        updates, state = tx.update(grads, state, eqx.filter(net, eqx.is_array))
        return eqx.apply_updates(net, updates), state

    state = tx.init(eqx.filter(net, eqx.is_array))
    for key in jax.random.split(jax.random.key(1), steps):
        net, state = step(net, state, key)
    return net


def main(steps: int = 200) -> dict[str, float]:
    """Trains both networks on the same rows; prints and returns their validation losses."""
    corpus, losses = files("loro_jax") / "text" / "corpus", {}
    novels = [corpus.joinpath(name).read_text("utf-8") for name in ("train.txt", "valid.txt")]
    text, held_out = (jnp.frombuffer(x.encode("ascii", "replace"), jnp.uint8) for x in novels)
    rows = held_out[: 500 * (CONTEXT + 1)].reshape(500, -1)
    dense = make(jax.random.key(0))
    low_rank = factorise(dense, RANK, where="!head")
    print(summary(low_rank))
    # Each rate is the best of several that differ by a factor of two.
    adam = optax.adam(warmup_cosine(0.01, steps, steps // 10))
    rate = warmup_cosine(0.04, steps, steps // 10)
    riemannian = loro(rate, exact_every=50, basis="nearest", exact_method="svd")
    for name, net, tx in (("dense, Adam", dense, adam), ("low-rank, LORO", low_rank, riemannian)):
        losses[name] = float(eqx.filter_jit(bits)(train(net, tx, text, steps), rows))
        parameters = summary(net).parameters
        print(f"{name}: {parameters:,} parameters, {losses[name]:.3f} bits a character")
    return losses


if __name__ == "__main__":
    main()
