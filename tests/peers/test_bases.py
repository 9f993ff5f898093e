"""Bases of subspaces: orthonormal, adjoint, chosen as they say, and rotated exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loro_jax.linalg.cosine import cosine_transform
from loro_jax.peers.bases import BASES, MOMENTS, basis_of, blocks, renewed
from loro_jax.peers.cosine_columns import cosine_basis, strongest_columns
from tests.peers.projected_methods import gradients

SHAPE, RANK = (4, 6, 9), 3
DENSE = ("svd", "randomised", "random")
INDEXED = ("dct", "columns", "blocks")


def random(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def renewed_basis(kind, G, rank=RANK, count=0):
    basis = BASES[kind]
    begun = basis.begin(G.shape, rank, G.dtype)
    P = jax.jit(basis.renew)(G, begun, jnp.int32(count))
    assert (P.shape, P.dtype) == (begun.shape, begun.dtype)
    return basis, P


@pytest.mark.parametrize("kind", BASES)
def test_projecting_and_lifting(kind):
    """P^T P = I, lifting is the adjoint of projecting, and the complement is orthogonal."""
    G = random(SHAPE)
    basis, P = renewed_basis(kind, G)
    R = basis.project(P, G)
    assert R.shape == basis.moments(SHAPE, RANK)
    N = random(R.shape, seed=1)
    np.testing.assert_allclose(basis.project(P, basis.lift(P, N, SHAPE)), N, atol=1e-5)
    inner = jnp.vdot(basis.lift(P, N, SHAPE), G), jnp.vdot(N, R)
    np.testing.assert_allclose(*inner, rtol=1e-5)
    rest = basis.complement(P, G)
    assert 0.1 < np.linalg.norm(rest) / np.linalg.norm(G) < 0.95
    np.testing.assert_allclose(basis.project(P, rest), np.zeros(R.shape), atol=1e-5)
    assert abs(jnp.vdot(rest, basis.lift(P, R, SHAPE))) < 1e-4
    if kind in ("columns", "blocks"):  # to the bit: nothing is computed
        assert not np.any(basis.project(P, rest))
        np.testing.assert_array_equal(rest + basis.lift(P, R, SHAPE), G)


@pytest.mark.parametrize("kind", BASES)
def test_what_is_stored(kind):
    stored = jax.eval_shape(lambda: BASES[kind].begin(SHAPE, RANK, jnp.float32))
    assert stored.dtype == (jnp.float32 if kind in DENSE else jnp.int32)
    shape = {"blocks": (2,)}.get(kind, (4, 6, 3) if kind in DENSE else (4, 3))
    assert stored.shape == shape


@pytest.mark.parametrize("kind", BASES)
def test_moments_are_rotated_by_the_product_of_the_bases(kind):
    """C mu and (C * C) nu with C = P_new^T P_old, written out."""
    first, second = random(SHAPE), random(SHAPE, seed=1)
    basis, old = renewed_basis(kind, first)
    new = basis.renew(second, old, jnp.int32(7))
    mu, nu = (random(basis.moments(SHAPE, RANK), seed) for seed in (2, 3))

    def coordinates(x):  # C x: lifted from the old subspace, projected to the new one
        return basis.project(new, basis.lift(old, x, SHAPE))

    got_mu, got_nu = jax.jit(basis.rotate, static_argnums=4)(new, old, mu, nu**2, SHAPE)
    np.testing.assert_allclose(got_mu, coordinates(mu), atol=2e-6)
    if kind in DENSE:
        C = np.asarray(new).mT @ np.asarray(old)
        np.testing.assert_allclose(got_nu, C**2 @ np.asarray(nu**2), atol=1e-5)
        return
    # C is a part of a permutation: moments that stay are the same to the bit, others zero.
    axis = 0 if kind == "blocks" else 1
    olds, news = (np.atleast_2d(np.asarray(x)) for x in (old, new))
    kept = 0
    for layer, (before, after) in enumerate(zip(olds, news, strict=True)):
        for place, index in enumerate(after):
            at = place if axis == 0 else (layer, place)
            where = np.flatnonzero(before == index)
            if not where.size:
                assert not np.any(got_mu[at])
                assert not np.any(got_nu[at])
                continue
            kept += 1
            source = where[0] if axis == 0 else (layer, where[0])
            np.testing.assert_array_equal(got_mu[at], mu[source])
            np.testing.assert_array_equal(got_nu[at], (nu**2)[source])
    assert kept > 0 or kind == "blocks"


def test_the_cosines_are_those_of_the_largest_l1_norms():
    G = np.asarray(random(SHAPE))
    _, indices = renewed_basis("dct", jnp.asarray(G))
    Q = np.asarray(cosine_transform(6, 6), np.float64)
    np.testing.assert_allclose(Q @ Q.T, np.eye(6), atol=1e-6)
    norms = np.abs(Q @ G).sum(axis=-1)
    for chosen, of_layer in zip(np.asarray(indices), norms, strict=True):
        assert list(chosen) == sorted(np.argsort(-of_layer)[:RANK])
    _, P = BASES["dct"], Q[np.asarray(indices)].mT
    np.testing.assert_allclose(BASES["dct"].project(indices, jnp.asarray(G)), P.mT @ G, atol=1e-5)


def test_the_cosines_are_those_of_dct_adamw_and_as_accurate_as_the_gradient(x64):
    G = random((4, 7, 9), dtype=jnp.float64)
    basis, indices = renewed_basis("dct", G)
    Q = cosine_basis(7, jnp.float64)
    columns, S = strongest_columns(G.mT, Q, RANK)
    np.testing.assert_array_equal(indices, columns)
    np.testing.assert_allclose(basis.project(indices, G), S.mT, atol=1e-13)
    R = random((4, RANK, 9), seed=1, dtype=jnp.float64)
    again = basis.project(indices, basis.lift(indices, R, G.shape))
    np.testing.assert_allclose(again, R, atol=1e-13)


def test_the_svd_s_is_the_leading_subspace_and_the_randomised_one_is_near():
    G = jnp.stack(gradients((30, 40), 2))
    leading = np.linalg.svd(np.asarray(G))[0][..., :RANK]
    for kind, near in (("svd", 1e-5), ("randomised", 1e-3)):
        _, P = renewed_basis(kind, G)
        cosines = np.linalg.svd(leading.mT @ np.asarray(P), compute_uv=False)
        np.testing.assert_allclose(cosines, 1, atol=near)


@pytest.mark.parametrize("kind", ["random", "columns"])
def test_random_bases_differ_between_layers_and_times_and_not_between_runs(kind):
    G = random((2, 12, 20))
    _, first = renewed_basis(kind, G, 4)
    _, again = renewed_basis(kind, G, 4)
    _, later = renewed_basis(kind, G, 4, count=200)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, later)
    assert not np.array_equal(first[0], first[1])


@pytest.mark.parametrize("kind", INDEXED)
def test_all_of_it_is_the_identity(kind):
    G = random(SHAPE)
    basis, P = renewed_basis(kind, G, SHAPE[-2])
    np.testing.assert_array_equal(np.broadcast_to(np.arange(P.shape[-1]), P.shape), P)
    if kind != "dct":
        np.testing.assert_array_equal(basis.project(P, G).reshape(SHAPE), G)


@pytest.mark.parametrize(
    ("order", "turns"),
    [
        ("descending", [{3, 4}, {1, 2}, {0, 4}, {2, 3}, {0, 1}]),
        ("ascending", [{0, 1}, {2, 3}, {0, 4}, {1, 2}, {3, 4}]),
    ],
)
def test_blocks_take_turns(order, turns):
    basis, G = blocks(order), jnp.ones((5, 4, 6))
    taken = basis.begin(G.shape, 2, G.dtype)
    for turn, expected in enumerate(turns):
        taken = basis.renew(G, taken, jnp.int32(10 * turn))
        assert set(taken.tolist()) == expected
    found = blocks("random").renew(G, taken, jnp.int32(3))
    assert len(set(found.tolist())) == 2


def test_blocks_need_layers():
    with pytest.raises(ValueError, match="sides 4 and 6 only; expected a leading axis of layers"):
        BASES["blocks"].begin((4, 6), 2, jnp.float32)


@pytest.mark.parametrize("moments", MOMENTS)
def test_nothing_changes_unless_it_is_due(moments):
    G = random(SHAPE)
    basis = BASES["svd"]
    held = (basis.begin(SHAPE, RANK, G.dtype), *(jnp.ones((4, RANK, 9)) for _ in range(2)))

    def run(due):
        return renewed(basis, moments, held, G, jnp.bool_(due), jnp.int32(5))

    for before, after in zip(held, run(False), strict=True):
        np.testing.assert_array_equal(before, after)
    P, mu, _ = run(True)
    assert np.any(P)
    # The old basis was zero, so C is.
    assert np.all(np.asarray(mu) == (1 if moments == "keep" else 0))
    jaxpr = jax.make_jaxpr(run)(True).jaxpr
    assert not {equation.primitive.name for equation in jaxpr.eqns} & {"svd", "custom_vmap_call"}


def test_an_unknown_kind():
    with pytest.raises(ValueError, match=r"here: basis must be one of svd, .* is 'fourier'"):
        basis_of("fourier", "here")
