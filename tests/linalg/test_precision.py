"""On accelerators, whose products round their inputs, the optimizer asks for all digits."""

import jax
import jax.numpy as jnp
import pytest

from loro_jax import exact_update, riemannian_gradient
from loro_jax.exact.transport import transport_moments

B, A = jnp.ones((2, 6, 3)), jnp.ones((2, 3, 5))


def transport(B, A, dB, dA):
    return transport_moments((B, A), (B + dB, A + dA), (dB, dA), (dB**2, dA**2))


FUNCTIONS = {
    "transport": transport,
    "riemannian_gradient": riemannian_gradient,
    **{
        f"{method}, {basis}": lambda *x, m=method, b=basis: exact_update(*x, 0.1, method=m, basis=b)
        for method in ("graph", "gram", "svd")
        for basis in ("singular", "nearest")
    },
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_all_products_are_in_full_precision_on_a_gpu(name):
    traced = jax.jit(FUNCTIONS[name]).trace(B, A, B, A)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    wide = ("f64>", "i32>")  # nothing to round
    rounded = [
        line for line in products if "HIGHEST" not in line and not line.rstrip().endswith(wide)
    ]
    assert products
    assert not rounded, rounded[0]
