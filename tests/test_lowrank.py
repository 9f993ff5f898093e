import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from loro_jax import LowRank, balance, exact_update, from_dense, initialise
from loro_jax.exact import METHODS


def test_a_pair_is_a_pytree_node_with_named_children():
    pair = LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(pair)]
    assert paths == [".B", ".A"]
    doubled = jax.tree.map(lambda x: 2 * x, pair)
    assert isinstance(doubled, LowRank)
    assert doubled.shape == (4, 3)
    assert doubled.rank == 2


def test_specs_may_stand_in_for_arrays():
    pair = LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)))
    axes = jax.tree.map(lambda _: None, pair)
    assert axes.B is None
    abstract = jax.eval_shape(lambda p: p, pair)
    assert abstract.shape == (4, 3)


@pytest.mark.parametrize("children", [(P("d", None), P(None, "d")), (0, None), ("slow", "fast")])
def test_what_stands_for_arrays_may_be_written_by_hand(children):
    pair = LowRank(*children)
    assert children == (pair.B, pair.A)


def test_a_node_of_axes_is_one_for_vmap():
    several = jnp.ones((3, 4, 2)), jnp.ones((2, 5)).at[0].set(2.0)
    pair = jax.tree.unflatten(jax.tree.structure(LowRank(0, 0)), several)
    mapped = jax.vmap(lambda p: p.product(), in_axes=(LowRank(0, None),))
    np.testing.assert_array_equal(mapped(pair), np.full((3, 4, 5), 3.0))


def test_apply_is_the_product():
    rng = np.random.default_rng(0)
    pair = LowRank(jnp.array(rng.normal(size=(4, 2))), jnp.array(rng.normal(size=(2, 3))))
    x = rng.normal(size=(5, 3))
    np.testing.assert_allclose(pair.apply(x), x @ pair.product().T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [2, 3])  # 2: all axes are as long, and any order of them fits
def test_apply_with_leading_axes_is_the_product_of_each(size):
    rng = np.random.default_rng(0)
    pair = LowRank(jnp.array(rng.normal(size=(2, size, 2))), jnp.array(rng.normal(size=(2, 2, 2))))
    W = np.asarray(pair.product())
    x = rng.normal(size=(2, 2, 2))
    expected = np.einsum("lmn,lkn->lkm", W, x)
    np.testing.assert_allclose(pair.apply(x), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pair.apply(x[0, 0]), W @ x[0, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (3, 9, 6)])
def test_from_dense_is_the_best_approximation_in_balanced_factors(x64, shape):
    W = np.random.default_rng(0).normal(size=shape)
    B, A = from_dense(jnp.array(W), 4)
    U, s, Vt = np.linalg.svd(W, full_matrices=False)
    best = (U[..., :4] * s[..., None, :4]) @ Vt[..., :4, :]
    np.testing.assert_allclose(B @ A, best, atol=1e-12)
    np.testing.assert_allclose(B.swapaxes(-1, -2) @ B, A @ A.swapaxes(-1, -2), atol=1e-12)


def test_balance_keeps_the_product(x64):
    rng = np.random.default_rng(0)
    B, A = jnp.array(rng.normal(size=(2, 9, 3))), jnp.array(100 * rng.normal(size=(2, 3, 6)))
    B2, A2 = balance(B, A)
    np.testing.assert_allclose(B2 @ A2, B @ A, rtol=1e-10)
    np.testing.assert_allclose(B2.swapaxes(-1, -2) @ B2, A2 @ A2.swapaxes(-1, -2), atol=1e-9)


@pytest.mark.parametrize(
    ("method", "std_B", "std_A"),
    [
        ("xavier", (2 / (512 + 64)) ** 0.5, (2 / (64 + 384)) ** 0.5),
        ("kaiming", (2 / 64) ** 0.5, (2 / 64) ** 0.5),
        ("auto", (0.02**2 / 64) ** 0.25, (0.02**2 / 64) ** 0.25),
        ("randn_0.3", 0.3, 0.3),
        ("orth", (1 / 512) ** 0.5, (1 / 384) ** 0.5),
        ("xavorth", (2 / (512 + 64) / 512) ** 0.5, (2 / (64 + 384) / 384) ** 0.5),
    ],
)
def test_initialisers_have_the_authors_scales(method, std_B, std_A):
    B, A = initialise(jax.random.key(0), 512, 384, 64, method)
    np.testing.assert_allclose(np.std(B), std_B, rtol=0.02)
    np.testing.assert_allclose(np.std(A), std_A, rtol=0.02)
    if "orth" in method:
        gram = B.T @ B
        np.testing.assert_allclose(gram, gram[0, 0] * np.eye(64), atol=1e-5)
    assert not np.allclose(B[:64, :64], A[:64, :64])


