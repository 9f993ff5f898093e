import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loro_jax.layers.common import ProjectionSpec
from loro_jax.layers.dense import Dense
from loro_jax.layers.low_rank import LowRankLinear
from loro_jax.layers.packing import Shared, apply_together
from loro_jax.layers.projections import make_projection


def test_the_rank_chooses_the_kind():
    assert isinstance(make_projection(8, 6, ProjectionSpec(), nnx.Rngs(0)), Dense)
    assert isinstance(make_projection(8, 6, ProjectionSpec(rank=2), nnx.Rngs(0)), LowRankLinear)


def test_low_rank_maps_by_the_product():
    projection = make_projection(8, 6, ProjectionSpec(rank=2), nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    W = projection.B[...] @ projection.A[...]
    np.testing.assert_allclose(projection(jnp.array(x)), x @ W.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["low_rank", "cola", "lora", "sltrain", "lost"])
@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.slow
def test_projections_of_one_input_together_are_each_by_itself(kind, rows):
    """Outputs, and gradients to weights and input; ranks may differ."""
    several = [
        make_projection(16, out, ProjectionSpec(kind=kind, rank=rank), nnx.Rngs(out))
        for out, rank in ((12, 4), (10, 3), (12, 4))
    ]
    x = jax.random.normal(jax.random.key(0), (2, rows, 16))
    graphdef, state = nnx.split(several)

    def total(apply, state, x):
        outputs = apply(nnx.merge(graphdef, state), x)
        return sum(jnp.sum(jnp.sin(y + i)) for i, y in enumerate(outputs))

    packed = jax.value_and_grad(total, argnums=(1, 2), allow_int=True)
    one = packed(lambda ps, x: [p(x) for p in ps], state, x)
    other = packed(apply_together, state, x)
    for expected, found in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if jnp.issubdtype(expected.dtype, jnp.floating):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_low_rank_projections_of_one_input_make_one_product_with_it():
    several = [make_projection(16, 20, ProjectionSpec(rank=4), nnx.Rngs(i)) for i in range(3)]
    program = jax.make_jaxpr(lambda x: apply_together(several, x))(jnp.ones((2, 40, 16)))
    products = [e.outvars[0].aval.shape for e in program.eqns if e.primitive.name == "dot_general"]
    assert products == [(80, 12), (80, 20), (80, 20), (80, 20)]


def test_dtypes_of_storage_and_products():
    spec = ProjectionSpec(rank=2, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    projection = make_projection(8, 6, spec, nnx.Rngs(0))
    assert projection.B[...].dtype == jnp.float32
    assert projection(jnp.ones((1, 8))).dtype == jnp.bfloat16


@pytest.mark.parametrize("rank", [0, 7])
def test_ranks_that_do_not_fit_are_named(rank):
    with pytest.raises(ValueError, match=f"but is {rank}"):
        make_projection(8, 6, ProjectionSpec(rank=rank), nnx.Rngs(0))


@pytest.mark.parametrize(("rank", "kind"), [(None, "low_rank"), (4, "low_rank"), (4, "cola")])
@pytest.mark.parametrize("rows", [1, 40])
def test_matrices_that_stand_together_do_what_they_did_apart(rank, kind, rows):
    spec = ProjectionSpec(kind=kind, rank=rank)
    several = [make_projection(16, out, spec, nnx.Rngs(out)) for out in (12, 6, 10)]
    x = jax.random.normal(jax.random.key(0), (2, rows, 16))
    expected = [projection(x) for projection in several]
    latents = [None if rank is None else projection.down(x) for projection in several]
    shared = Shared(several)
    sizes = (12, 6, 10) if rank is None else (4, 4, 4)
    assert shared.sizes == sizes
    assert shared.matrix.shape == (sum(sizes), 16)
    found = apply_together(several, x, shared=shared)
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)
    if rank is not None:
        mixed = apply_together(several, x, shared=shared, latent=(False, True, False))
        np.testing.assert_allclose(mixed[1], latents[1], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(mixed[2], expected[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 40])
def test_latents_are_given_where_they_are_wanted(rows):
    several = [make_projection(16, 12, ProjectionSpec(rank=r), nnx.Rngs(r)) for r in (3, 4)]
    x = jax.random.normal(jax.random.key(0), (2, rows, 16))
    output, latent = apply_together(several, x, latent=(False, True))
    np.testing.assert_allclose(output, several[0](x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(latent, several[1].down(x), rtol=1e-5, atol=1e-6)
