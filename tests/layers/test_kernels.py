"""Kernels as matrices: against einsum, which knows no layouts."""

import jax.numpy as jnp
import numpy as np
import pytest

from loro_jax.layers.kernels import Layout, pair_axes, split_equation

SIZES = {"B": 2, "T": 3, "D": 4, "N": 2, "H": 5, "K": 3, "E": 2}

EQUATIONS = [
    *("BTD,DNH->BTNH", "BTNH,NHD->BTD", "BTD,DH->BTH", "BTD,KDH->KBTH", "BTD,HD->BHT"),
    *("BTED,EDH->BTEH", "ETD,DEH->ETH", "BTNH,HDN->BDT", "D,DH->H"),
]


def array(indices, seed):
    return np.random.default_rng(seed).normal(size=[SIZES[i] for i in indices])


@pytest.mark.parametrize("equation", EQUATIONS)
def test_both_halves_of_an_equation_compute_the_whole(equation):
    given, rest = equation.split(",")
    kernel, _ = rest.split("->")
    x, W = array(given, 0), array(kernel, 1)
    equations = split_equation(equation)
    layout = Layout(W.shape, equations.roles)
    matrix = np.asarray(layout.matrix(jnp.asarray(W)))
    U, s, Vt = np.linalg.svd(matrix, full_matrices=False)
    B, A = jnp.asarray(U * s[..., None, :]), jnp.asarray(Vt)
    latent = np.einsum(equations.down, x, layout.down(A))
    y = np.einsum(equations.up, latent, layout.up(B))
    np.testing.assert_allclose(y, np.einsum(equation, x, W), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(layout.kernel(layout.matrix(jnp.asarray(W))), jnp.asarray(W))


def test_dots_stand_for_any_axes():
    equations = split_equation("...d, df -> ...f")
    assert (equations.roles, equations.down) == ("io", "...d,da->...a")
    assert equations.up == "...a,af->...f"


def test_axes_of_a_stack_come_first():
    layout = Layout((4, 2, 3), "ioo")
    kernels = np.random.default_rng(0).normal(size=(5, 4, 2, 3)).astype(np.float32)
    stacked = layout.matrix(jnp.asarray(kernels))
    assert stacked.shape == (5, 6, 4)
    np.testing.assert_array_equal(stacked[3], layout.matrix(jnp.asarray(kernels[3])))
    np.testing.assert_array_equal(layout.kernel(stacked), kernels)
    axes = pair_axes(layout, ("layers", "embed", "heads", None))
    assert axes == (("layers", "heads", None), ("layers", None, "embed"))


@pytest.mark.parametrize(
    ("equation", "reason"),
    [
        ("BTD,BT->BTD", "does not multiply by a matrix"),
        ("BTD,DH->BT", "does not multiply by a matrix"),
        ("BTD,TD->BTD", "does not multiply by a matrix"),
        ("BDD,DH->BH", "has an index twice in 'BDD'"),
        ("BTD,DH", "is not of the form"),
        ("BTD,...D->BT", "is not of the form"),
    ],
)
def test_what_is_no_matrix_is_refused(equation, reason):
    with pytest.raises(ValueError, match=reason):
        split_equation(equation)
