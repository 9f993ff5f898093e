"""Public functions against their definitions in NumPy, compiled as a whole and op by op."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

from loro_jax import (
    LowRank,
    balance,
    exact_update,
    from_dense,
    loro,
    riemannian_gradient,
)
from loro_jax.linalg.newton_schulz import orthogonalise, polar_factor
from tests.exact.test_tangent import best_approximation, random_pair, tangent_projection

M, N, R = 9, 12, 4

both = chex.variants(with_jit=True, without_jit=True)


@pytest.mark.usefixtures("x64")
class VariantsTest(chex.TestCase):
    """Each function as users call it: within a program of theirs, and outside of any."""

    def setUp(self):
        super().setUp()
        self.B, self.A, self.G = random_pair(M, N, R)
        pair = self.B, self.A, self.G @ self.A.T, self.B.T @ self.G
        self.arguments = tuple(map(jnp.asarray, pair))

    @both
    def test_riemannian_gradient(self):
        found = self.variant(riemannian_gradient)(*self.arguments)
        expected = tangent_projection(self.B @ self.A, R, self.G)
        chex.assert_trees_all_close(np.asarray(found), expected, rtol=0, atol=1e-11)

    @both
    def test_exact_update(self):
        step = self.variant(functools.partial(exact_update, method="svd"))
        B, A = step(*self.arguments, 0.3)
        target = self.B @ self.A - 0.3 * tangent_projection(self.B @ self.A, R, self.G)
        expected = best_approximation(target, R)
        chex.assert_trees_all_close(np.asarray(B @ A), expected, rtol=0, atol=1e-11)

    @both
    def test_balance(self):
        B, A = self.variant(balance)(*self.arguments[:2])
        chex.assert_trees_all_close(np.asarray(B @ A), self.B @ self.A, rtol=0, atol=1e-11)
        chex.assert_trees_all_close(B.T @ B, A @ A.T, rtol=0, atol=1e-11)

    @both
    def test_from_dense(self):
        B, A = self.variant(functools.partial(from_dense, rank=R))(jnp.asarray(self.G))
        expected = best_approximation(self.G, R)
        chex.assert_trees_all_close(np.asarray(B @ A), expected, rtol=0, atol=1e-11)

    @both
    def test_polar_factor(self):
        U, s, Vt = np.linalg.svd(self.G[:, :M])
        found, converged = self.variant(polar_factor)(jnp.asarray(self.G[:, :M]), s[-1])
        assert converged
        chex.assert_trees_all_close(np.asarray(found), U @ Vt, rtol=0, atol=1e-6)

    @both
    def test_orthogonalise(self):
        found = np.asarray(self.variant(orthogonalise)(jnp.asarray(self.G)))
        U, _, Vt = np.linalg.svd(self.G, full_matrices=False)
        # Singular values become 0.7 to 1.2, whatever they were.
        s = np.diag(U.T @ found @ Vt.T)
        chex.assert_trees_all_close(s, np.ones(M), rtol=0, atol=0.35)
        chex.assert_trees_all_close((U * s) @ Vt, found, rtol=0, atol=1e-9)

    @both
    @parameterized.named_parameters(
        ("approximate", None, "singular"), ("exact", 1, "singular"), ("nearest", 1, "nearest")
    )
    def test_descent(self, exact_every, basis):
        """One step along the gradient itself."""
        params = {"w": LowRank(self.B, self.A)}
        grads = {"w": LowRank(*self.arguments[2:])}
        tx = loro(
            0.01, exact_every, lr_scale=1.0, direction=optax.identity(), basis=basis,
            exact_method="svd",
        )  # fmt: skip
        updates, state = self.variant(tx.update)(grads, tx.init(params), params)
        moved = jax.tree.map(lambda p, u: np.asarray(p + u), params, updates)["w"]
        if exact_every is None:
            expected = (self.B - 0.01 * grads["w"].B) @ (self.A - 0.01 * grads["w"].A)
        else:
            step = 0.01 * tangent_projection(self.B @ self.A, R, self.G)
            expected = best_approximation(self.B @ self.A - step, R)
        chex.assert_trees_all_close(
            np.asarray(moved.product()), np.asarray(expected), rtol=0, atol=1e-9
        )
        assert int(state.count) == 1
