"""LoRA+: a higher learning rate for the factors B than for A.

Source: Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", ICML 2024, arXiv
2402.12354.
"""

from __future__ import annotations

from typing import Any

import jax
import optax

from loro_jax.pairs import PairsSpec, pairs_of


def lora_plus(
    b_ratio: float = 1.0, *, pairs: PairsSpec | None = None
) -> optax.GradientTransformation:
    """Scales the updates of the factors B, after any optimizer.

    Where updates are linear in the learning rate (also with decoupled weight decay), this is
    another learning rate for B.

    Args:
        b_ratio: lambda, the learning rate of B divided by that of A; the paper's authors use 16.
        pairs: as in :func:`loro_jax.loro`.

    Returns:
        The transformation, to be chained after an optimizer.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"B": jnp.ones((4, 2)), "A": jnp.ones((2, 3))}
        >>> tx = optax.chain(optax.sgd(0.1), lora_plus(16.0))
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> bool(jnp.allclose(updates["B"], -1.6)), bool(jnp.allclose(updates["A"], -0.1))
        (True, True)
    """

    def output_factors(params: Any) -> Any:
        places = {pair.B for pair in pairs_of(params, pairs).found}
        leaves, structure = jax.tree.flatten(params)
        return jax.tree.unflatten(structure, [place in places for place in range(len(leaves))])

    return optax.masked(optax.scale(b_ratio), output_factors)
