import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loro_jax.layers.common import Fixed, ProjectionSpec
from loro_jax.layers.dense import Dense
from loro_jax.layers.lost import LostLinear, largest_columns
from loro_jax.layers.projections import make_projection
from loro_jax.memory import count_parameters
from models import Llama, preset

# Square, wide and tall.
SHAPES = [(24, 24), (16, 40), (40, 16)]


def make(m=16, n=40, seed=3, **fields):
    spec = ProjectionSpec(**{"kind": "lost", "rank": 4, "lost_channels": 0.1, **fields})
    return make_projection(n, m, spec, nnx.Rngs(seed))


def dense(m, n, seed=3, **fields):
    """The dense matrix that such a projection is made from: the second draw."""
    rngs = nnx.Rngs(seed)
    rngs.params()
    return np.asarray(Dense(n, m, ProjectionSpec(**fields), rngs).W[...], np.float64)


def arrays(projection):
    trained = (np.asarray(p[...], np.float64) for p in (projection.B, projection.A, projection.W_s))
    return *trained, np.asarray(projection.channels[...])


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_all_of_it_is_made_from_one_dense_matrix(m, n):
    B, A, W_s, channels = arrays(make(m, n))
    W0 = dense(m, n)
    U, s, Vt = np.linalg.svd(W0)
    np.testing.assert_allclose(B @ A, (U[:, :4] * s[:4]) @ Vt[:4], atol=1e-6)
    np.testing.assert_allclose(B.T @ B, A @ A.T, atol=1e-6)
    norms = np.linalg.norm(W0 - B @ A, axis=0)
    expected = np.argsort(-norms)[: {24: 3, 40: 4, 16: 2}[n]]
    np.testing.assert_array_equal(channels, np.sort(expected))
    assert channels.dtype == np.int32
    np.testing.assert_array_equal(W_s, W0[:, channels])


def test_columns_are_chosen_by_the_norm_of_the_residual_alone():
    C = jnp.array([[0.0, -5.0, 1.0, 3.0, 0.0], [4.0, 0.0, 1.0, 3.0, 4.1]])
    assert largest_columns(C, 3).tolist() == [1, 3, 4]
    assert largest_columns(C, 5).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("m", "n", "gamma"), [(24, 24, 0.7), (16, 40, 0.3), (40, 16, 1.0), (40, 16, 0.0)]
)
def test_output_is_that_of_the_definition(x64, m, n, gamma):
    projection = make(m, n, lost_gamma=gamma, dtype=jnp.float64, param_dtype=jnp.float64)
    B, A, W_s, channels = arrays(projection)
    x = np.random.default_rng(0).normal(size=(2, 5, n))
    z = x @ A.T
    expected = gamma * (z / (1 + np.exp(-z))) @ B.T + (1 - gamma) * x[..., channels] @ W_s.T
    np.testing.assert_allclose(projection(jnp.asarray(x)), expected, rtol=1e-12, atol=1e-14)


def test_without_an_activation_and_with_all_channels_it_is_half_of_both(x64, monkeypatch):
    monkeypatch.setattr(LostLinear, "activated", lambda self, latent: latent)
    both = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    projection = make(lost_gamma=0.5, lost_channels=1.0, **both)
    B, A, W_s, channels = arrays(projection)
    np.testing.assert_array_equal(channels, np.arange(40))
    np.testing.assert_array_equal(W_s, dense(16, 40))
    x = np.random.default_rng(0).normal(size=(5, 40))
    np.testing.assert_allclose(
        projection(jnp.asarray(x)), x @ (0.5 * (B @ A + dense(16, 40))).T, rtol=1e-10, atol=1e-14
    )


