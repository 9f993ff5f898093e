"""Takes a trained dense network, factorises it by SVD, and heals it with LORO."""

import optax
from flax import nnx

from loro_jax import loro, warmup_cosine
from loro_jax.layers import factorise, merge, summary
from loro_jax.layers.examples.digits import accuracy, train
from loro_jax.layers.examples.vision_transformer import VisionTransformer


def main(steps: int = 300) -> dict[str, float]:
    # 1. A dense network, trained by whatever it was trained by.
    dense = VisionTransformer(nnx.Rngs(0))
    train(dense, optax.adam(warmup_cosine(1e-2, steps, 50)), steps)
    found = {"dense": float(accuracy(dense))}

    # 2. A quarter of the rank: the best approximation of each weight, and how far off it is.
    low_rank = factorise(dense, rank=0.25, where="blocks", init="svd")
    print(summary(low_rank, dense))
    found["truncated"] = float(accuracy(low_rank))

    # 3. Healed: a fifth of the steps at a small rate. The factors are balanced, as the first exact
    # step expects.
    train(low_rank, loro(warmup_cosine(2e-3, steps // 5, steps // 50), exact_every=50), steps // 5)
    found["healed"] = float(accuracy(low_rank))

    # 4. Dense layers again, for programs that know no pairs: the same function.
    found["merged"] = float(accuracy(merge(low_rank)))
    for name, share in found.items():
        print(f"{name:10} {100 * share:.1f}% of unseen digits")
    return found


if __name__ == "__main__":
    main()
