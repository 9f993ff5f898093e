"""Momentum normalised by rows, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loro_jax.directions.row_momentum import scale_by_rows
from tests.directions.test_orthogonal import draw


def run(tx, grads):
    state = tx.init(grads[0])
    for grad in grads:
        moves, state = jax.jit(tx.update)(grad, state)
        yield moves, state


@pytest.mark.parametrize("nesterov", [False, True])
def test_rows_are_those_of_float64(nesterov):
    grads, mu = [draw(i, 7, 5) for i in range(3)], 0.0
    tx = scale_by_rows(0.9, nesterov=nesterov)
    for grad, (moves, _) in zip(grads, run(tx, grads), strict=True):
        g = np.float64(grad)
        mu = 0.9 * mu + 0.1 * g
        ahead = 0.9 * mu + 0.1 * g if nesterov else mu
        expected = ahead / np.sqrt(np.mean(ahead**2, axis=1, keepdims=True))
        np.testing.assert_allclose(moves, expected, rtol=1e-4, atol=1e-6)


def test_rows_may_have_any_scale_and_zeros_rest():
    G = draw(0, 4, 6)
    sizes = jnp.array([[1e-30], [1.0], [1e6], [0.0]])
    ((plain, _),), ((scaled, _),) = run(scale_by_rows(), [G]), run(scale_by_rows(), [G * sizes])
    np.testing.assert_allclose(plain[:3], scaled[:3], rtol=1e-5)
    assert not np.any(scaled[3])
