import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.linear import Dense, LowRankLinear, ProjectionSpec, make_projection


def test_the_rank_chooses_the_kind():
    assert isinstance(make_projection(8, 6, ProjectionSpec(), nnx.Rngs(0)), Dense)
    assert isinstance(make_projection(8, 6, ProjectionSpec(rank=2), nnx.Rngs(0)), LowRankLinear)


def test_low_rank_maps_by_the_product():
    projection = make_projection(8, 6, ProjectionSpec(rank=2), nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    W = projection.B[...] @ projection.A[...]
    np.testing.assert_allclose(projection(jnp.array(x)), x @ W.T, rtol=1e-4, atol=1e-5)


def test_dtypes_of_storage_and_products():
    spec = ProjectionSpec(rank=2, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    projection = make_projection(8, 6, spec, nnx.Rngs(0))
    assert projection.B[...].dtype == jnp.float32
    assert projection(jnp.ones((1, 8))).dtype == jnp.bfloat16


@pytest.mark.parametrize("rank", [0, 7])
def test_ranks_that_do_not_fit_are_named(rank):
    with pytest.raises(ValueError, match=f"but is {rank}"):
        make_projection(8, 6, ProjectionSpec(rank=rank), nnx.Rngs(0))