def test_auto_gives_the_product_the_dense_standard_deviation():
    B, A = initialise(jax.random.key(0), 512, 384, 64, "auto", initializer_range=0.05)
    np.testing.assert_allclose(np.std(B @ A), 0.05, rtol=0.05)


@pytest.mark.parametrize(("m", "n", "rank"), [(512, 384, 64), (200, 512, 64)])
def test_dlr_adds_repeated_identities_and_gives_the_product_the_size_of_auto(m, n, rank):
    plain_B, plain_A = initialise(jax.random.key(0), m, n, rank, "auto", initializer_range=0.05)
    B, A = initialise(jax.random.key(0), m, n, rank, "dlr", initializer_range=0.05)
    copies = -(-m // rank)
    scale = float(A[0, 0] / plain_A[0, 0])
    np.testing.assert_allclose(A, scale * plain_A, rtol=1e-5)
    R = np.eye(rank)[np.arange(m) % rank]
    np.testing.assert_allclose(B, scale * (plain_B + R / np.sqrt(copies)), atol=1e-6)
    assert float(jnp.std(B @ A)) == pytest.approx(0.05, rel=0.03)


def test_constant_factors():
    B, A = initialise(jax.random.key(0), 4, 3, 2, "const_0.5")
    assert np.all(B == 0.5)
    assert np.all(A == 0.5)


@pytest.mark.parametrize("method", ["zeros", "spectral", "randn", "randn_x", "xavier_2", "const_"])
def test_unknown_initialisers_are_named(method):
    with pytest.raises(ValueError, match=f"unknown method '{method}'"):
        initialise(jax.random.key(0), 4, 3, 2, method)


@pytest.mark.parametrize("rank", [0, 4, -1])
def test_ranks_that_do_not_fit_are_named(rank):
    for make in (
        lambda: initialise(jax.random.key(0), 4, 3, rank),
        lambda: from_dense(jnp.ones((4, 3)), rank),
    ):
        with pytest.raises(ValueError, match=str(rank)):
            make()
    with pytest.raises(ValueError, match="rank must be between 1 and min"):
        LowRank(jnp.ones((4, 5)), jnp.ones((5, 3)))


@pytest.mark.parametrize("dtype", ["int32", "int8", "bool"])
def test_matrices_of_integers_have_float_factors(dtype):
    left, right = np.array([[1, 0], [1, 0], [0, 1], [0, 0]]), np.array([[1, 1, 0], [0, 0, 1]])
    W = (left @ right).astype(dtype)
    B, A = from_dense(W, 2)
    assert B.dtype == A.dtype == jnp.float32
    np.testing.assert_allclose(B @ A, W.astype(int), atol=1e-6)
    B, A = balance(left.astype(dtype), right.astype(dtype))
    np.testing.assert_allclose(B @ A, W.astype(int), atol=1e-6)


def test_complex_matrices_have_complex_factors():
    rng = np.random.default_rng(0)
    W = (rng.normal(size=(5, 4)) + 1j * rng.normal(size=(5, 4))).astype(np.complex64)
    U, s, Vt = np.linalg.svd(W)
    B, A = from_dense(W, 2)
    np.testing.assert_allclose(B @ A, (U[:, :2] * s[:2]) @ Vt[:2], atol=1e-5)
    B2, A2 = balance(3 * B, A)
    np.testing.assert_allclose(B2 @ A2, 3 * B @ A, atol=1e-5)
    np.testing.assert_allclose(B2.conj().T @ B2, A2 @ A2.conj().T, atol=1e-4)


METHODS_OF_INITIALISE = ["xavier", "orth", "dlr", "lora", "randn_0.1", "const_0.1"]


@pytest.mark.parametrize("method", METHODS_OF_INITIALISE)
def test_fresh_factors_are_float32_whatever_the_program_has(x64, method):
    factors = initialise(jax.random.key(0), 6, 5, 2, method, initializer_range=np.float64(0.02))
    assert {x.dtype for x in factors} == {jnp.dtype("float32")}


def test_nothing_leans_on_implicit_rank_promotion():
    pair = LowRank(jnp.ones((6, 2)), jnp.eye(2, 5))
    with jax.numpy_rank_promotion("raise"):
        from_dense(jnp.ones((4, 3)), 2)
        pair.balance()
        for method in METHODS:
            step = functools.partial(exact_update, method=method)
            jax.eval_shape(step, pair.B, pair.A, pair.B, pair.A, 0.1)
