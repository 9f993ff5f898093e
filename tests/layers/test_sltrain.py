import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loro_jax.layers.sltrain import (
    draw_support,
    entries_per_row,
    sparse_low_rank_product,
    sparse_matrix,
    stretches,
)


def make(m=12, n=40, r=3, density=0.2, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 5)
    columns = draw_support(keys[0], m, n, density)
    arrays = [
        jax.random.normal(key, shape).astype(dtype)
        for key, shape in zip(keys[1:], [(2, 5, n), (m, r), (r, n), columns.shape], strict=True)
    ]
    return *arrays, columns


@pytest.mark.parametrize(
    ("n", "density"), [(512, 0.03), (1376, 0.03), (40, 1.0), (7, 0.5), (9, 0.01)]
)
def test_a_support_has_one_entry_in_every_stretch(n, density):
    columns = np.asarray(draw_support(jax.random.key(1), 400, n, density))
    k = entries_per_row(n, density)
    assert columns.shape == (400, k)
    assert density * n <= k + 1e-6 < density * n + 1
    np.testing.assert_array_equal(stretches(n, k)[columns], np.tile(np.arange(k), (400, 1)))
    # Every column is drawn about as often as any other of its stretch.
    counts = np.bincount(columns.ravel(), minlength=n)
    widths = np.bincount(stretches(n, k))
    expected = 400 / widths[stretches(n, k)]
    assert np.all(np.abs(counts - expected) <= 6 * np.sqrt(expected) + 1e-9)


def test_the_sparse_matrix_holds_its_entries_and_nothing_else():
    *_, values, columns = make()
    dense = np.zeros((12, 40), np.float32)
    np.put_along_axis(dense, np.asarray(columns), np.asarray(values), axis=1)
    np.testing.assert_array_equal(sparse_matrix(values, columns, 40), dense)


def test_output_and_gradients_are_those_of_the_dense_weight(x64):
    x, B, A, values, columns = make(dtype=jnp.float64)
    target = jnp.sin(jnp.arange(2 * 5 * 12.0)).reshape(2, 5, 12)

    def ours(x, B, A, values):
        return jnp.sum(target * sparse_low_rank_product(x, B, A, values, columns, 0.7) ** 2)

    def dense(x, B, A, values):
        rows = jnp.arange(12)[:, None]
        W = (0.7 * B @ A).at[rows, columns].add(values)
        return jnp.sum(target * (x @ W.T) ** 2)

    arguments = (x, B, A, values)
    np.testing.assert_allclose(ours(*arguments), dense(*arguments), rtol=1e-12)
    for one, other in zip(
        jax.jit(jax.grad(ours, (0, 1, 2, 3)))(*arguments),
        jax.jit(jax.grad(dense, (0, 1, 2, 3)))(*arguments),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


def test_nothing_scatters_and_no_weight_is_saved():
    x, B, A, values, columns = make(m=64, n=80)

    def loss(x, B, A, values):
        return jnp.sum(sparse_low_rank_product(x, B, A, values, columns, 0.5) ** 2)

    gradient = jax.jit(jax.grad(loss, (0, 1, 2, 3)))
    assert "scatter" not in gradient.lower(x, B, A, values).as_text()
    _, residuals = jax.vjp(loss, x, B, A, values)
    saved = [leaf.shape for leaf in jax.tree.leaves(residuals)]
    assert (64, 80) not in saved


def test_under_vmap_and_in_bfloat16():
    x, B, A, values, columns = make(dtype=jnp.bfloat16)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), (B, A, values, columns))
    y = jax.vmap(lambda *w: sparse_low_rank_product(x, *w, 0.5))(*stacked)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y[0], sparse_low_rank_product(x, B, A, values, columns, 0.5))


@pytest.mark.parametrize("density", [0, -0.1, 1.5])
def test_a_density_that_is_none_is_named(density):
    with pytest.raises(ValueError, match=rf"density .* but is {density}"):
        draw_support(jax.random.key(0), 4, 4, density)
