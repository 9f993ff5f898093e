import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loro_jax.layers.common import Fixed, ProjectionSpec
from loro_jax.layers.dense import Dense
from loro_jax.layers.projections import make_projection
from loro_jax.layers.sst import SstLinear, spectral_product
from loro_jax.memory import count_parameters


def make(m=12, n=20, rank=3, **fields):
    return make_projection(n, m, ProjectionSpec(kind="sst", rank=rank, **fields), nnx.Rngs(3))


def test_it_starts_from_the_draw_of_a_dense_projection():
    rngs = nnx.Rngs(3)
    rngs.params()
    W = Dense(20, 12, ProjectionSpec(), rngs).W[...]
    projection = make()
    np.testing.assert_allclose(projection.weight(), W, atol=1e-6)
    x = jnp.sin(jnp.arange(40.0)).reshape(2, 20)
    np.testing.assert_allclose(projection(x), x @ W.T, atol=1e-5)
    trained = nnx.to_pure_dict(nnx.state(projection, nnx.Param))
    assert {name: leaf.shape for name, leaf in trained.items()} == {
        "S": (12,),
        "B": (12, 3),
        "A": (3, 20),
    }
    assert count_parameters(nnx.state(projection, Fixed)) == 12 * 12 + 12 * 20 + 3


@pytest.mark.parametrize("rank", [3, 12])
def test_gradients_are_those_of_the_chain_rule_but_for_the_singular_values(x64, rank):
    """With the factor S_i put back; at rank 12 all vectors are active."""
    both = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    state = make(rank=rank, **both).parts()
    rng = np.random.default_rng(0)
    x, target = jnp.array(rng.normal(size=(2, 5, 20))), jnp.array(rng.normal(size=(2, 5, 12)))

    def ours(x, B, S, A):
        y = spectral_product(x, state._replace(B=B, S=S, A=A))
        return jnp.sum(target * y**2)

    def plain(x, B, S, A):
        U, Vt = state.U.at[:, state.active].set(B), state.Vt.at[state.active].set(A)
        return jnp.sum(target * (x @ (U @ jnp.diag(S) @ Vt).T) ** 2)

    # Not orthogonal, as in the middle of a round.
    arguments = (x, state.B + 0.1, state.S, state.A - 0.2)
    np.testing.assert_allclose(ours(*arguments), plain(*arguments), rtol=1e-12)
    of_x, of_B, of_S, of_A = jax.jit(jax.grad(ours, (0, 1, 2, 3)))(*arguments)
    expected = jax.jit(jax.grad(plain, (0, 1, 2, 3)))(*arguments)
    active = state.S[state.active]
    found = (of_x, of_B * active, of_S, active[:, None] * of_A)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


def test_no_weight_is_saved_for_the_backward_pass():
    state = make(m=64, n=80).parts()
    loss = lambda B: jnp.sum(spectral_product(jnp.ones((5, 80)), state._replace(B=B)))  # noqa: E731
    _, residuals = jax.vjp(loss, state.B)
    saved = [leaf.shape for leaf in jax.tree.leaves(residuals)]
    assert saved.count((64, 80)) == 1  # V^T, which is as large


def test_operations():
    spec = ProjectionSpec(kind="sst", rank=3)
    per_pass = 2 * 12 * 20 * (3 * 12 + 3)
    assert SstLinear.flops(12, 20, spec, tokens=64) == 6 * 12 * 20 + per_pass / 64


def test_what_it_shares_with_other_kinds():
    projection = make(use_bias=True, dtype=jnp.bfloat16)
    assert projection.rank == 3
    assert not projection.through_rank
    assert projection(jnp.ones((2, 20))).dtype == jnp.bfloat16
    projection.bias[...] = jnp.arange(12.0)
    np.testing.assert_array_equal(projection(jnp.zeros((2, 20))), [np.arange(12)] * 2)
    with pytest.raises(ValueError, match=r"rank must be between 1 and .* 12"):
        make(rank=13)
