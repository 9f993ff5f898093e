import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from loro_jax.layers.common import Fixed, ProjectionSpec
from loro_jax.layers.dense import Dense
from loro_jax.layers.osft import OsftLinear
from loro_jax.layers.projections import arrays_of_weight, holds_a_weight, make_projection


def make(m=12, n=20, rank=3, **fields):
    return make_projection(n, m, ProjectionSpec(kind="osft", rank=rank, **fields), nnx.Rngs(3))


def test_it_starts_from_the_draw_of_a_dense_projection():
    rngs = nnx.Rngs(3)
    rngs.params()
    W = Dense(20, 12, ProjectionSpec(), rngs).W[...]
    projection = make()
    np.testing.assert_allclose(projection.weight(), W, atol=1e-6)
    x = jnp.sin(jnp.arange(40.0)).reshape(2, 20)
    np.testing.assert_allclose(projection(x), x @ W.T, atol=1e-5)
    shapes = [
        {name: leaf.shape for name, leaf in nnx.to_pure_dict(nnx.state(projection, kind)).items()}
        for kind in (nnx.Param, Fixed)
    ]
    assert shapes == [
        {"B": (12, 3), "S": (3,), "A": (3, 20)},
        {"U_high": (12, 9), "S_high": (9,), "Vt_high": (9, 20)},
    ]


def test_gradients_are_those_of_the_chain_rule_without_the_kept_directions(x64):
    projection = make(dtype=jnp.float64, param_dtype=jnp.float64)
    graphdef, params, fixed = nnx.split(projection, nnx.Param, Fixed)
    x = jnp.sin(jnp.arange(100.0)).reshape(5, 20)
    parts = projection.parts()

    def ours(params, x):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, params, fixed)(x)))

    def plain(B, S, A, x):
        return jnp.sum(jnp.sin(x @ parts._replace(B=B, S=S, A=A).weight().T))

    found, of_x = jax.jit(jax.grad(ours, (0, 1)))(params, x)
    dB, dS, dA, dx = jax.jit(jax.grad(plain, (0, 1, 2, 3)))(parts.B, parts.S, parts.A, x)
    dB -= parts.U_high @ (parts.U_high.T @ dB)
    dA -= (dA @ parts.Vt_high.T) @ parts.Vt_high
    for one, other in ((found["B"], dB), (found["S"], dS), (found["A"], dA)):
        np.testing.assert_allclose(one[...], other, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(of_x, dx, rtol=1e-9)


def test_what_it_shares_with_other_kinds():
    projection = make(use_bias=True, dtype=jnp.bfloat16)
    assert (projection.rank, projection.through_rank) == (3, False)
    assert projection(jnp.ones((2, 20))).dtype == jnp.bfloat16
    spec = ProjectionSpec(kind="osft", rank=3)
    # The kept part forward and backward to the input, the trained one, and a projection per pass.
    expected = (4 * 9 + 6 * 3) * (12 + 20) + 4 * 9 * 3 * (12 + 20) / 64
    assert OsftLinear.flops(12, 20, spec, tokens=64) == expected


def test_kinds_in_parts_are_made_of_a_weight():
    W = jnp.sin(jnp.arange(2 * 12 * 20.0)).reshape(2, 12, 20)
    for kind in ("sst", "osft"):
        projection = make_projection(20, 12, ProjectionSpec(kind=kind, rank=3), nnx.Rngs(0))
        names = nnx.to_pure_dict(nnx.state(projection)).keys()
        assert holds_a_weight(names)
        arrays = arrays_of_weight(names, W, 3)
        assert arrays.keys() == names
        parts = type(projection.parts())(**arrays)
        np.testing.assert_allclose(parts.weight(), W, atol=1e-5)
    assert not holds_a_weight({"B", "A"})