@pytest.mark.slow
def test_gradients_are_those_of_the_definition_and_columns_left_out_have_none(x64):
    projection = make(dtype=jnp.float64, param_dtype=jnp.float64)
    B, A, W_s, channels = map(jnp.asarray, arrays(projection))
    graphdef, trained, fixed = nnx.split(projection, nnx.Param, Fixed)
    assert set(nnx.to_pure_dict(trained)) == {"B", "A", "W_s"}
    x = jax.random.normal(jax.random.key(0), (5, 40), jnp.float64)
    target = jnp.sin(jnp.arange(5 * 16.0)).reshape(5, 16)
    W = jnp.zeros((16, 40)).at[:, channels].set(W_s)

    def ours(trained, x):
        return jnp.sum(target * nnx.merge(graphdef, trained, fixed)(x) ** 2)

    def whole(B, A, W, x):
        y = 0.7 * jax.nn.silu(x @ A.T) @ B.T + 0.3 * x @ (W * (W != 0)).T
        return jnp.sum(target * y**2)

    of_trained, of_x = jax.jit(jax.grad(ours, (0, 1)))(trained, x)
    of_B, of_A, of_W, expected = jax.jit(jax.grad(whole, (0, 1, 2, 3)))(B, A, W, x)
    np.testing.assert_allclose(of_trained["B"][...], of_B, rtol=1e-10)
    np.testing.assert_allclose(of_trained["A"][...], of_A, rtol=1e-10)
    np.testing.assert_allclose(of_trained["W_s"][...], of_W[:, channels], rtol=1e-10)
    np.testing.assert_allclose(of_x, expected, rtol=1e-10)
    # Through W_s alone (g = 0), an input outside of I reaches nothing.
    alone = make(lost_gamma=0.0)
    of_x = jax.jit(jax.grad(lambda x: jnp.sum(alone(x) ** 2)))(x.astype(jnp.float32))
    assert set(np.flatnonzero(np.abs(of_x).sum(axis=0))) == set(channels.tolist())


def test_parameters_of_a_model_are_those_of_the_formula():
    config = preset("tiny", projection="lost", lost_channels=0.05, scope="mlp")
    model = nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0)))
    rest = nnx.eval_shape(lambda: Llama(preset("tiny", scope="mlp"), nnx.Rngs(0)))
    # A column of 2 of 32 inputs (gate and up, 48 outputs), of 3 of 48 (down, 32 outputs).
    more = 2 * (2 * 48 * 2 + 32 * 3)
    trained = [count_parameters(nnx.state(one, nnx.Param)) for one in (model, rest)]
    assert trained[0] == trained[1] + more
    assert count_parameters(nnx.state(model, Fixed)) == 2 * (2 + 2 + 3)


def test_operations():
    spec = ProjectionSpec(kind="lost", rank=4, lost_channels=0.1)
    assert LostLinear.flops(16, 40, spec, tokens=64) == 6 * 4 * (16 + 40) + 6 * 16 * 4


@pytest.mark.slow
def test_seeds_under_vmap_give_what_each_gives_alone():
    """As the stacked layers of a model are made, here in one program for several keys."""
    spec = ProjectionSpec(kind="lost", rank=4, lost_channels=0.1)

    def made(seed):
        return nnx.state(make_projection(16, 12, spec, nnx.Rngs(jax.random.key(seed))))

    together = jax.jit(jax.vmap(made))(jnp.arange(2))
    for seed in range(2):
        for one, other in zip(jax.tree.leaves(together), jax.tree.leaves(made(seed)), strict=True):
            np.testing.assert_allclose(one[seed], other, rtol=1e-4, atol=1e-6)
    assert not np.array_equal(together["B"][...][0], together["B"][...][1])


def test_what_it_shares_with_other_kinds():
    projection = make(use_bias=True, dtype=jnp.bfloat16)
    assert not projection.linear
    assert not projection.through_rank
    assert projection(jnp.ones((2, 40))).dtype == jnp.bfloat16
    zero = projection(jnp.zeros((2, 40)))
    projection.bias[...] = jnp.arange(16.0)
    np.testing.assert_array_equal(projection(jnp.zeros((2, 40))) - zero, [np.arange(16)] * 2)
    with pytest.raises(TypeError, match="activation between the factors"):
        projection.weight()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lost_channels": 0}, "lost_channels above 0 .* are 0 and 0.7"),
        ({"lost_channels": 1.1}, "at most 1.* are 1.1"),
        ({"lost_gamma": -0.1}, "lost_gamma between 0 and 1.* and -0.1"),
        ({"rank": 17}, "rank must be between 1 and .* 16"),
    ],
)
def test_bad_values_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)
