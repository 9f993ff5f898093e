import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loro_jax.layers.common import Fixed, ProjectionSpec
from loro_jax.layers.projections import make_projection
from loro_jax.layers.scaffold import groups
from loro_jax.linalg.cosine import cosine_transform
from tests.helpers import some_fast

# Square, wide and tall; sizes that are no powers of two; one block and several; groups that differ
# in their outputs, in their inputs, and in both.
SHAPES = [(128, 128, 32), (43, 16, 8), (86, 32, 8), (32, 86, 8), (24, 40, 0), (12, 12, 32)]
SHAPES += [(16, 43, 5), (43, 17, 5), (17, 17, 4)]


def make(m, n, block, kind="scaffold", **fields):
    spec = ProjectionSpec(kind=kind, rank=4, initialiser="auto", scaffold_block=block, **fields)
    return make_projection(n, m, spec, nnx.Rngs(3))


def transform(m, n):
    """The orthonormal cosine transform of the larger side, cut to (m, n)."""
    size = max(m, n)
    k, j = np.mgrid[:m, :n]
    T = np.sqrt(2 / size) * np.cos(np.pi * (2 * j + 1) * k / (2 * size))
    T[0] /= np.sqrt(2)
    return T


def matrix(projection):
    """S by its definition, in float64."""
    m, n = projection.signs_out.shape[-1], projection.signs_in.shape[-1]
    g = max(1, min(m, n) // projection.block) if projection.block else 1
    # The inputs are dealt out to the groups in turn, the outputs in rows.
    inputs, outputs = [np.arange(i, n, g) for i in range(g)], np.array_split(np.arange(m), g)
    S = np.zeros((m, n))
    for rows, columns in zip(outputs, inputs, strict=True):
        S[np.ix_(rows, columns)] = transform(len(rows), len(columns))
    left = np.diag(np.asarray(projection.signs_out[...], np.float64))
    return left @ S @ np.diag(np.asarray(projection.signs_in[...], np.float64))


@pytest.mark.parametrize("shape", some_fast(SHAPES, [SHAPES[3], SHAPES[7]]))
def test_output_and_weight_are_those_of_the_definition(shape):
    m, n, block = shape
    projection = make(m, n, block)
    S, (B, A) = matrix(projection), (np.float64(f) for f in projection.factors())
    x = np.random.default_rng(0).normal(size=(2, 3, n))
    np.testing.assert_allclose(
        projection(jnp.asarray(x, jnp.float32)), x @ (S + B @ A).T, atol=1e-5
    )
    np.testing.assert_allclose(projection.weight(), S + B @ A, atol=1e-6)


@pytest.mark.parametrize(("m", "n", "block"), SHAPES)
def test_the_fixed_matrix_has_full_rank_and_the_norm_of_a_dense_one(m, n, block):
    S = matrix(make(m, n, block, scaffold_scale=0.5))
    values = np.linalg.svd(S, compute_uv=False)
    np.testing.assert_allclose(values, values[0], rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(S), 0.5 * 0.02 * np.sqrt(m * n), rtol=1e-6)


def test_an_activation_beside_the_fixed_matrix():
    projection = make(86, 32, 8, kind="scaffold_cola")
    assert not projection.linear
    S, (B, A) = matrix(projection), (np.float64(f) for f in projection.factors())
    x = np.random.default_rng(0).normal(size=(5, 32))
    z = x @ A.T
    expected = x @ S.T + z / (1 + np.exp(-z)) @ B.T
    np.testing.assert_allclose(projection(jnp.asarray(x, jnp.float32)), expected, atol=1e-5)
    with pytest.raises(TypeError, match="activation between the factors"):
        projection.weight()


def test_groups_are_as_many_as_the_block_allows_and_as_equal_as_possible():
    assert groups(512, 1376, 32) == [(0, 16, 32, 86)]
    assert groups(8, 8, 32) == groups(8, 8, 0) == [(0, 1, 8, 8)]
    for m, n, block in ((2048, 5461, 32), (5461, 2048, 32), (43, 17, 5)):
        found = groups(m, n, block)
        assert [of.start for of in found] == [0, *(of.end for of in found[:-1])]
        assert found[-1].end == min(m, n) // block
        for side, length in (("outputs", m), ("inputs", n)):
            sizes = [getattr(of, side) for of in found]
            assert max(sizes) - min(sizes) <= 1
            assert sum((of.end - of.start) * getattr(of, side) for of in found) == length


def test_large_transforms_are_accurate():
    T = np.asarray(cosine_transform(1376, 1376), np.float64)
    np.testing.assert_allclose(T @ T.T, np.eye(1376), atol=2e-6)


def test_only_the_factors_are_trained_and_gradients_are_the_merged_ones():
    projection = make(86, 32, 8)
    graphdef, trained, fixed = nnx.split(projection, nnx.Param, Fixed)
    assert set(nnx.to_pure_dict(trained)) == {"B", "A"}
    x, target = jax.random.normal(jax.random.key(0), (10, 32)), jnp.ones((10, 86))

    def loss(trained, x):
        return jnp.sum(target * jnp.sin(nnx.merge(graphdef, trained, fixed)(x)))

    of_factors, of_x = jax.jit(jax.grad(loss, (0, 1)))(trained, x)
    S, (B, A) = matrix(projection), (np.float64(f) for f in projection.factors())
    of_y = np.cos(np.float64(x) @ (S + B @ A).T)
    np.testing.assert_allclose(of_x, of_y @ (S + B @ A), atol=1e-5)
    dW = of_y.T @ np.float64(x)
    np.testing.assert_allclose(of_factors["B"][...], dW @ A.T, atol=1e-4)
    np.testing.assert_allclose(of_factors["A"][...], B.T @ dW, atol=1e-4)


def test_seeds_under_vmap_give_what_each_gives_alone():
    spec = ProjectionSpec(kind="scaffold", rank=4, initialiser="auto")

    def made(seed):
        return nnx.state(make_projection(64, 64, spec, nnx.Rngs(jax.random.key(seed))))

    together = jax.vmap(made)(jnp.arange(2))
    for seed in range(2):
        for one, other in zip(jax.tree.leaves(together), jax.tree.leaves(made(seed)), strict=True):
            np.testing.assert_allclose(one[seed], other, rtol=1e-6)
    assert not np.array_equal(together["signs_in"][...][0], together["signs_in"][...][1])


def test_dtypes():
    projection = make(86, 32, 8, dtype=jnp.bfloat16)
    assert projection(jnp.ones((2, 32))).dtype == jnp.bfloat16
    assert projection.weight().dtype == jnp.float32
